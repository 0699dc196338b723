// Handles that ProcessGroupGloo.hpp passes on; their code is in libtorch.
#pragma once
namespace gloo {
namespace transport {
class Device;
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer() = 0;
};
}  // namespace transport
}  // namespace gloo
