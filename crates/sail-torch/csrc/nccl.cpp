// The NCCL backend: collectives between CUDA devices. Compiled where the headers of CUDA and NCCL are.

#include "dist.h"

#ifdef SAIL_WITH_NCCL
#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <chrono>
#include <stdexcept>

extern "C" {

sail_error* sail_nccl_new(sail_store* store, const char* name, int rank, int size, int64_t timeout_ms, int device,
                          sail_group** out) {
  return sail::guarded_remote([&] {
#ifdef SAIL_WITH_NCCL
    using Nccl = c10d::ProcessGroupNCCL;
    const at::Device on(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    auto options = Nccl::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    options->group_name = name;
    auto backend = c10::make_intrusive<Nccl>(named(store, name), rank, size, options);
    backend->setBoundDeviceId(on);
    try {
      // The communicator would else be made by the first collective, in whichever thread that is.
      backend->eagerConnectSingleDevice(on);
    } catch (...) {
      // Its destructor waits for other ranks; the process is about to end.
      (void)backend.release();
      throw;
    }
    *out = new sail_group{std::move(backend)};
#else
    throw std::runtime_error("this build has no NCCL: its headers were not found when it was compiled");
#endif
  });
}

}  // extern "C"
