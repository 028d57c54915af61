// What the core's tests share: checks that hold with NDEBUG too, random numbers, and memory with
// nothing behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_set.h"

namespace river::test {

// A test: its name says what holds.
#define TEST(name)                                                    \
  static void name();                                                 \
  static const ::river::test::Registered name##_is_known(#name, name); \
  static void name()

struct Registered {
  Registered(const char* name, void (*run)());
};

// Notes a failure, the first few of a test with their place, and goes on.
#define CHECK(condition) ::river::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression, Error)                                            \
  do {                                                                             \
    bool thrown = false;                                                           \
    try {                                                                          \
      expression;                                                                  \
    } catch (const Error&) {                                                       \
      thrown = true;                                                               \
    }                                                                              \
    ::river::test::check(thrown, #expression " throws " #Error, __FILE__, __LINE__); \
  } while (false)

void check(bool holds, const char* what, const char* file, int line);

// Runs `body` with every kernel set that this processor has; failures name it.
template <class Body>
void with_each_kernel_set(Body body);
void set_subject(const char* name);

// Memory whose end is the end of what may be read: a read beyond is a fault, in any build.
class Guarded {
 public:
  explicit Guarded(size_t bytes);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void* mapping_ = nullptr;
  size_t mapping_size_ = 0;
  uint8_t* data_ = nullptr;
};

class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}

  float real(float low, float high) {
    return low + (high - low) * static_cast<float>(generator_() >> 8) / 16777216.0f;
  }
  int whole(int low, int high) {  // both included
    return low + static_cast<int>(generator_() % static_cast<uint32_t>(high - low + 1));
  }
  std::vector<float> reals(size_t count, float low = -1.0f, float high = 1.0f) {
    std::vector<float> values(count);
    for (float& value : values) value = real(low, high);
    return values;
  }

 private:
  std::mt19937 generator_;
};

// ---- inline ---------------------------------------------------------------------------------

template <class Body>
void with_each_kernel_set(Body body) {
  const KernelSet* sets[kMaxKernelSets];
  const int count = available_kernel_sets(sets);
  for (int i = 0; i < count; ++i) {
    set_subject(sets[i]->name);
    body(*sets[i]);
  }
  set_subject("");
}

inline float rounded(float value) { return to_float(to_bf16(value)); }

}  // namespace river::test
