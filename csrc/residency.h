// Which backbone layers are in memory: the first ones stay, the others come back from a file, one
// at a time, when a row of a pass needs them.
#pragma once

#include <atomic>
#include <chrono>
#include <string>

#include "buffer.h"
#include "model.h"
#include "weight_file.h"

namespace river {

class Residency {
 public:
  // The model's first `resident` layers are in memory.
  Residency(Model& model, int resident) : model_(model), resident_(resident) {}

  // Where evicted layers come back from: a file of the model's packed weights. Throws
  // std::runtime_error where it can't be opened or is none.
  void open(const std::string& path);
  // The first `layers` stay from now on. Throws std::invalid_argument, std::runtime_error and
  // std::bad_alloc; some layers fewer than before may stay then.
  void keep(int layers);

  // Bytes [begin, end) of the packed weights, from the file. Throws std::runtime_error.
  void copy(size_t begin, size_t end, uint8_t* out) const;

  int resident() const { return resident_; }
  // Evicted layers that came back, the bytes that were read for it, and how long passes waited.
  long misses() const { return misses_; }
  size_t bytes_read() const { return bytes_read_; }
  std::chrono::nanoseconds waited() const { return waited_; }

  // ---- in a pass ----

  // Before it: takes memory for one layer, if one may come back. Throws std::bad_alloc, and
  // std::runtime_error where there is no file.
  void begin();
  // One thread gives the layer its place, then all read it together, with a barrier in between.
  void stage(int layer) noexcept;
  void read(int thread, int threads) noexcept;
  bool has_failed() const { return state_ != WeightFile::State::kWhole; }
  void add_wait(std::chrono::nanoseconds time) { waited_ += time; }
  // After it: throws std::runtime_error where a layer did not come back.
  void end();

 private:
  static constexpr int kIdlePasses = 64;  // without a miss, after which its memory is given back

  [[noreturn]] void refuse(WeightFile::State state) const;

  Model& model_;
  int resident_;
  WeightFile file_;
  Buffer staging_;   // of the layer that is back
  int staged_ = -1;  // which one that is
  int idle_ = 0;     // passes without a miss
  bool missed_ = false;  // in this pass
  std::atomic<WeightFile::State> state_{WeightFile::State::kWhole};
  long misses_ = 0;
  size_t bytes_read_ = 0;
  std::chrono::nanoseconds waited_{0};
};

}  // namespace river
