// Devices: the one a thread works on, and what libtorch holds there. But for a device's name no header of CUDA is
// needed: libtorch_cuda registers what these interfaces lead to.

#include "common.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <memory>
#include <optional>
#ifdef SAIL_WITH_NCCL
#include <cuda_runtime_api.h>

namespace at::cuda {
// Of libtorch_cuda; its own header also wants those of cuBLAS, cuSPARSE and cuSOLVER.
cudaDeviceProp* getDeviceProperties(c10::DeviceIndex device);
}  // namespace at::cuda
#endif

using sail::guarded;

extern "C" {

sail_error* sail_set_device(int device) {
  return guarded([&] {
    // The group is made before any tensor is.
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::impl::getDeviceGuardImpl(at::kCUDA)->setDevice(at::Device(at::kCUDA, index));
  });
}

sail_error* sail_set_tf32(bool allowed) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(allowed);
    at::globalContext().setAllowTF32CuDNN(allowed);
  });
}

sail_error* sail_has_context(int device, bool* there) {
  return guarded([&] {
    *there = at::detail::getCUDAHooks().hasPrimaryContext(static_cast<c10::DeviceIndex>(device));
  });
}

// Of the tensors, and of what was taken from the device for them.
sail_error* sail_memory_peak(int device, int64_t* allocated, int64_t* reserved) {
  return guarded([&] {
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto index = static_cast<c10::DeviceIndex>(device);
    const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(index);
    *allocated = stats.allocated_bytes[all].peak;
    *reserved = stats.reserved_bytes[all].peak;
  });
}

// Copies the driver's name of a device into `name`, which has `room` bytes, NUL included; nothing where this build has no
// headers of CUDA.
sail_error* sail_device_name(int device, char* name, size_t room) {
  return guarded([&] {
#ifdef SAIL_WITH_NCCL
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto* properties = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(device));
    std::strncat(name, properties->name, room - 1);
#endif
  });
}

// `out` receives a copy of `host` on the device, owned by the caller. It travels from pinned memory in a
// stream of its own, beside what was queued before; what is queued from now on waits for it, the host does not.
sail_error* sail_upload(int device, const at::Tensor* host, at::Tensor** out) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto* guard = c10::impl::getDeviceGuardImpl(at::kCUDA);
    const at::Device on(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    // Of this thread for good, which works on one device: streams of the pool are never given back.
    static thread_local std::optional<c10::Stream> own;
    if (!own || own->device() != on) own = guard->getStreamFromGlobalPool(on);
    const auto pinned = host->pin_memory();
    const auto current = guard->getStream(on);
    at::Tensor copy;
    {
      c10::StreamGuard in(*own);
      copy = pinned.to(on, /*non_blocking=*/true);
    }
    c10::Event done(at::kCUDA);
    done.record(*own);
    done.block(current);
    // Its memory is of the other stream: not to be used again before this one is done with it.
    copy.record_stream(current);
    *out = new at::Tensor(std::move(copy));
  });
}

// `out` receives an event, owned by the caller, that has the time at which the device comes to it in the current stream.
sail_error* sail_event_record(int device, c10::Event** out) {
  return guarded([&] {
    const at::Device on(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    // torch's default is one without a time.
    auto event = std::make_unique<c10::Event>(at::kCUDA, c10::EventFlag::BACKEND_DEFAULT);
    event->record(c10::impl::getDeviceGuardImpl(at::kCUDA)->getStream(on));
    *out = event.release();
  });
}

sail_error* sail_event_elapsed(const c10::Event* from, const c10::Event* to, double* millis) {
  return guarded([&] { *millis = from->elapsedTime(*to); });
}

void sail_event_free(c10::Event* event) { delete event; }

}  // extern "C"
