#include "team.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace river {
namespace {

// A thread that waits spins for some microseconds, then lets others have the core; between calls
// it goes to sleep after some milliseconds. Spinning without end would let another process on the
// same core slow a step down a hundredfold.
constexpr int kSpins = 100;
constexpr int kYieldsBeforeSleep = 20000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Condition>
inline void wait_until(Condition condition) {
  for (int spins = 0; !condition();) {
    if (++spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace

Team::Team(int size) : size_(std::max(1, size)), arrived_(new Counter[static_cast<size_t>(size_)]) {
  try {
    for (int t = 1; t < size_; ++t) threads_.emplace_back([this, t] { work(t); });
  } catch (...) {
    stopping_ = true;
    job_.value.fetch_add(1);
    job_.value.notify_all();
    for (auto& thread : threads_) thread.join();
    throw;
  }
}

Team::~Team() {
  stopping_ = true;
  job_.value.fetch_add(1);
  job_.value.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::barrier(int thread) {
  const uint32_t now = arrived_[thread].value.load(std::memory_order_relaxed) + 1;
  arrived_[thread].value.store(now, std::memory_order_release);
  for (int t = 0; t < size_; ++t) {
    if (t == thread) continue;
    wait_until([&] {
      return static_cast<int32_t>(arrived_[t].value.load(std::memory_order_acquire) - now) >= 0;
    });
  }
}

void Team::start(void (*call)(void*, int), void* function) {
  call_ = call;
  function_ = function;
  if (size_ > 1) {
    job_.value.fetch_add(1, std::memory_order_release);
    job_.value.notify_all();
  }
  call(function, 0);
  barrier(0);
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (job_.value.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins)
        pause();
      else if (spins < kYieldsBeforeSleep)
        std::this_thread::yield();
      else
        job_.value.wait(seen, std::memory_order_acquire);
    }
    ++seen;
    if (stopping_) return;
    call_(function_, thread);
    barrier(thread);
  }
}

int usable_threads() {
  int threads = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) threads = CPU_COUNT(&set);
  // "max 100000" or "150000 100000": microseconds of processor time in a period
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (file >> quota >> period && quota != "max" && period > 0) {
    const double cores = std::stod(quota) / period;
    threads = std::min(threads, std::max(1, static_cast<int>(cores)));
  }
#endif
  return std::max(1, threads);
}

}  // namespace river
