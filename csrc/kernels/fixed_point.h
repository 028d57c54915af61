// Activations in fixed point, for instruction sets that have no shuffle of bytes for it.
#pragma once

#include <cstdint>

namespace river {
namespace {

// Sixteen whole numbers of at most 16 bits as 256 * high + low, both signed bytes. For every eight:
// high of the inputs 0 2 4 6, high of 1 3 5 7, low of 0 2 4 6, low of 1 3 5 7.
inline void split_fixed_lanes(const float* whole, int8_t* out) {
  for (int i = 0; i < 16; ++i) {
    const int32_t value = whole[i] == whole[i] ? static_cast<int32_t>(whole[i]) : 0;  // no NaN
    const int32_t high = (value + 128) >> 8;
    int8_t* word = out + i / 8 * 16 + i % 2 * 4 + i % 8 / 2;
    word[0] = static_cast<int8_t>(high);
    word[8] = static_cast<int8_t>(value - 256 * high);
  }
}

}  // namespace
}  // namespace river
