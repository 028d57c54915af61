// Threads and their barriers; for ThreadSanitizer above all.
#include "thread_pool.h"

#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "work_stealing.h"

namespace river::test {
namespace {

using namespace std::chrono_literals;

constexpr int kMostThreads = 4;

// Each thread writes a plain word, all read all of them, `rounds` times; counts what was wrong.
int hand_over(ThreadPool& pool, int threads, int rounds) {
  struct alignas(64) Place {
    int word = 0, wrong = 0;
  };
  Place places[kMostThreads];
  pool.run(threads, [&](int t) {
    for (int round = 1; round <= rounds; ++round) {
      places[t].word = round * 10 + t;
      pool.barrier(t);
      for (int other = 0; other < threads; ++other)
        places[t].wrong += places[other].word != round * 10 + other;
      pool.barrier(t);
    }
  });
  int wrong = 0;
  for (const Place& place : places) wrong += place.wrong;
  return wrong;
}

}  // namespace

TEST(what_is_written_before_a_barrier_is_seen_after) {
  for (int size = 1; size <= kMostThreads; ++size) {
    ThreadPool pool(size);
    CHECK(pool.size() == size);
    CHECK(hand_over(pool, size, 5000) == 0);  // two barriers each
    for (int run = 0; run < 300; ++run) CHECK(hand_over(pool, size, 1 + run % 3) == 0);
  }
}

TEST(runs_take_as_many_threads_as_they_are_told) {
  ThreadPool pool(kMostThreads);
  for (int run = 0; run < 400; ++run) {
    const int threads = 1 + run * 7 % kMostThreads;
    int calls[kMostThreads] = {};
    pool.run(threads, [&](int t) { ++calls[t]; });
    for (int t = 0; t < kMostThreads; ++t) CHECK(calls[t] == (t < threads));
    CHECK(hand_over(pool, threads, 3) == 0);
  }
  int calls[kMostThreads] = {};
  pool.run([&](int t) { ++calls[t]; });
  for (const int count : calls) CHECK(count == 1);
}

TEST(pools_end_at_any_time) {
  for (int round = 0; round < 60; ++round)
    for (int size = 1; size <= kMostThreads; ++size) {
      ThreadPool never_run(size);
      ThreadPool just_run(size);
      CHECK(hand_over(just_run, size, 1 + round % 3) == 0);
    }
  for (int round = 0; round < 3; ++round) {
    ThreadPool idle(kMostThreads);
    CHECK(hand_over(idle, 2, 2) == 0);
    std::this_thread::sleep_for(60ms);  // its threads are asleep
    if (round > 0) CHECK(hand_over(idle, kMostThreads, 2) == 0);
    if (round > 1) std::this_thread::sleep_for(60ms);
  }
  ThreadPool lower(0);  // takes one thread at least
  CHECK(lower.size() == 1);
  CHECK(hand_over(lower, 1, 2) == 0);
}

TEST(two_pools_work_at_once) {
  int wrong[2] = {};
  std::vector<std::thread> callers;
  for (int& count : wrong)
    callers.emplace_back([&count] {
      ThreadPool pool(2);
      for (int run = 0; run < 100; ++run) count += hand_over(pool, 2, 5);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong[0] == 0 && wrong[1] == 0);
}

TEST(stolen_work_is_done_once) {
  ThreadPool pool(kMostThreads);
  WorkStealing work(kMostThreads);
  for (int run = 0; run < 60; ++run) {
    const int threads = 1 + run % kMostThreads, grain = 1 + run % 7;
    constexpr int kCounts[] = {0, 1, 3, 64, 97, 5};
    std::vector<std::vector<int>> done;
    for (const int count : kCounts) done.emplace_back(static_cast<size_t>(count), 0);
    work.reset(threads);
    pool.run(threads, [&](int t) {
      int loop = 0;
      for (std::vector<int>& times : done) {
        work.parallel_for(static_cast<int>(times.size()), grain, t, loop++, [&](Range range) {
          for (int i = range.begin; i < range.end; ++i) ++times[static_cast<size_t>(i)];
        });
        pool.barrier(t);
      }
    });
    for (const std::vector<int>& times : done)
      for (const int count : times) CHECK(count == 1);
  }
}

TEST(fewer_threads_run_beside_a_busy_core) {
  AdaptiveThreads adaptive(3);
  const auto pass = [&](bool is_stalled) { adaptive.passed(1ms, is_stalled ? 600us : 0us); };
  CHECK(adaptive.threads() == 3);
  pass(true);
  CHECK(adaptive.threads() == 3);  // once is chance
  for (int i = 0; i < 1000 && adaptive.threads() == 3; ++i) pass(true);
  CHECK(adaptive.threads() == 2);
  for (int i = 0; i < 1000; ++i) {
    pass(true);
    CHECK(adaptive.threads() >= 1);
  }
  int all = 0;
  for (int i = 0; i < 1000; ++i) {
    pass(false);
    all += adaptive.threads() == 3;
  }
  CHECK(all > 700);
  CHECK(adaptive.threads() == 3);
  AdaptiveThreads single(1);
  for (int i = 0; i < 100; ++i) single.passed(1ms, 1ms);
  CHECK(single.threads() == 1);
}

}  // namespace river::test
