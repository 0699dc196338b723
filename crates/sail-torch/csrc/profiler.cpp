// libtorch's profiler: every operation of a thread and of the backward passes that it starts, and spans with names.

#include "common.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <memory>
#include <set>

using sail::guarded;
namespace profiler = torch::autograd::profiler;

extern "C" {

sail_error* sail_profiler_begin(bool cuda) {
  return guarded([&] {
    TORCH_CHECK(!profiler::profilerEnabled(), "this thread is profiled already");
    std::set<profiler::ActivityType> activities = {profiler::ActivityType::CPU};
    if (cuda) activities.insert(profiler::ActivityType::CUDA);
    const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
    profiler::prepareProfiler(config, activities);
    profiler::enableProfiler(config, activities);
  });
}

// On the thread of `sail_profiler_begin`. Writes the trace to `path`, or forgets it where that is nullptr.
sail_error* sail_profiler_end(const char* path) {
  return guarded([&] {
    const auto trace = profiler::disableProfiler();
    if (path != nullptr) trace->save(path);
  });
}

// A span that the profiler shows, to be ended on this thread; nullptr while nobody records. `name`, of `length` bytes,
// is copied.
at::RecordFunction* sail_span_begin(const char* name, size_t length) {
  // A name that a trace lacks is no reason to stop.
  try {
    auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
    if (!callbacks.has_value()) return nullptr;
    auto span = std::make_unique<at::RecordFunction>(std::move(*callbacks));
    span->before(std::string(name, length));
    return span.release();
  } catch (...) {
    return nullptr;
  }
}

void sail_span_end(at::RecordFunction* span) { delete span; }

}  // extern "C"
