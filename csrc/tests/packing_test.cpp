// Weights and codes in their panels, see packing.h.
#include "packing.h"

#include <cstring>

#include "sources.h"

namespace river::test {
namespace {

uint32_t word(const uint8_t* panel, size_t index) {
  uint32_t value;
  std::memcpy(&value, panel + index * sizeof value, sizeof value);
  return value;
}

// The weight of one lane and input of a panel of codes, by the description in packing.h.
double weight_in_panel(const PackedMatrix& matrix, int row, int column) {
  const uint8_t* panel = matrix.panel(row / kLanes);
  const auto lane = static_cast<size_t>(row % kLanes);
  const int group = column / matrix.group_size, place = column % matrix.group_size;
  const auto words = static_cast<size_t>(matrix.group_size * matrix.bits / 32);
  const size_t start = static_cast<size_t>(group) * (1 + words) * kLanes;
  const uint32_t scale_and_zero = word(panel, start + lane);
  uint32_t code;
  if (matrix.bits == 3) {
    const auto start_of_32 = static_cast<size_t>(1 + place / 32 * 3);
    const int which = place % 32 / 8, byte = place % 8 / 2 * 8, half = place % 2 * 3;
    const auto bits = [&](size_t line, int shift, uint32_t mask) {
      return word(panel, start + (start_of_32 + line) * kLanes + lane) >> (byte + shift) & mask;
    };
    const uint32_t both = which < 3 ? bits(static_cast<size_t>(which), 0, 63)
                                    : bits(0, 6, 3) | bits(1, 6, 3) << 2 | bits(2, 6, 3) << 4;
    code = both >> half & 7;
  } else if (matrix.bits == 5) {
    const auto start_of_32 = static_cast<size_t>(1 + place / 32 * 5);
    const auto of = [&](size_t line) {
      return word(panel, start + (start_of_32 + line) * kLanes + lane) >> (place % 8 / 2 * 8) & 255;
    };
    const uint32_t nibble = of(static_cast<size_t>(place % 32 / 8)) >> (place % 2 * 4) & 15;
    code = nibble | (of(4) >> (place % 32 / 8 * 2 + place % 2) & 1) << 4;
  } else if (matrix.bits == 4) {
    const auto line = static_cast<size_t>(1 + place / 8);
    code = word(panel, start + line * kLanes + lane) >> (place % 8 * 4) & 15;
  } else if (matrix.bits == 6) {
    const auto start_of_16 = static_cast<size_t>(1 + place / 16 * 3);
    const int which = place % 16 / 8 * 2 + place % 2, byte = place % 8 / 2 * 8;
    const auto bits = [&](size_t line, int shift, uint32_t mask) {
      return word(panel, start + (start_of_16 + line) * kLanes + lane) >> shift & mask;
    };
    code = which < 3 ? bits(static_cast<size_t>(which), byte, 63)
                     : bits(0, byte + 6, 3) | bits(1, byte + 6, 3) << 2 | bits(2, byte + 6, 3) << 4;
  } else {
    const auto line = static_cast<size_t>(1 + place / 8 * 2 + place % 2);
    code = word(panel, start + line * kLanes + lane) >> (place % 8 / 2 * 8) & 255;
  }
  const int middle = 1 << (matrix.bits - 1);
  return (static_cast<int>(code) - middle) * static_cast<double>(to_float(static_cast<bf16>(scale_and_zero >> 16))) +
         to_float(static_cast<bf16>(scale_and_zero));
}

}  // namespace

TEST(weights_come_back_from_their_panels) {
  Random random(1);
  for (const int columns : {32, 48, 80, 576}) {
    const Source first(21, columns, 16, 0, random), second(27, columns, 16, 0, random);
    const Packed below({&first, &second}, false, columns, 16, 0);
    CHECK(below.matrix.panels() == 3);
    std::vector<float> row(static_cast<size_t>(below.matrix.columns));
    for (int r = 0; r < 48; ++r) {
      unpack_row(below.matrix, r, below.matrix.columns, row.data());
      for (int k = 0; k < below.matrix.columns; ++k) {
        const double expected = k >= columns ? 0.0
                                : r < 21     ? first.weight(r, k)
                                             : second.weight(r - 21, k);
        CHECK(row[static_cast<size_t>(k)] == expected);
      }
    }
    const Source gate(32, columns, 16, 0, random), up(32, columns, 16, 0, random);
    const Packed in_turn({&gate, &up}, true, columns, 16, 0);
    for (int r = 0; r < 64; ++r) {
      unpack_row(in_turn.matrix, r, in_turn.matrix.columns, row.data());
      const Source& source = r / kLanes % 2 == 0 ? gate : up;
      for (int k = 0; k < columns; ++k)
        CHECK(row[static_cast<size_t>(k)] == source.weight(r / 32 * kLanes + r % kLanes, k));
    }
  }
}

TEST(codes_lie_in_their_panels_as_documented) {
  Random random(2);
  for (const int bits : {3, 4, 5, 6, 8})
    for (const int group_size : {32, 64, 128}) {
      const int columns = 3 * group_size;
      const Source source(37, columns, bits, group_size, random);
      const Packed packed({&source}, false, columns, bits, group_size);
      for (int r = 0; r < 37; ++r)
        for (int k = 0; k < columns; ++k)
          CHECK(weight_in_panel(packed.matrix, r, k) == source.weight(r, k));
      for (int r = 37; r < 48; ++r) CHECK(weight_in_panel(packed.matrix, r, 5) == 0.0);
    }
}

}  // namespace river::test
