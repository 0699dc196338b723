// Norms, gates, rotations and parallel linear maps as single operations, with autograd.
//
// On the CPU in fp32 each passes once over its rows; elsewhere norms, gates and rotations are libtorch's operators.

#include "common.h"
#include "sink.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <cmath>

using sail::guarded;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::tensor_list;

// Functions whose loops are compiled for the vectors of several processors, of which the best is taken at start. Named by
// features: a name of a processor, `arch=`, is for that one alone and for none that came after it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAIL_KERNEL __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define SAIL_KERNEL
#endif
#define SAIL_INLINE inline __attribute__((always_inline))

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 14;
// Partial sums of a row, so that its sum is one of vectors.
constexpr int64_t kLanes = 16;

bool has_kernels(const at::Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat; }

void check_no_graph(const char* name) {
  TORCH_CHECK(!at::GradMode::is_enabled(), name, " has no second derivative");
}

// `[.., d]` as `[rows, d]` whose rows are dense.
at::Tensor as_rows(const at::Tensor& x) {
  auto rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

int64_t rows_of_piece(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)); }

// Calls `body(begin, end)` for pieces of `0..rows` on libtorch's threads.
template <typename F>
void each_piece(int64_t rows, int64_t width, const F& body) {
  at::parallel_for(0, rows, rows_of_piece(width), body);
}

// The same in pieces that threads take as they come to it: one that wakes up late takes fewer.
template <typename F>
void each_piece_in_turn(int64_t rows, int64_t width, const F& body) {
  const int64_t some = rows_of_piece(width), pieces = (rows + some - 1) / some;
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(pieces, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      body(piece * some, std::min(rows, (piece + 1) * some));
    }
  });
}

// ---- Normalisation ----

SAIL_INLINE float sum_of(const float (&lanes)[kLanes]) {
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

SAIL_KERNEL
void rms_norm_rows(const float* __restrict x, const float* __restrict w, float* __restrict y,
                   float* __restrict scales, int64_t rows, int64_t d, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += d, y += d) {
    float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[k + j] * x[k + j];
    }
    for (; k < d; ++k) lanes[0] += x[k] * x[k];
    const float scale = 1.0f / std::sqrt(sum_of(lanes) / static_cast<float>(d) + eps);
    for (k = 0; k < d; ++k) y[k] = x[k] * scale * w[k];
    scales[r] = scale;
  }
}

// d x = scale (g w - x scale^2 mean(g w x))
SAIL_KERNEL
void rms_norm_grad_x(const float* __restrict g, const float* __restrict x, const float* __restrict w,
                     const float* __restrict scales, float* __restrict grad_x, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, g += d, x += d, grad_x += d) {
    float lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += g[k + j] * w[k + j] * x[k + j];
    }
    for (; k < d; ++k) lanes[0] += g[k] * w[k] * x[k];
    const float scale = scales[r];
    const float along = sum_of(lanes) / static_cast<float>(d) * scale * scale;
    for (k = 0; k < d; ++k) grad_x[k] = scale * (g[k] * w[k] - x[k] * along);
  }
}

// Adds to `grad_w`.
SAIL_KERNEL
void rms_norm_grad_w(const float* __restrict g, const float* __restrict x, const float* __restrict scales,
                     float* __restrict grad_w, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, g += d, x += d) {
    const float scale = scales[r];
    for (int64_t k = 0; k < d; ++k) grad_w[k] += g[k] * x[k] * scale;
  }
}

class RmsNorm : public Function<RmsNorm> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, double eps) {
    const auto x_c = x.contiguous();
    const auto w = weight.contiguous();
    const int64_t d = w.numel(), rows = x_c.numel() / d;
    auto y = at::empty_like(x_c);
    auto scales = at::empty({rows}, x_c.options());
    const auto* x_p = x_c.const_data_ptr<float>();
    auto* y_p = y.mutable_data_ptr<float>();
    auto* scales_p = scales.mutable_data_ptr<float>();
    each_piece(rows, d, [&](int64_t begin, int64_t end) {
      rms_norm_rows(x_p + begin * d, w.const_data_ptr<float>(), y_p + begin * d, scales_p + begin, end - begin, d,
                    static_cast<float>(eps));
    });
    context->save_for_backward({x_c, w, scales});
    return y;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    check_no_graph("rms_norm");
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &w = saved[1], &scales = saved[2];
    const auto g = grads[0].contiguous();
    const int64_t d = w.numel(), rows = x.numel() / d;
    const auto *g_p = g.const_data_ptr<float>(), *x_p = x.const_data_ptr<float>();
    const auto* scales_p = scales.const_data_ptr<float>();
    at::Tensor grad_x, grad_w;
    if (context->needs_input_grad(0)) {
      grad_x = at::empty_like(x);
      auto* out = grad_x.mutable_data_ptr<float>();
      each_piece(rows, d, [&](int64_t begin, int64_t end) {
        rms_norm_grad_x(g_p + begin * d, x_p + begin * d, w.const_data_ptr<float>(), scales_p + begin,
                        out + begin * d, end - begin, d);
      });
    }
    if (context->needs_input_grad(1)) {
      // A sum for each of as many rows, whatever the number of threads, so that it decides no rounding.
      const int64_t some = std::max<int64_t>(1, 4 * kGrain / d), pieces = (rows + some - 1) / some;
      auto sums = at::zeros({std::max<int64_t>(pieces, 1), d}, x.options());
      auto* out = sums.mutable_data_ptr<float>();
      at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
          const int64_t row = piece * some;
          rms_norm_grad_w(g_p + row * d, x_p + row * d, scales_p + row, out + piece * d,
                          std::min(some, rows - row), d);
        }
      });
      grad_w = pieces > 1 ? sums.sum(0) : sums[0];
    }
    return {grad_x, grad_w, {}};
  }
};

// The mean and the division in fp32. In 16 bits the result is rounded before it is multiplied by the weight, as in Hugging
// Face's code, but for the kernel that libtorch has on CUDA, which rounds once.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  if (has_kernels(x) && has_kernels(weight)) return RmsNorm::apply(x, weight, eps);
  if (x.is_cuda() && x.scalar_type() == weight.scalar_type()) {
    return at::rms_norm(x, weight.sizes(), weight, eps);
  }
  return at::rms_norm(x.to(at::kFloat), weight.sizes(), {}, eps).to(x.scalar_type()) * weight;
}

// ---- Gates ----

// e^x to 2 units in the last place: 2^n times a polynomial of the rest, with the coefficients of Cephes' `expf`. Below
// -87 it is e^-87, above 88.4 infinity. Without branches and calls, so that loops over it are vectors.
SAIL_INLINE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the last bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

SAIL_KERNEL
void swiglu_row(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t n) {
  for (int64_t k = 0; k < n; ++k) y[k] = gate[k] / (1.0f + exp_of(-gate[k])) * up[k];
}

SAIL_KERNEL
void swiglu_grad_row(const float* __restrict g, const float* __restrict gate, const float* __restrict up,
                     float* __restrict grad_gate, float* __restrict grad_up, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float s = 1.0f / (1.0f + exp_of(-gate[k]));
    const float silu = gate[k] * s;
    grad_up[k] = g[k] * silu;
    grad_gate[k] = g[k] * up[k] * (s + silu * (1.0f - s));
  }
}

class SwiGlu : public Function<SwiGlu> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate, const at::Tensor& up) {
    auto y = at::empty(gate.sizes(), gate.options());
    if (has_kernels(gate)) {
      const auto gate_r = as_rows(gate), up_r = as_rows(up);
      const int64_t n = gate_r.size(1), gate_s = gate_r.stride(0), up_s = up_r.stride(0);
      const auto *gate_p = gate_r.const_data_ptr<float>(), *up_p = up_r.const_data_ptr<float>();
      auto* y_p = y.mutable_data_ptr<float>();
      each_piece(gate_r.size(0), n, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) swiglu_row(gate_p + r * gate_s, up_p + r * up_s, y_p + r * n, n);
      });
    } else {
      at::silu_out(y, gate);
      y.mul_(up);
    }
    context->save_for_backward({gate, up});
    return y;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    check_no_graph("swiglu");
    const auto saved = context->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1];
    if (!has_kernels(gate)) return {at::silu_backward(grads[0] * up, gate), at::silu(gate).mul_(grads[0])};
    auto grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
    const auto g_r = as_rows(grads[0]), gate_r = as_rows(gate), up_r = as_rows(up);
    const int64_t n = g_r.size(1), g_s = g_r.stride(0), gate_s = gate_r.stride(0), up_s = up_r.stride(0);
    const auto *g_p = g_r.const_data_ptr<float>(), *gate_p = gate_r.const_data_ptr<float>();
    const auto* up_p = up_r.const_data_ptr<float>();
    auto *grad_gate_p = grad_gate.mutable_data_ptr<float>(), *grad_up_p = grad_up.mutable_data_ptr<float>();
    each_piece(g_r.size(0), n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        swiglu_grad_row(g_p + r * g_s, gate_p + r * gate_s, up_p + r * up_s, grad_gate_p + r * n,
                        grad_up_p + r * n, n);
      }
    });
    return {grad_gate, grad_up};
  }
};

// ---- Rotations ----

// Turns by the angles, or with `sign` -1 back.
SAIL_KERNEL
void rotate_head(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
                 float* __restrict y, int64_t f) {
  for (int64_t k = 0; k < f; ++k) {
    const float turned = sin[k] * sign;
    y[k] = x[k] * cos[k] - x[k + f] * turned;
    y[k + f] = x[k + f] * cos[k] + x[k] * turned;
  }
}

at::Tensor rotate_heads(const at::Tensor& heads, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  if (!has_kernels(heads)) {
    const auto halves = heads.chunk(2, -1);
    const auto turned = back ? -sin : sin;
    return at::cat({halves[0] * cos - halves[1] * turned, halves[1] * cos + halves[0] * turned}, -1);
  }
  const auto x = heads.stride(2) == 1 ? heads : heads.contiguous();
  const int64_t n = x.size(1), h = x.size(2), f = h / 2, row_s = x.stride(0), head_s = x.stride(1);
  auto y = at::empty(x.sizes(), x.options());
  const auto *x_p = x.const_data_ptr<float>(), *cos_p = cos.const_data_ptr<float>();
  const auto* sin_p = sin.const_data_ptr<float>();
  auto* y_p = y.mutable_data_ptr<float>();
  each_piece(x.size(0), n * h, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        rotate_head(x_p + t * row_s + i * head_s, cos_p + t * f, sin_p + t * f, back ? -1.0f : 1.0f,
                    y_p + (t * n + i) * h, f);
      }
    }
  });
  return y;
}

class Rotate : public Function<Rotate> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    const auto cos_c = cos.contiguous(), sin_c = sin.contiguous();
    context->save_for_backward({cos_c, sin_c});
    return rotate_heads(x, cos_c, sin_c, /*back=*/false);
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    check_no_graph("rotate");
    const auto saved = context->get_saved_variables();
    return {rotate_heads(grads[0], saved[0], saved[1], /*back=*/true), {}, {}};
  }
};

// ---- Parallel linear maps ----

// g^T x, the gradient of a weight: put into its place where it has one, and undefined here.
at::Tensor grad_of(const at::Tensor& weight, const at::Tensor& g, const at::Tensor& x) {
  auto* sink = sail::GradSink::of(weight);
  const auto [place, holds] = sink == nullptr ? std::pair<at::Tensor, bool>() : sink->place();
  if (!place.defined()) return at::mm(g.t(), x);
  auto sum = place;
  if (holds) {
    sum.addmm_(g.t(), x);
  } else {
    at::mm_out(sum, g.t(), x);
  }
  sink->placed();
  return {};
}

// As many neighbours as a line of the cache has, wherever they begin.
using Line = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SAIL_INLINE const Line& line_at(const float* p) { return *reinterpret_cast<const Line*>(p); }

// Products of one row with rows of a matrix. Memory is what takes the time: the matrix is read from its beginning to its end,
// 2 kB ahead of the sums, in four of which no product waits for the one before it.
SAIL_KERNEL
void times_row(const float* __restrict x, const float* __restrict w, float* __restrict y, int64_t rows, int64_t d) {
  constexpr int64_t kAhead = 512, kStep = 4 * kLanes;
  for (int64_t r = 0; r < rows; ++r, w += d) {
    Line sums[4] = {};
    int64_t k = 0;
    for (; k + kStep <= d; k += kStep) {
      for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(w + k + i * kLanes + kAhead);
      for (int64_t i = 0; i < 4; ++i) sums[i] += line_at(x + k + i * kLanes) * line_at(w + k + i * kLanes);
    }
    for (; k + kLanes <= d; k += kLanes) sums[0] += line_at(x + k) * line_at(w + k);
    const Line both = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0;
    for (int64_t j = 0; j < kLanes; ++j) sum += both[j];
    for (; k < d; ++k) sum += x[k] * w[k];
    y[r] = sum;
  }
}

// Whether the maps are those of one row without a graph, the step of a generation: then all of them are one pass over the
// weights, shared among the threads once.
bool is_one_row(at::TensorList tensors, int64_t count) {
  const auto is_plain = [](const at::Tensor& x) {
    return has_kernels(x) && x.is_contiguous() && !(at::GradMode::is_enabled() && x.requires_grad());
  };
  const auto& x = tensors[0];
  return count > 0 && x.numel() > 0 && x.numel() == x.size(-1) &&
         std::all_of(tensors.begin(), tensors.end(), is_plain);
}

tensor_list one_row(at::TensorList tensors, int64_t count) {
  const auto& x = tensors[0];
  const int64_t d = x.numel();
  tensor_list results;
  // Where the outputs of each map begin among those of all.
  std::vector<int64_t> begins = {0};
  std::vector<float*> outputs;
  for (int64_t i = 1; i <= count; ++i) {
    auto sizes = x.sizes().vec();
    sizes.back() = tensors[i].size(0);
    results.push_back(at::empty(sizes, x.options()));
    outputs.push_back(results.back().mutable_data_ptr<float>());
    begins.push_back(begins.back() + tensors[i].size(0));
  }
  const auto* x_p = x.const_data_ptr<float>();
  each_piece_in_turn(begins.back(), d, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = std::max(begin, begins[i]) - begins[i], to = std::min(end, begins[i + 1]) - begins[i];
      if (from >= to) continue;
      times_row(x_p, tensors[1 + i].const_data_ptr<float>() + from * d, outputs[i] + from, to - from, d);
    }
  });
  if (static_cast<int64_t>(tensors.size()) > 1 + count) {
    for (int64_t i = 0; i < count; ++i) results[i].add_(tensors[1 + count + i]);
  }
  return results;
}

// `tensors` are the rows, `count` weights, and as many biases or none. With `grad_rows` only those of the first get a
// gradient, the others zero.
class Linears : public Function<Linears> {
 public:
  static tensor_list forward(AutogradContext* context, at::TensorList tensors, int64_t count,
                             const std::optional<at::Tensor>& grad_rows) {
    const auto& x = tensors[0];
    const bool has_biases = static_cast<int64_t>(tensors.size()) > 1 + count;
    tensor_list results;
    for (int64_t i = 1; i <= count; ++i) {
      results.push_back(has_biases ? at::linear(x, tensors[i], tensors[count + i]) : at::linear(x, tensors[i]));
    }
    // Rows that no weight's gradient needs are not kept.
    tensor_list kept = tensors.slice(0, 1 + count).vec();
    const auto is_trained = [](const at::Tensor& weight) { return weight.requires_grad(); };
    if (std::none_of(kept.begin() + 1, kept.end(), is_trained)) kept[0] = at::Tensor();
    context->save_for_backward(std::move(kept));
    context->saved_data["has_biases"] = has_biases;
    context->saved_data["sizes"] = x.sizes();
    context->saved_data["grad_rows"] = grad_rows;
    context->set_materialize_grads(false);
    return results;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    check_no_graph("linears");
    const auto saved = context->get_saved_variables();
    const size_t count = saved.size() - 1;
    const bool has_biases = context->saved_data["has_biases"].toBool();
    const auto x_r = saved[0].defined() ? saved[0].reshape({-1, saved[0].size(-1)}) : at::Tensor();
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const auto grad_rows = context->saved_data["grad_rows"].toOptional<at::Tensor>();
    tensor_list out(1 + (has_biases ? 2 : 1) * count);
    for (size_t i = 0; i < count; ++i) {
      if (!grads[i].defined()) continue;
      const auto g = grads[i].reshape({-1, grads[i].size(-1)});
      const auto& weight = saved[1 + i];
      if (context->needs_input_grad(0)) {
        const auto g_r = grad_rows ? g.index_select(0, *grad_rows) : g;
        // Added up by the product itself.
        if (out[0].defined()) {
          out[0].addmm_(g_r, weight);
        } else {
          out[0] = at::mm(g_r, weight);
        }
      }
      if (context->needs_input_grad(1 + i)) out[1 + i] = grad_of(weight, g, x_r);
      if (has_biases && context->needs_input_grad(1 + count + i)) out[1 + count + i] = g.sum(0);
    }
    if (out[0].defined() && grad_rows) {
      out[0] = at::zeros(sizes, out[0].options()).index_copy_(0, *grad_rows, out[0]);
    } else if (out[0].defined()) {
      out[0] = out[0].view(sizes);
    }
    // Of what is no tensor, and of the rows' numbers.
    out.resize(out.size() + 2);
    return out;
  }
};

}  // namespace

extern "C" {

// Each `out` receives a new tensor, owned by the caller.

sail_error* sail_rms_norm(const at::Tensor* x, const at::Tensor* weight, double eps, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(rms_norm(*x, *weight, eps)); });
}

sail_error* sail_swiglu(const at::Tensor* gate, const at::Tensor* up, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(SwiGlu::apply(*gate, *up)); });
}

sail_error* sail_rotate(const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(Rotate::apply(*x, *cos, *sin)); });
}

// `tensors` are the rows, `count` weights, and as many biases or none; `grad_rows` is nullptr for all; `out` has room for
// `count`.
sail_error* sail_linears(at::Tensor* const* tensors, size_t n, size_t count, const at::Tensor* grad_rows,
                         at::Tensor** out) {
  return guarded([&] {
    const auto all = sail::list(tensors, n);
    const auto rows = grad_rows == nullptr ? std::nullopt : std::optional<at::Tensor>(*grad_rows);
    const auto maps = static_cast<int64_t>(count);
    const auto results = is_one_row(all, maps) ? one_row(all, maps) : Linears::apply(at::TensorList(all), maps, rows);
    for (size_t i = 0; i < count; ++i) out[i] = new at::Tensor(results[i]);
  });
}

}  // extern "C"
