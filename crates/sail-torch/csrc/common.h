// What every C entry point of this library shares: how errors cross the boundary.
//
// Every function returns nullptr, or a `sail_error` that the caller frees with `sail_error_free`. No
// exception crosses the boundary.

#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

// The kinds that `src/error.rs` tells apart.
enum sail_error_kind : int32_t {
  kSailOther = 0,
  kSailTimeout = 1,
  kSailNetwork = 2,
};

struct sail_error {
  int32_t kind;
  char* message;
};

namespace sail {

inline sail_error* make_error(const char* what, int32_t kind) {
  auto* error = static_cast<sail_error*>(std::malloc(sizeof(sail_error)));
  char* message = static_cast<char*>(std::malloc(std::strlen(what) + 1));
  if (error == nullptr || message == nullptr) std::abort();
  std::strcpy(message, what);
  *error = {kind, message};
  return error;
}

// Throws what a callback has reported, and frees it; nothing where that is nullptr.
inline void rethrow(sail_error* error) {
  if (error == nullptr) return;
  std::string message = error->message;
  std::free(error->message);
  std::free(error);
  throw std::runtime_error(message);
}

inline bool mentions(const char* text, const char* part) { return std::strstr(text, part) != nullptr; }

// c10d and Gloo throw one class for several faults; their messages say which.
inline int32_t network_kind(const char* what) {
  for (const char* part : {"imed out", "timeout", "Timeout"}) {
    if (mentions(what, part)) return kSailTimeout;
  }
  for (const char* part : {"onnection", "address already in use", "Broken pipe", "unreachable", "resolve"}) {
    if (mentions(what, part)) return kSailNetwork;
  }
  return kSailOther;
}

// For calls in which no other process takes part.
inline int32_t own_kind(const char*) { return kSailOther; }

template <typename F>
sail_error* guarded(F&& body, int32_t (*kind_of)(const char*) = own_kind) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return make_error(e.what_without_backtrace(), kind_of(e.what_without_backtrace()));
  } catch (const std::exception& e) {
    return make_error(e.what(), kind_of(e.what()));
  } catch (...) {
    return make_error("an exception that is not a std::exception", kSailOther);
  }
}

inline std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

}  // namespace sail
