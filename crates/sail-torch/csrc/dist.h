// The handles that the files on c10d share.

#pragma once

#include "common.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

struct sail_store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct sail_group {
  c10::intrusive_ptr<c10d::Backend> backend;
};

struct sail_work {
  c10::intrusive_ptr<c10d::Work> work;
};

// The part of a store whose keys are a group's own.
inline c10::intrusive_ptr<c10d::Store> named(const sail_store* store, const char* name) {
  return c10::make_intrusive<c10d::PrefixStore>(name, store->store);
}

namespace sail {

// For calls that fail when another process or the network does.
template <typename F>
sail_error* guarded_remote(F&& body) {
  return guarded(std::forward<F>(body), network_kind);
}

}  // namespace sail
