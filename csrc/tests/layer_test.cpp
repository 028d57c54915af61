// What a layer computes beside products and attention, against double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"

namespace river::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Floats at the end of what may be read.
class Floats {
 public:
  explicit Floats(const std::vector<float>& values)
      : size_(values.size()), memory_(values.size() * sizeof(float)) {
    std::copy(values.begin(), values.end(), data());
  }
  float* data() const { return memory_.as<float>(); }
  float operator[](int index) const { return data()[index]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  Guarded memory_;
};

bool near(double actual, double expected, double tolerance) {
  return std::fabs(actual - expected) <= tolerance * std::max(1.0, std::fabs(expected));
}

double activated(double gate, bool gelu) {
  if (!gelu) return gate / (1 + std::exp(-gate));
  constexpr double kPi = 3.14159265358979323846;
  return 0.5 * gate * (1 + std::tanh(std::sqrt(2 / kPi) * (gate + 0.044715 * gate * gate * gate)));
}

int largest_at(const KernelSet& kernels, const std::vector<float>& values, float* largest) {
  const Floats copy(values);
  return kernels.argmax(copy.data(), static_cast<int>(values.size()), largest);
}

}  // namespace

TEST(norms_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(9);
    for (const int count : {16, 48, 64, 576})
      for (const float size : {0.0f, 1e-4f, 1.0f, 1e4f})
        for (const bool weighted : {true, false}) {
          const auto length = static_cast<size_t>(count);
          const Floats x(random.reals(length, -size, size)), weight(random.reals(length));
          const Floats out(std::vector<float>(length, 0.0f));
          const float* weights = weighted ? weight.data() : nullptr;
          kernels.rms_norm(x.data(), weights, count, 1e-5f, out.data());
          double squares = 0;
          for (int i = 0; i < count; ++i) squares += static_cast<double>(x[i]) * x[i];
          const double factor = 1 / std::sqrt(squares / count + 1e-5);
          for (int i = 0; i < count; ++i)
            CHECK(near(out[i], x[i] * factor * (weighted ? weight[i] : 1.0), 3e-6));
          kernels.rms_norm(x.data(), weights, count, 1e-5f, x.data());  // in place
          CHECK(std::memcmp(x.data(), out.data(), length * sizeof(float)) == 0);
        }
  });
}

TEST(sums_and_gates_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(10);
    for (const int blocks : {1, 2, 5}) {
      const auto length = static_cast<size_t>(blocks) * kLanes;
      const Floats y(random.reals(length)), bias(random.reals(length));
      for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(bias.data())}) {
        const std::vector<float> before = random.reals(length);
        const Floats x(before);
        kernels.add(x.data(), y.data(), added, static_cast<int>(length));
        for (int i = 0; i < static_cast<int>(length); ++i)
          CHECK(near(x[i], double{before[i]} + y[i] + (added ? added[i] : 0), 1e-6));
      }
      for (const bool gelu : {false, true})
        for (const float size : {3.0f, 200.0f})
          for (const bool biased : {false, true}) {
            const Floats gate_up(random.reals(2 * length, -size, size)), biases(random.reals(2 * length));
            const Floats out(std::vector<float>(length, 0.0f));
            kernels.gated(gate_up.data(), biased ? biases.data() : nullptr, blocks, gelu, out.data());
            for (int i = 0; i < static_cast<int>(length); ++i) {
              const int place = i / kLanes * 2 * kLanes + i % kLanes;
              const double gate = gate_up[place] + (biased ? biases[place] : 0.0);
              const double up = gate_up[place + kLanes] + (biased ? biases[place + kLanes] : 0.0);
              CHECK(near(out[i], activated(gate, gelu) * up, 2e-5));
            }
          }
    }
  });
}

TEST(cosines_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(11);
    for (const int count : {16, 64, 576}) {
      const auto length = static_cast<size_t>(count);
      const Floats a(random.reals(length)), b(random.reals(length));
      const Floats zeros(std::vector<float>(length, 0.0f));
      double ab = 0, aa = 0, bb = 0;
      for (int i = 0; i < count; ++i) {
        ab += static_cast<double>(a[i]) * b[i];
        aa += static_cast<double>(a[i]) * a[i];
        bb += static_cast<double>(b[i]) * b[i];
      }
      CHECK(near(kernels.cosine(a.data(), b.data(), count), ab / std::sqrt(aa * bb), 1e-6));
      CHECK(near(kernels.cosine(a.data(), a.data(), count), 1.0, 1e-6));
      CHECK(kernels.cosine(a.data(), a.data(), count) <= 1.0f);
      CHECK(kernels.cosine(a.data(), zeros.data(), count) == 0.0f);
      CHECK(kernels.cosine(zeros.data(), zeros.data(), count) == 0.0f);
      std::vector<float> opposite(a.data(), a.data() + count);
      for (float& value : opposite) value = -2 * value;
      const float least = kernels.cosine(a.data(), Floats(opposite).data(), count);
      CHECK(near(least, -1.0, 1e-6));
      CHECK(least >= -1.0f);
    }
  });
}

TEST(rotations_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(12);
    for (const int head_dim : {16, 64, 80})
      for (const int rotary : {0, 2, head_dim / 2, head_dim})
        for (const float scale : {1.0f, 0.125f}) {
          const std::vector<float> before = random.reals(static_cast<size_t>(head_dim));
          const Floats cosines(random.reals(static_cast<size_t>(rotary / 2)));
          const Floats sines(random.reals(static_cast<size_t>(rotary / 2)));
          const Floats head(before);
          kernels.rope(head.data(), head_dim, rotary, cosines.data(), sines.data(), scale);
          for (int i = 0; i < head_dim; ++i) {
            double expected = before[i];
            const int half = rotary / 2;
            if (i < half)
              expected = double{before[i]} * cosines[i] - double{before[i + half]} * sines[i];
            else if (i < rotary)
              expected = double{before[i]} * cosines[i - half] + double{before[i - half]} * sines[i - half];
            CHECK(near(head[i], expected * scale, 1e-6));
          }
        }
  });
}

TEST(the_largest_is_the_first_of_equals) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(13);
    for (const int count : {1, 2, 15, 16, 17, 31, 33, 64, 97}) {
      const auto length = static_cast<size_t>(count);
      float largest = 0;
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<float> values = random.reals(length, -9, -1);
        const int first = random.whole(0, count - 1), second = random.whole(first, count - 1);
        values[static_cast<size_t>(first)] = values[static_cast<size_t>(second)] = -0.5f;
        CHECK(largest_at(kernels, values, &largest) == first);
        CHECK(largest == -0.5f);
        const int place = random.whole(0, count - 1);
        values[static_cast<size_t>(place)] = kNan;  // wherever it stands, it is found
        values[static_cast<size_t>(random.whole(0, count - 1))] = kNan;
        CHECK(largest_at(kernels, values, &largest) <= place);
        CHECK(std::isnan(largest));
      }
      CHECK(largest_at(kernels, std::vector<float>(length, -kInfinity), &largest) == 0);
      CHECK(largest == -kInfinity);
      CHECK(largest_at(kernels, std::vector<float>(length, kNan), &largest) == 0);
      std::vector<float> one(length, -kInfinity);
      one.back() = kInfinity;
      CHECK(largest_at(kernels, one, &largest) == count - 1);
      CHECK(largest == kInfinity);
    }
  });
}

}  // namespace river::test
