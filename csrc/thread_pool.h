// A pool of threads that run one function together and meet at barriers: the caller is thread 0,
// the others stay alive from call to call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace river {

class ThreadPool {
 public:
  explicit ThreadPool(int size);  // throws std::system_error where threads can't be had
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls function(thread) on the threads 0 ... threads-1 and returns when all have returned. One
  // caller at a time; the function must not throw.
  template <class Function>
  void run(int threads, Function&& function) {
    start(threads,
          [](void* f, int thread) { (*static_cast<std::remove_reference_t<Function>*>(f))(thread); },
          &function);
  }
  template <class Function>
  void run(Function&& function) {
    run(size_, function);
  }

  // Inside run: returns when all threads of the run are here. What one wrote before, all see after.
  void barrier(int thread);

  // How long a thread of the last run, the unluckiest, waited for others that had lost their core
  // to another process: the waits at barriers that are too long for uneven work.
  std::chrono::nanoseconds stalled() const;

 private:
  struct alignas(128) Counter {
    std::atomic<uint32_t> value{0};
  };
  struct alignas(128) Wait {
    std::chrono::nanoseconds stalled{0};
  };

  void start(int threads, void (*call)(void*, int), void* function);
  void work(int thread);
  uint32_t arrive(int thread);
  void stop();

  int size_;
  std::unique_ptr<Counter[]> jobs_;     // [thread] calls of run that it takes part in
  std::unique_ptr<Counter[]> arrived_;  // [thread] barriers that it has reached
  std::unique_ptr<Wait[]> waits_;       // [thread] in the last run
  int running_ = 0;                     // threads of the run that goes on
  uint32_t first_barrier_ = 0;          // barriers before it
  void (*call_)(void*, int) = nullptr;
  void* function_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

// How many threads a pass takes: all, but fewer while another process keeps one of their cores busy.
// Threads that share a core with it make the others wait for a time slice at every barrier; then
// fewer threads, which the system keeps on the cores that are free, are faster.
class AdaptiveThreads {
 public:
  explicit AdaptiveThreads(int size) : size_(size), threads_(size) {}

  int threads() const { return threads_; }
  // What a pass with threads() threads took, and how much of it was stalled.
  void passed(std::chrono::nanoseconds time, std::chrono::nanoseconds stalled);

 private:
  static constexpr int kFirstRest = 8, kLongestRest = 128;
  static constexpr int kTrialPasses = 8;

  int size_, threads_;
  int stalls_ = 0;         // passes that were; one alone is chance
  int smooth_ = 0;         // passes in a row with all threads that were not; enough end the matter
  int rest_ = kFirstRest;  // for how many passes a thread fewer is taken the next time
  int left_ = 0;           // of these passes
};

// Threads that this process may use: its affinity mask and its control group's limit.
int usable_threads();

}  // namespace river
