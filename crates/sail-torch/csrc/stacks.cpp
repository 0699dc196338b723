// The stacks of this process's other threads: each is interrupted by a signal and unwinds itself.

#include "common.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

using sail::guarded;

namespace {

constexpr int kMostFrames = 256;
// An unwinder that is not done by then never will be.
constexpr auto kUnwinding = std::chrono::seconds(2);

// Who is asked: a thread's number, or one of these. A thread that finds its number takes it out, so that one that
// answers late, when nobody or somebody else is asked, writes nothing.
constexpr pid_t kNobody = 0;
constexpr pid_t kAnswering = -1;
constexpr pid_t kAnswered = -2;
std::atomic<pid_t> asked{kNobody};
static_assert(std::atomic<pid_t>::is_always_lock_free, "a signal handler must not wait for a lock");

// Written by the thread that has answered last.
void* found[kMostFrames];
int found_count = 0;
void* interrupted_at = nullptr;

pid_t own_number() { return static_cast<pid_t>(syscall(SYS_gettid)); }

void* where([[maybe_unused]] const void* context) {
#if defined(__x86_64__)
  const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
  return reinterpret_cast<void*>(registers[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
  return nullptr;
#endif
}

// Only what may be done wherever the thread was interrupted: no memory is taken, no lock that it may hold.
void answer(int, siginfo_t*, void* context) {
  const int code_of_interrupted = errno;
  pid_t expected = own_number();
  if (asked.compare_exchange_strong(expected, kAnswering)) {
    interrupted_at = where(context);
    found_count = backtrace(found, kMostFrames);
    asked.store(kAnswered);
  }
  errno = code_of_interrupted;
}

// Waits until the thread `asked` has answered, and says whether it has.
bool answered_within(std::chrono::nanoseconds patience) {
  const auto until = std::chrono::steady_clock::now() + patience;
  while (asked.load() != kAnswered) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

}  // namespace

extern "C" {

// Makes `out`, a signal that nobody handles, the one that asks a thread for its stack. To be called once.
sail_error* sail_stacks_begin(int* out) {
  return guarded([&] {
    // The first call loads the unwinder, which a signal handler must not.
    void* frame = nullptr;
    backtrace(&frame, 1);
    struct sigaction action = {};
    action.sa_sigaction = answer;
    // Not on the alternate stack that Rust's threads have: it is hardly larger than what the kernel puts there, and
    // the unwinder needs more. A thread has room on its own stack.
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&action.sa_mask);
    // A real-time one, from the end: libraries that take one begin at the other.
    for (int signal = SIGRTMAX - 1; signal >= SIGRTMIN; --signal) {
      struct sigaction before = {};
      if (sigaction(signal, nullptr, &before) != 0 || before.sa_handler != SIG_DFL) continue;
      TORCH_CHECK(sigaction(signal, &action, nullptr) == 0, "sigaction: ", std::strerror(errno));
      *out = signal;
      return;
    }
    TORCH_CHECK(false, "every real-time signal has a handler");
  });
}

// Asks thread `tid` by `signal` and gives at most `room` addresses, innermost first: the one that it was interrupted
// at, then the ones that calls return to. `count` is 0 where it does not answer in time or is gone. One call at a time.
sail_error* sail_stack_of(int signal, int tid, int64_t patience_ms, void** addresses, size_t room, size_t* count) {
  return guarded([&] {
    *count = 0;
    TORCH_CHECK(asked.load() != kAnswering, "a thread has begun to unwind its stack and never came to an end");
    asked.store(tid);
    if (syscall(SYS_tgkill, getpid(), tid, signal) != 0) {
      const int code = errno;
      asked.store(kNobody);
      // Gone, or as many signals wait already as may.
      TORCH_CHECK(code == ESRCH || code == EAGAIN, "tgkill: ", std::strerror(code));
      return;
    }
    if (!answered_within(std::chrono::milliseconds(patience_ms))) {
      pid_t expected = tid;
      if (asked.compare_exchange_strong(expected, kNobody)) return;
      // It has just begun.
      TORCH_CHECK(answered_within(kUnwinding), "thread ", tid, " does not come to the end of its stack");
    }
    // The handler itself comes first.
    int first = 0;
    while (first < found_count && found[first] != interrupted_at) ++first;
    if (first == found_count) first = 0;
    while (first < found_count && *count < room) addresses[(*count)++] = found[first++];
    asked.store(kNobody);
  });
}

// The readable form of a C++ name, for `free`; nullptr where it is none.
char* sail_demangled(const char* name) {
  int status = 0;
  return abi::__cxa_demangle(name, nullptr, nullptr, &status);
}

void sail_text_free(char* text) { std::free(text); }

// The file that the code at an address is from, which lives as long as it is loaded; nullptr where it is from none.
const char* sail_file_of(const void* address) {
  Dl_info info = {};
  return dladdr(address, &info) == 0 ? nullptr : info.dli_fname;
}

}  // extern "C"
