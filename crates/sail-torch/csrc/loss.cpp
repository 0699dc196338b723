// The head of a language model and its cross-entropy in one: the logits of a few rows at a time.

#include "common.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

using sail::guarded;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

namespace {

// What one pass over the rows gives. Gradients are those of the weighted sum, undefined where not asked for.
struct Pass {
  at::Tensor losses;
  at::Tensor grad_x;
  at::Tensor grad_weight;
};

Pass pass(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets,
          const at::Tensor& weights, int64_t chunk, bool of_x, bool of_weight) {
  at::NoGradGuard no_grad;
  const int64_t rows = x.size(0);
  Pass out;
  out.losses = at::empty({rows}, x.options().dtype(at::kFloat));
  if (of_x) out.grad_x = at::empty_like(x);
  if (of_weight) out.grad_weight = at::zeros(weight.sizes(), weight.options().dtype(at::kFloat));
  const bool is_single = x.scalar_type() == at::kFloat;
  // The last rows, fewer than a chunk, use a part of them.
  const auto all_logits = at::empty({std::min(chunk, rows), weight.size(0)}, x.options());
  const auto all_log_probs = at::empty(all_logits.sizes(), x.options().dtype(at::kFloat));
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t count = std::min(chunk, rows - begin);
    const auto x_c = x.narrow(0, begin, count);
    const auto target_c = targets.narrow(0, begin, count).unsqueeze(1);
    auto logits = all_logits.narrow(0, 0, count);
    auto log_probs = all_log_probs.narrow(0, 0, count);
    at::mm_out(logits, x_c, weight.t());
    at::_log_softmax_out(log_probs, is_single ? logits : logits.to(at::kFloat), 1, /*half_to_float=*/false);
    out.losses.narrow(0, begin, count).copy_(log_probs.gather(1, target_c).squeeze(1).neg_());
    if (!of_x && !of_weight) continue;
    // d loss / d logits = softmax - one at the target, times the row's weight.
    auto& grad = log_probs.exp_();
    grad.scatter_add_(1, target_c, at::full({}, -1.0, grad.options()).expand({count, 1}));
    grad.mul_(weights.narrow(0, begin, count).unsqueeze(1));
    if (!is_single) logits.copy_(grad);
    const auto& grad_c = is_single ? grad : logits;
    if (of_x) {
      auto grad_x_c = out.grad_x.narrow(0, begin, count);
      at::mm_out(grad_x_c, grad_c, weight);
    }
    if (of_weight) {
      if (is_single) {
        out.grad_weight.addmm_(grad_c.t(), x_c);
      } else {
        out.grad_weight.add_(at::mm(grad_c.t(), x_c));
      }
    }
  }
  return out;
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static tensor_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                             const at::Tensor& targets, const at::Tensor& weights, int64_t chunk, bool of_x,
                             bool of_weight) {
    // Gradients of a sum are known before the backward pass, up to a factor: no logits need be kept or made again.
    auto made = pass(x, weight, targets, weights, chunk, of_x, of_weight);
    context->saved_data["grad_x"] = made.grad_x;
    context->saved_data["grad_weight"] = made.grad_weight;
    context->saved_data["weight_kind"] = static_cast<int64_t>(weight.scalar_type());
    context->set_materialize_grads(false);
    context->mark_non_differentiable({made.losses});
    return {at::dot(made.losses, weights), made.losses};
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "linear_cross_entropy has no second derivative");
    auto take = [&](const char* name) {
      auto grad = context->saved_data[name].toTensor();
      context->saved_data[name] = at::Tensor();
      return grad.defined() ? grad.mul_(grads[0]) : grad;
    };
    const auto grad_x = take("grad_x");
    const auto grad_weight = take("grad_weight");
    // One of them was asked for, or there would be no graph.
    TORCH_CHECK(grad_x.defined() || grad_weight.defined(), "linear_cross_entropy goes backward once");
    const auto weight_kind = static_cast<at::ScalarType>(context->saved_data["weight_kind"].toInt());
    return {grad_x, grad_weight.defined() ? grad_weight.to(weight_kind) : grad_weight, {}, {}, {}, {}, {}};
  }
};

}  // namespace

extern "C" {

// The logits of `chunk` rows, at least 1, are there at a time. `sum` and `losses` receive new tensors, owned by the
// caller: the weighted sum, with a graph, and the loss of each row `[r]`, without; both fp32.
sail_error* sail_linear_cross_entropy(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* targets,
                                      const at::Tensor* weights, int64_t chunk, at::Tensor** sum,
                                      at::Tensor** losses) {
  return guarded([&] {
    const auto wanted = [](const at::Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); };
    auto out = LinearCrossEntropy::apply(*x, *weight, *targets, *weights, chunk, wanted(*x), wanted(*weight));
    *sum = new at::Tensor(out[0]);
    *losses = new at::Tensor(out[1]);
  });
}

}  // extern "C"
