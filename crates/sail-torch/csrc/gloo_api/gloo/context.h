// As much of Gloo's context as ProcessGroupGloo.hpp uses; its code is in libtorch.
#pragma once
#include <chrono>
namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
