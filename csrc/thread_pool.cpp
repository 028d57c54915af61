#include "thread_pool.h"

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

// A wait longer than this is no matter of uneven work.
constexpr auto kStall = std::chrono::microseconds(500);

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int size)
    : size_(std::max(1, size)),
      jobs_(new Counter[static_cast<size_t>(size_)]),
      arrived_(new Counter[static_cast<size_t>(size_)]),
      waits_(new Wait[static_cast<size_t>(size_)]) {
  try {
    for (int t = 1; t < size_; ++t) threads_.emplace_back([this, t] { work(t); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  for (int t = 1; t < size_; ++t) {
    jobs_[t].value.fetch_add(1);
    jobs_[t].value.notify_all();
  }
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::barrier(int thread) {
  const uint32_t now = arrive(thread);
  for (int t = 0; t < running_; ++t) {
    const auto is_here = [&] {
      return static_cast<int32_t>(arrived_[t].value.load(std::memory_order_acquire) - now) >= 0;
    };
    for (int spins = 0; spins < kSpins && !is_here(); ++spins) pause();
    if (is_here()) continue;
    const auto start = Clock::now();
    while (!is_here()) std::this_thread::yield();
    const auto waited = Clock::now() - start;
    if (waited > kStall) waits_[thread].stalled += waited;
  }
}

uint32_t ThreadPool::arrive(int thread) {
  const uint32_t now = arrived_[thread].value.load(std::memory_order_relaxed) + 1;
  arrived_[thread].value.store(now, std::memory_order_release);
  return now;
}

std::chrono::nanoseconds ThreadPool::stalled() const {
  std::chrono::nanoseconds longest{0};
  for (int t = 0; t < running_; ++t) longest = std::max(longest, waits_[t].stalled);
  return longest;
}

void ThreadPool::start(int threads, void (*call)(void*, int), void* function) {
  call_ = call;
  function_ = function;
  running_ = std::clamp(threads, 1, size_);
  first_barrier_ = arrived_[0].value.load(std::memory_order_relaxed);
  for (int t = 0; t < running_; ++t) waits_[t].stalled = {};
  for (int t = 1; t < running_; ++t) {
    jobs_[t].value.fetch_add(1, std::memory_order_release);
    jobs_[t].value.notify_all();
  }
  call(function, 0);
  barrier(0);
}

void ThreadPool::work(int thread) {
  std::atomic<uint32_t>& job = jobs_[thread].value;
  for (uint32_t seen = 0;; ++seen) {
    int spins = 0;
    while (job.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins)
        pause();
      else if (spins < kYieldsBeforeSleep)
        std::this_thread::yield();
      else
        job.wait(seen, std::memory_order_acquire);
    }
    if (stopping_) return;
    // it may have missed some runs
    arrived_[thread].value.store(first_barrier_, std::memory_order_relaxed);
    call_(function_, thread);
    arrive(thread);  // only the caller waits here, and may begin the next run at once
  }
}

void AdaptiveThreads::passed(std::chrono::nanoseconds time, std::chrono::nanoseconds stalled) {
  const bool was_stalled = 4 * stalled > time;
  if (was_stalled && ++stalls_ > 1 && threads_ > 1) {
    --threads_;
    left_ = rest_;
    rest_ = std::min(2 * rest_, kLongestRest);
    smooth_ = 0;
  } else if (threads_ < size_) {
    if (--left_ <= 0) threads_ = size_;  // try again
  } else if (was_stalled) {
    smooth_ = 0;
  } else if (++smooth_ >= kTrialPasses) {
    stalls_ = 0;
    rest_ = kFirstRest;
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
