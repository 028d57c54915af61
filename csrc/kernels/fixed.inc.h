// Fixed point: whole numbers of 16 bits with one scale. See kernels.inc.h for why all is unnamed here.
#pragma once

#include <cstdint>

namespace river {
namespace {

// 127 * 256 + 127 would be the largest; a little less keeps the upper byte a byte after rounding.
constexpr float kFixedMaximum = 32512.0f;

// Values in fixed point: x = scale * whole number.
struct Fixed {
  float scale;
  int32_t sum;  // of the whole numbers
};

// Rounds `count` values, sixteen at a time, which store(whole, index of the first) takes. Where one
// is infinite or no number, the scale is none.
template <class Store>
inline Fixed to_fixed(const float* x, int count, Store store) {
  Floats most = zero();
  for (int i = 0; i < count; i += 16) {
    const Floats v = load(x + i);
    most = max(most, max(v, sub(zero(), v)));
  }
  const float maximum = largest(most);
  const float inverse = maximum > 1e-30f ? kFixedMaximum / maximum : 0.0f;  // no infinity
  Floats sums = zero();  // whole numbers of at most 24 bits: exact
  for (int i = 0; i < count; i += 16) {
    const Floats whole = round_to_int(mul(load(x + i), set1(inverse)));
    sums = add(sums, whole);
    store(whole, i);
  }
  const float total = sum(sums);
  if (total != total) return {total, 0};
  return {maximum / kFixedMaximum, static_cast<int32_t>(total)};
}

}  // namespace
}  // namespace river
