// Where the gradients of a parameter go: `GradSink` of `src/autograd.rs`.

#pragma once

#include "common.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

// Functions of the caller's. Errors are nullptr for none.
struct sail_grad_sink {
  void* data;
  // Receives the tensor into which a gradient is to be written, or with `holds` added, owned by the callee; or nullptr.
  sail_error* (*place)(void* data, at::Tensor** place, bool* holds);
  // A gradient is in its place.
  sail_error* (*placed)(void* data);
  // The gradient is in `param.grad`; the callee owns this reference.
  sail_error* (*accumulated)(void* data, at::Tensor* param);
  // Frees `data`.
  void (*drop)(void* data);
};

namespace sail {

class GradSink final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit GradSink(const sail_grad_sink& calls) : calls_(calls) {}
  ~GradSink() override { calls_.drop(calls_.data); }
  GradSink(const GradSink&) = delete;
  GradSink& operator=(const GradSink&) = delete;

  // That of a parameter; nullptr without one.
  static GradSink* of(const at::Tensor& param) {
    if (!param.requires_grad() || !param.is_leaf()) return nullptr;
    return dynamic_cast<GradSink*>(torch::autograd::impl::post_acc_grad_hooks(param).get());
  }

  void operator()(const at::Tensor& param) override {
    rethrow(calls_.accumulated(calls_.data, new at::Tensor(param)));
  }

  // An undefined tensor where gradients are to be handed over, and whether it holds something to which they are added.
  std::pair<at::Tensor, bool> place() {
    at::Tensor* place = nullptr;
    bool holds = false;
    rethrow(calls_.place(calls_.data, &place, &holds));
    const std::unique_ptr<at::Tensor> owned(place);
    return {owned == nullptr ? at::Tensor() : *owned, holds};
  }

  void placed() { rethrow(calls_.placed(calls_.data)); }

 private:
  sail_grad_sink calls_;
};

}  // namespace sail
