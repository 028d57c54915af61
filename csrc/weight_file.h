// A file with a model's packed weights, from which evicted layers come back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace river {

// It is read, never mapped: the system ends a process that touches a mapped page behind the end of
// a file that was cut short.
class WeightFile {
 public:
  enum class State { kWhole, kChanged, kUnreadable };

  WeightFile() = default;
  // Throws std::runtime_error where the file can't be opened or hasn't so many bytes.
  WeightFile(const std::string& path, size_t bytes);
  ~WeightFile();
  WeightFile(WeightFile&& other) noexcept;
  WeightFile& operator=(WeightFile&& other) noexcept;

  bool is_open() const { return descriptor_ >= 0; }
  // Bytes [begin, end) of the file. It is kChanged where its size or its time are others than when
  // it was opened; that a name is removed changes nothing.
  State read(size_t begin, size_t end, uint8_t* out) const noexcept;
  // Has the system read them ahead, where it can.
  void fetch(size_t begin, size_t end) const noexcept;

 private:
  bool is_unchanged() const noexcept;

  int descriptor_ = -1;
  size_t bytes_ = 0;
  int64_t seconds_ = 0, nanoseconds_ = 0;  // of its last change
};

}  // namespace river
