// The Gloo backend: collectives on the CPU over TCP.
//
// The wheel ships ProcessGroupGloo.hpp but not Gloo's own headers; `gloo_api/` declares the few opaque types
// that it names, in this translation unit alone.

#include "dist.h"

#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>

extern "C" {

// `address`: the local address that other ranks reach this process at; empty leaves the choice to
// GLOO_SOCKET_IFNAME or the host's name.
sail_error* sail_gloo_new(sail_store* store, const char* name, int rank, int size, int64_t timeout_ms, const char* address,
                          sail_group** out) {
  return sail::guarded_remote([&] {
    using Gloo = c10d::ProcessGroupGloo;
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    auto options = *address == '\0' ? Gloo::Options::create_default(timeout) : Gloo::Options::create(timeout);
    if (*address != '\0') options->devices.push_back(Gloo::createDeviceForHostname(address));
    *out = new sail_group{c10::make_intrusive<Gloo>(named(store, name), rank, size, options)};
  });
}

}  // extern "C"
