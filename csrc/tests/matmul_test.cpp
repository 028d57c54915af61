// Products of every kernel set against double precision.
#include <cmath>
#include <cstring>
#include <limits>

#include "sources.h"

namespace river::test {
namespace {

constexpr int kMostRows = 20;
constexpr float kUntouched = 12345.0f;

struct Size {
  int outputs, columns, bits, group_size;
};

constexpr Size kWeights[] = {{16, 32, 16, 0},  {40, 48, 16, 0},  {33, 64, 16, 0},
                             {112, 96, 16, 0}, {24, 576, 16, 0}, {80, 160, 16, 0}};
constexpr Size kCodes[] = {{16, 32, 4, 32},   {40, 64, 4, 32},  {33, 128, 4, 64}, {48, 576, 4, 64},
                           {24, 384, 4, 128}, {16, 32, 6, 32},  {40, 96, 6, 32}, {33, 128, 6, 64},
                           {48, 576, 6, 64},  {24, 384, 6, 128}, {16, 32, 8, 32}, {40, 64, 8, 32},
                           {33, 128, 8, 64},  {48, 576, 8, 64}, {24, 384, 8, 128},
                           {16, 32, 3, 32},   {40, 96, 3, 32},  {33, 128, 3, 64}, {48, 576, 3, 64},
                           {24, 384, 3, 128}, {16, 32, 5, 32},  {40, 96, 5, 32}, {33, 128, 5, 64},
                           {48, 576, 5, 64},  {24, 384, 5, 128}};

// Activations whose groups are of very different size; a row of zeros, and one of next to nothing.
std::vector<float> activations(int rows, int columns, Random& random) {
  std::vector<float> x;
  for (int i = 0; i < rows * columns; ++i)
    x.push_back(random.real(-1, 1) * std::exp(random.real(-6, 2)));
  for (size_t k = 0; k < static_cast<size_t>(columns); ++k) {
    x[k] = 0.0f;
    if (rows > 1) x[static_cast<size_t>(columns) + k] *= 1e-37f;
  }
  return x;
}

// Panels [first, last) of a product, with a gap between the rows that is to stay as it is.
struct Product {
  Product(const KernelSet& kernels, const PackedMatrix& matrix, const Inputs& inputs, int first_row,
          int rows, int first, int last)
      : stride(static_cast<size_t>(matrix.panels()) * kLanes + 16),
        out(stride * static_cast<size_t>(rows) - 16, kUntouched) {
    kernels.matmul(matrix, first, last, inputs.row(first_row), inputs.stride, rows, out.data(),
                   stride);
  }
  const float* row(int index) const { return out.data() + stride * static_cast<size_t>(index); }

  size_t stride;
  std::vector<float> out;
};

void check_size(const KernelSet& kernels, const Size& size) {
  Random random(3);
  const Source source(size.outputs, size.columns, size.bits, size.group_size, random);
  const Packed packed({&source}, false, size.columns, size.bits, size.group_size);
  const std::vector<float> x = activations(kMostRows, size.columns, random);
  const Inputs inputs(kernels, packed.matrix, x, kMostRows, size.columns);
  const int panels = packed.matrix.panels();
  const Product all(kernels, packed.matrix, inputs, 0, kMostRows, 0, panels);
  for (int r = 0; r < kMostRows; ++r) {
    const float* row = x.data() + static_cast<size_t>(r) * size.columns;
    for (int n = 0; n < size.outputs; ++n) {
      double expected = 0, magnitude = 0, rounding = 0;
      for (int k = 0; k < size.columns; ++k) {
        const double w = source.weight(n, k);
        const double value = size.bits == 16 ? rounded(row[k]) : row[k];
        expected += w * value;
        magnitude += std::fabs(w * value);
        if (size.bits == 16) continue;
        float most = 0;  // of the group: half a step of its fixed point is lost
        for (int i = k / size.group_size * size.group_size; i / size.group_size == k / size.group_size;
             ++i)
          most = std::max(most, std::fabs(row[i]));
        rounding += std::fabs(w) * most / 65024;
      }
      CHECK(std::fabs(all.row(r)[n] - expected) <= 1e-5 * magnitude + 1.01 * rounding + 1e-30);
    }
    for (int n = size.outputs; n < panels * kLanes; ++n) CHECK(all.row(r)[n] == 0.0f);  // padding
    if (r + 1 < kMostRows)
      for (int n = panels * kLanes; n < panels * kLanes + 16; ++n)
        CHECK(all.row(r)[n] == kUntouched);
  }
}

}  // namespace

TEST(products_with_weights_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Size& size : kWeights) check_size(kernels, size);
  });
}

TEST(products_with_codes_are_right) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Size& size : kCodes) check_size(kernels, size);
  });
}

TEST(the_largest_codes_and_activations_overflow_nothing) {
  constexpr int kColumns = 256, kGroup = 128;
  constexpr float kMost = 32512, kLowest = 32384;  // 127 * 256 + 0 and 127 * 256 - 128, the bytes'
  Random random(7);
  with_each_kernel_set([&](const KernelSet& kernels) {
    for (const int bits : {3, 4, 5, 6, 8})
      for (const bool ones : {false, true}) {
        Source source(kLanes, kColumns, bits, kGroup, random);
        source.set_codes(ones);
        const Packed packed({&source}, false, kColumns, bits, kGroup);
        std::vector<float> x(2 * kColumns, kLowest);
        for (size_t k = 0; k < x.size(); k += kGroup) x[k] = kMost;
        for (size_t k = kColumns; k < x.size(); ++k) x[k] = -x[k];
        const Inputs inputs(kernels, packed.matrix, x, 2, kColumns);
        const Product both(kernels, packed.matrix, inputs, 0, 2, 0, 1);
        for (int n = 0; n < kLanes; ++n) {
          double expected = 0, magnitude = 0;
          for (int k = 0; k < kColumns; ++k) {
            expected += source.weight(n, k) * x[static_cast<size_t>(k)];
            magnitude += std::fabs(source.weight(n, k)) * kMost;
          }
          CHECK(std::fabs(both.row(0)[n] - expected) <= 1e-6 * magnitude);
          CHECK(both.row(1)[n] == -both.row(0)[n]);
        }
      }
  });
}

TEST(a_row_of_a_batch_has_the_bits_of_that_row_alone) {
  constexpr Size kSizes[] = {{40, 96, 16, 0},   {40, 192, 3, 64},   {40, 192, 4, 64},
                             {40, 192, 6, 64},  {40, 192, 8, 64},   {16, 8192, 16, 0},
                             {16, 8192, 3, 32}, {16, 8192, 4, 32},  {16, 8192, 6, 32},
                             {40, 192, 5, 64},  {16, 8192, 5, 32}};
  with_each_kernel_set([&](const KernelSet& kernels) {
    for (const Size& size : kSizes) {
      Random random(4);
      const Source source(size.outputs, size.columns, size.bits, size.group_size, random);
      const Packed packed({&source}, false, size.columns, size.bits, size.group_size);
      const int most = size.columns > 1000 ? 50 : 70;  // more than stay in the cache together
      const std::vector<float> x = activations(most, size.columns, random);
      const Inputs inputs(kernels, packed.matrix, x, most, size.columns);
      const int panels = packed.matrix.panels();
      const size_t bytes = static_cast<size_t>(panels) * kLanes * sizeof(float);
      std::vector<Product> alone;
      for (int r = 0; r < most; ++r)
        alone.emplace_back(kernels, packed.matrix, inputs, r, 1, 0, panels);
      for (int rows = 1; rows <= most; rows = rows < kMostRows ? rows + 1 : rows + 25) {
        const Product batch(kernels, packed.matrix, inputs, 0, rows, 0, panels);
        for (int r = 0; r < rows; ++r)
          CHECK(std::memcmp(batch.row(r), alone[static_cast<size_t>(r)].row(0), bytes) == 0);
      }
    }
  });
}

TEST(some_panels_have_the_bits_of_all) {
  constexpr Size kSizes[] = {{104, 96, 16, 0}, {104, 128, 4, 64}, {104, 128, 6, 64}, {104, 128, 8, 64}};
  with_each_kernel_set([&](const KernelSet& kernels) {
    for (const Size& size : kSizes) {
      Random random(5);
      const Source source(size.outputs, size.columns, size.bits, size.group_size, random);
      const Packed packed({&source}, false, size.columns, size.bits, size.group_size);
      const Inputs inputs(kernels, packed.matrix, activations(35, size.columns, random), 35,
                          size.columns);
      const int panels = packed.matrix.panels();
      for (const int rows : {1, 2, 7, 35}) {
        const Product all(kernels, packed.matrix, inputs, 0, rows, 0, panels);
        for (int first = 0; first < panels; ++first)
          for (int last = first; last <= panels; ++last) {
            const Product some(kernels, packed.matrix, inputs, 0, rows, first, last);
            for (int r = 0; r < rows; ++r)
              for (int n = 0; n < panels * kLanes; ++n) {
                const bool inside = n >= first * kLanes && n < last * kLanes;
                CHECK(some.row(r)[n] == (inside ? all.row(r)[n] : kUntouched));
              }
          }
      }
    }
  });
}

TEST(nan_stays_nan) {
  constexpr Size kSizes[] = {{16, 64, 16, 0}, {16, 128, 4, 64}, {16, 128, 6, 64}, {16, 128, 8, 64}};
  with_each_kernel_set([&](const KernelSet& kernels) {
    for (const Size& size : kSizes)
      for (const float value : {std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::infinity()})
        for (const int place : {0, 17, size.columns - 1}) {
          Random random(6);
          const Source source(size.outputs, size.columns, size.bits, size.group_size, random);
          const Packed packed({&source}, false, size.columns, size.bits, size.group_size);
          std::vector<float> x = random.reals(static_cast<size_t>(2 * size.columns));
          x[static_cast<size_t>(place)] = value;
          const Inputs inputs(kernels, packed.matrix, x, 2, size.columns);
          const Product both(kernels, packed.matrix, inputs, 0, 2, 0, 1);
          for (int n = 0; n < kLanes; ++n) {
            CHECK(!std::isfinite(both.row(0)[n]));
            CHECK(std::isfinite(both.row(1)[n]));
          }
        }
  });
}

}  // namespace river::test
