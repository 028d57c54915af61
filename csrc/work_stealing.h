// Parallel loops with work stealing: each thread begins with its own part, in order, so that it reads
// memory in a row, and one that is done takes from the others. Threads are never equally fast where
// they share the memory's bandwidth, and at a barrier the slowest one counts.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace river {

struct Range {
  int begin, end;
};

// The part of `count` items that is a thread's own.
inline Range share(int count, int thread, int threads) {
  return {static_cast<int>(static_cast<int64_t>(count) * thread / threads),
          static_cast<int>(static_cast<int64_t>(count) * (thread + 1) / threads)};
}

class WorkStealing {
 public:
  explicit WorkStealing(int threads)
      : threads_(threads), taken_(new Counter[2 * static_cast<size_t>(threads)]) {}

  // Loops of `threads` threads follow. Before they start.
  void reset(int threads) {
    threads_ = threads;
    for (int i = 0; i < 2 * threads; ++i) taken_[i].value.store(0, std::memory_order_relaxed);
  }

  // Calls body(Range) for at most `grain` items at a time until all `count` are taken. All threads
  // call it with the same count, in the same order of calls, with a barrier between two calls; `loop`
  // counts a thread's calls since the reset.
  template <class Body>
  void parallel_for(int count, int grain, int thread, int loop, Body&& body) {
    Counter* now = taken_.get() + (loop % 2) * threads_;
    Counter* next = taken_.get() + ((loop + 1) % 2) * threads_;  // nobody uses it in this loop
    next[thread].value.store(0, std::memory_order_relaxed);
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const Range own = share(count, owner, threads_);
      std::atomic<int>& taken = now[owner].value;
      while (own.begin + taken.load(std::memory_order_relaxed) < own.end) {
        const int begin = own.begin + taken.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= own.end) break;
        body(Range{begin, begin + grain < own.end ? begin + grain : own.end});
      }
    }
  }

 private:
  struct alignas(128) Counter {
    std::atomic<int> value{0};
  };

  int threads_;
  std::unique_ptr<Counter[]> taken_;  // [loop % 2][thread]
};

}  // namespace river
