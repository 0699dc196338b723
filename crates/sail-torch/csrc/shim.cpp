// C entry points for what ATen has and tch's generated bindings leave out.
//
// Every function returns nullptr, or a message allocated with `malloc` that the caller frees with
// `sail_free`. No exception crosses the boundary.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

namespace {

char* copy_message(const char* what) {
  char* message = static_cast<char*>(std::malloc(std::strlen(what) + 1));
  if (message != nullptr) std::strcpy(message, what);
  return message;
}

template <typename F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return copy_message(e.what());
  } catch (...) {
    return copy_message("an exception that is not a std::exception");
  }
}

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace

extern "C" {

void sail_free(char* message) { std::free(message); }

char* sail_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads,
                       at::Tensor* const* exp_avgs, at::Tensor* const* exp_avg_sqs,
                       at::Tensor* const* steps, size_t n, double lr, double beta1, double beta2,
                       double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    // The kernel reads the number of this update, the first one being 1.
    at::_foreach_add_(list(steps, n), 1);
    at::_fused_adamw_(list(params, n), list(grads, n), list(exp_avgs, n), list(exp_avg_sqs, n),
                      /*max_exp_avg_sqs=*/{}, list(steps, n), lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, /*found_inf=*/{});
  });
}

// `out` receives a new 0-dimensional fp32 tensor, owned by the caller.
char* sail_global_norm(at::Tensor* const* tensors, size_t n, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(list(tensors, n), 2, at::kFloat);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms), 2));
  });
}

char* sail_foreach_mul(at::Tensor* const* tensors, size_t n, const at::Tensor* factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, n), *factor);
  });
}

// Flash attention over segments, with autograd. `out` receives a new tensor of the shape of `q`, owned
// by the caller.
char* sail_varlen_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v,
                            const at::Tensor* cu_seqlens, int64_t longest, bool causal,
                            at::Tensor** out) {
  return guarded([&] {
    auto result = at::_flash_attention_forward(*q, *k, *v, *cu_seqlens, *cu_seqlens, longest, longest,
                                               /*dropout_p=*/0.0, causal,
                                               /*return_debug_mask=*/false);
    *out = new at::Tensor(std::get<0>(result));
  });
}

}  // extern "C"
