#include "measurement.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "kernels/kernel_set.h"
#include "python_values.h"
#include "thread_pool.h"

namespace river {

double read_bandwidth(size_t bytes, int threads) {
  if (bytes < (1u << 20) || threads < 1) throw std::invalid_argument("read at least 1 MiB, with a thread");
  const KernelSet* sets[kMaxKernelSets];
  available_kernel_sets(sets);
  const KernelSet& kernels = *sets[0];
  nb::gil_scoped_release release;
  Buffer buffer(bytes + (16u << 10));
  ThreadPool pool(checked_threads(threads));
  std::atomic<uint32_t> sink{0};
  const size_t part = bytes / static_cast<size_t>(threads) / 256 * 256;
  pool.run([&](int t) { std::fill_n(buffer.data() + part * static_cast<size_t>(t), part, uint8_t{1}); });
  std::vector<double> rates;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) { sink += kernels.read(buffer.data() + part * static_cast<size_t>(t), part); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(static_cast<double>(part) * threads / seconds.count());
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

double barrier_seconds(int threads) {
  constexpr int kTimes = 20000;
  ThreadPool pool(checked_threads(threads));
  nb::gil_scoped_release release;
  const auto run = [&](int times) {
    pool.run([&](int t) {
      for (int i = 0; i < times; ++i) pool.barrier(t);
    });
  };
  run(kTimes / 10);  // the threads start
  const auto start = std::chrono::steady_clock::now();
  run(kTimes);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return seconds.count() / kTimes;
}

}  // namespace river
