// What ATen and its autograd have and tch's generated bindings leave out.

#include "common.h"
#include "sink.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>

#include <memory>
#include <vector>

using sail::guarded;
using sail::list;

namespace {

// A callback of the caller's; frees what it captured when the hook goes.
class Hook final {
 public:
  using Call = sail_error* (*)(void*, at::Tensor*);
  using Drop = void (*)(void*);

  Hook(Call call, Drop drop, void* data) : call_(call), drop_(drop), data_(data) {}
  ~Hook() { drop_(data_); }

  Hook(const Hook&) = delete;
  Hook& operator=(const Hook&) = delete;

  void operator()(const at::Tensor& tensor) {
    // The callee owns this reference.
    sail::rethrow(call_(data_, new at::Tensor(tensor)));
  }

 private:
  Call call_;
  Drop drop_;
  void* data_;
};

}  // namespace

extern "C" {

void sail_error_free(sail_error* error) {
  std::free(error->message);
  std::free(error);
}

// For callbacks: an error of kind `kSailOther`; `message` is copied.
sail_error* sail_error_new(const char* message) { return sail::make_error(message, kSailOther); }

sail_error* sail_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads,
                             at::Tensor* const* exp_avgs, at::Tensor* const* exp_avg_sqs,
                             at::Tensor* const* steps, size_t n, double lr, double beta1,
                             double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    // The kernel reads the number of this update, the first one being 1.
    at::_foreach_add_(list(steps, n), 1);
    at::_fused_adamw_(list(params, n), list(grads, n), list(exp_avgs, n), list(exp_avg_sqs, n),
                      /*max_exp_avg_sqs=*/{}, list(steps, n), lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, /*found_inf=*/{});
  });
}

// `out` receives a new tensor `[n]` of fp64, owned by the caller: the squared 2-norm of each tensor.
sail_error* sail_squared_norms(at::Tensor* const* tensors, size_t n, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> parts;
    // Which tensor each part is of.
    std::vector<int64_t> owners;
    int64_t owner = 0;
    for (const at::Tensor& tensor : list(tensors, n)) {
      // A CPU's kernel adds floats one after the other, and over millions of them loses three digits and more.
      if (tensor.is_cpu() && tensor.is_contiguous()) {
        for (const at::Tensor& part : tensor.view({-1}).split(1 << 16)) parts.push_back(part);
      } else {
        parts.push_back(tensor);
      }
      owners.resize(parts.size(), owner++);
    }
    auto squares = at::stack(at::_foreach_norm(parts, 2, at::kFloat)).to(at::kDouble).square();
    if (owners.size() > n) {
      auto sums = at::zeros({static_cast<int64_t>(n)}, squares.options());
      squares = sums.index_add_(0, at::tensor(owners), squares);
    }
    *out = new at::Tensor(squares);
  });
}

sail_error* sail_foreach_mul(at::Tensor* const* tensors, size_t n, const at::Tensor* factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, n), *factor);
  });
}

// Flash attention over segments, with autograd. `out` receives a new tensor of the shape of `q`, owned
// by the caller.
sail_error* sail_varlen_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v,
                                  const at::Tensor* cu_seqlens, int64_t longest, bool causal,
                                  at::Tensor** out) {
  return guarded([&] {
    auto result = at::_flash_attention_forward(*q, *k, *v, *cu_seqlens, *cu_seqlens, longest, longest,
                                               /*dropout_p=*/0.0, causal,
                                               /*return_debug_mask=*/false);
    *out = new at::Tensor(std::get<0>(result));
  });
}

// `sink` is dropped once: with the parameter, with the next one set on it, or at once when this fails.
sail_error* sail_set_grad_sink(const at::Tensor* param, const sail_grad_sink* sink) {
  auto hook = std::make_unique<sail::GradSink>(*sink);
  return guarded([&] { torch::autograd::impl::set_post_acc_grad_hooks(*param, std::move(hook)); });
}

// Calls `call(data, gradient)` each time that the gradient of a tensor which is no leaf is complete, before it goes on
// through what made the tensor, and `drop(data)` once when that goes, or at once when this fails.
sail_error* sail_on_gradient(const at::Tensor* tensor, Hook::Call call, Hook::Drop drop, void* data) {
  auto hook = std::make_shared<Hook>(call, drop, data);
  return guarded([&] { tensor->register_hook([hook](const at::Tensor& gradient) { (*hook)(gradient); }); });
}

// `out` receives the gradient, owned by the caller, or nullptr without one; the parameter has none afterwards.
sail_error* sail_take_grad(at::Tensor* param, at::Tensor** out) {
  return guarded([&] {
    at::Tensor& grad = param->mutable_grad();
    *out = grad.defined() ? new at::Tensor(std::move(grad)) : nullptr;
    grad.reset();
  });
}

}  // extern "C"
