// A part of the forward pass that keeps nothing but its inputs, and is computed again in the backward pass.

#include "common.h"

#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

using sail::guarded;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// A computation of the caller's; frees what it captured when it goes.
struct Computation : torch::CustomClassHolder {
  // Gives each result to `sail_push` with `sink`.
  using Call = sail_error* (*)(void* data, at::Tensor* const* inputs, size_t n, void* sink);
  using Drop = void (*)(void*);

  Computation(Call call, Drop drop, void* data) : call(call), drop(drop), data(data) {}
  ~Computation() override { drop(data); }

  variable_list operator()(at::TensorList inputs) const {
    std::vector<at::Tensor*> pointers;
    for (const at::Tensor& input : inputs) pointers.push_back(const_cast<at::Tensor*>(&input));
    variable_list outputs;
    sail::rethrow(call(data, pointers.data(), pointers.size(), &outputs));
    return outputs;
  }

  Call call;
  Drop drop;
  void* data;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static variable_list forward(AutogradContext* context, c10::intrusive_ptr<Computation> computation,
                               at::TensorList inputs, const at::Tensor& /*anchor*/) {
    // A result that nothing depends on has no gradient, and need not have one of zeros.
    context->set_materialize_grads(false);
    context->save_for_backward(inputs.vec());
    context->saved_data["computation"] = c10::IValue::make_capsule(computation);
    return (*computation)(inputs);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "what is recomputed has no second derivative");
    auto capsule = context->saved_data["computation"].toCapsule();
    const auto& computation = static_cast<const Computation&>(*capsule);
    variable_list inputs;
    for (const at::Tensor& saved : context->get_saved_variables()) {
      inputs.push_back(saved.detach().set_requires_grad(saved.requires_grad()));
    }
    {
      at::AutoGradMode with_graph(true);
      const auto outputs = computation(inputs);
      TORCH_CHECK(outputs.size() == grads.size(), "a computation gave ", grads.size(), " results and then ",
                  outputs.size());
      variable_list roots, of_roots;
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (!outputs[i].requires_grad() || !grads[i].defined()) continue;
        roots.push_back(outputs[i]);
        of_roots.push_back(grads[i]);
      }
      // Gradients of parameters go where they go without recomputation: to the leaves, with their hooks.
      if (!roots.empty()) torch::autograd::backward(roots, of_roots);
    }
    variable_list out;
    for (const at::Tensor& input : inputs) out.push_back(input.grad());
    // Of the computation itself, before the inputs, and of the anchor.
    out.insert(out.begin(), at::Tensor());
    out.push_back(at::Tensor());
    return out;
  }
};

}  // namespace

extern "C" {

// Adds a result of a computation to those of the call that `sink` is from.
void sail_push(void* sink, const at::Tensor* tensor) { static_cast<variable_list*>(sink)->push_back(*tensor); }

// Calls `call` now, without a graph, and once more in the backward pass, then `drop(data)`; each result is given to
// `give(out, tensor)`, which owns it. `trains` says whether something but the inputs requires a gradient in it.
sail_error* sail_recompute(at::Tensor* const* inputs, size_t n, bool trains, Computation::Call call,
                           Computation::Drop drop, void* data, void (*give)(void*, at::Tensor*), void* out) {
  auto computation = c10::make_intrusive<Computation>(call, drop, data);
  return guarded([&] {
    // What requires no gradient has no graph, whatever is trained inside.
    auto anchor = at::empty({0}).set_requires_grad(trains);
    for (const auto& tensor : Recompute::apply(computation, at::TensorList(sail::list(inputs, n)), anchor)) {
      give(out, new at::Tensor(tensor));
    }
  });
}

}  // extern "C"
