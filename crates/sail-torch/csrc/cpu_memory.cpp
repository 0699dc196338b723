// What the CPU allocator gives out and takes back while it is watched.

#include "common.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <atomic>
#include <memory>

using sail::guarded;

namespace {

// Told of every allocation by the allocator, as PyTorch's profiler is. Atomic because the threads that work
// for the watched one inherit it.
class Meter final : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    const int64_t now = current_.fetch_add(bytes) + bytes;
    int64_t peak = peak_.load();
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
  }

  bool memoryProfilingEnabled() const override { return true; }

  int64_t current() const { return current_.load(); }
  int64_t peak() const { return peak_.load(); }

 private:
  std::atomic<int64_t> current_{0};
  std::atomic<int64_t> peak_{0};
};

}  // namespace

struct sail_cpu_memory {
  std::shared_ptr<Meter> meter;
  c10::DebugInfoGuard guard;

  explicit sail_cpu_memory(std::shared_ptr<Meter> watching)
      : meter(watching), guard(c10::DebugInfoKind::PROFILER_STATE, watching) {}
};

extern "C" {

// Watches this thread until `sail_cpu_memory_end`, which must be called on the same thread.
sail_error* sail_cpu_memory_begin(sail_cpu_memory** out) {
  return guarded([&] {
    TORCH_CHECK(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == nullptr,
                "this thread is being measured already");
    *out = new sail_cpu_memory(std::make_shared<Meter>());
  });
}

// Bytes given out since the beginning and not taken back, and the most that they were. Frees `watching`.
void sail_cpu_memory_end(sail_cpu_memory* watching, int64_t* current, int64_t* peak) {
  *current = watching->meter->current();
  *peak = watching->meter->peak();
  delete watching;
}

}  // extern "C"
