// A team of threads that run one function together and meet at barriers: the caller is thread 0,
// the others stay alive from call to call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace river {

class Team {
 public:
  explicit Team(int size);  // throws std::system_error where threads can't be had
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls function(thread) on every thread and returns when all have returned. One caller at a
  // time; the function must not throw.
  template <class Function>
  void run(Function&& function) {
    start([](void* f, int thread) { (*static_cast<std::remove_reference_t<Function>*>(f))(thread); },
          &function);
  }

  // Inside run: returns when all threads of the team are here. What one wrote before, all see after.
  void barrier(int thread);

 private:
  struct alignas(128) Counter {
    std::atomic<uint32_t> value{0};
  };

  void start(void (*call)(void*, int), void* function);
  void work(int thread);

  int size_;
  std::unique_ptr<Counter[]> arrived_;  // for each thread, the barriers that it has reached
  Counter job_;                         // counts the calls of run
  void (*call_)(void*, int) = nullptr;
  void* function_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

// Threads that this process may use: its affinity mask and its control group's limit.
int usable_threads();

}  // namespace river
