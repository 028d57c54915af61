// Sixteen lanes in four 128-bit registers of an ARM processor (AArch64).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../bfloat16.h"
#include "fixed_point.h"

namespace river {
namespace {

struct Floats { float32x4_t v[4]; };
struct Words { uint32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Pair { float even, odd; };  // two activations, rounded to bfloat16

constexpr int kChains = 1;
constexpr int kPairSums = 4;  // sixteen of 32 registers; the halves of the weights take eight more
constexpr int kPanelsTogether = 1;
constexpr int kMaxCodeRows = 1;  // its sums and the codes leave no registers for a second row's
constexpr int kMaxQueries = 4;
constexpr int kValueVectors = 1;

// Inlined by command and without a loop over the four registers: GCC 12 would call these functions
// from the innermost loops, Clang 14 would keep a loop there, both with the sums in memory.
#define RIVER_NEON inline __attribute__((always_inline))
#define RIVER_PARTS(Type, part) \
  each<Type>([&](int i) __attribute__((always_inline)) { return part; })

template <class Type, class Part>
RIVER_NEON Type each(Part part) {
  return {{part(0), part(1), part(2), part(3)}};
}

RIVER_NEON Floats set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
RIVER_NEON Floats zero() { return set1(0.0f); }
RIVER_NEON Ints set1_int(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {{v, v, v, v}};
}
RIVER_NEON Ints zero_ints() { return set1_int(0); }
RIVER_NEON Floats load(const float* p) { return RIVER_PARTS(Floats, vld1q_f32(p + 4 * i)); }
RIVER_NEON void store(float* p, Floats x) {
  vst1q_f32(p, x.v[0]);
  vst1q_f32(p + 4, x.v[1]);
  vst1q_f32(p + 8, x.v[2]);
  vst1q_f32(p + 12, x.v[3]);
}
RIVER_NEON Words load_words(const void* p) {
  return RIVER_PARTS(Words, vld1q_u32(static_cast<const uint32_t*>(p) + 4 * i));
}
RIVER_NEON Ints load_ints(const void* p) {
  return RIVER_PARTS(Ints, vld1q_s32(static_cast<const int32_t*>(p) + 4 * i));
}
RIVER_NEON Floats add(Floats x, Floats y) { return RIVER_PARTS(Floats, vaddq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats sub(Floats x, Floats y) { return RIVER_PARTS(Floats, vsubq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats mul(Floats x, Floats y) { return RIVER_PARTS(Floats, vmulq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats div(Floats x, Floats y) { return RIVER_PARTS(Floats, vdivq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats fma(Floats x, Floats y, Floats c) {
  return RIVER_PARTS(Floats, vfmaq_f32(c.v[i], x.v[i], y.v[i]));
}
RIVER_NEON Floats max(Floats x, Floats y) { return RIVER_PARTS(Floats, vmaxq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats min(Floats x, Floats y) { return RIVER_PARTS(Floats, vminq_f32(x.v[i], y.v[i])); }
RIVER_NEON Floats round_to_int(Floats x) { return RIVER_PARTS(Floats, vrndnq_f32(x.v[i])); }
RIVER_NEON float32x4_t times_power_of_2(float32x4_t x, float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
RIVER_NEON Floats times_power_of_2(Floats x, Floats n) {
  return RIVER_PARTS(Floats, times_power_of_2(x.v[i], n.v[i]));
}
RIVER_NEON float sum(Floats x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
RIVER_NEON float largest(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
RIVER_NEON float32x4_t keep_lanes(float32x4_t x, int begin, int end, float other) {
  constexpr int32_t kLane[4] = {0, 1, 2, 3};
  const int32x4_t lane = vld1q_s32(kLane);
  const uint32x4_t kept =
      vandq_u32(vcgeq_s32(lane, vdupq_n_s32(begin)), vcltq_s32(lane, vdupq_n_s32(end)));
  return vbslq_f32(kept, x, vdupq_n_f32(other));
}
RIVER_NEON Floats keep_lanes(Floats x, int begin, int end, float other) {
  return RIVER_PARTS(Floats, keep_lanes(x.v[i], begin - 4 * i, end - 4 * i, other));
}
RIVER_NEON Floats low_bf16(Words w) {
  return RIVER_PARTS(Floats, vreinterpretq_f32_u32(vshlq_n_u32(w.v[i], 16)));
}
RIVER_NEON uint32x4_t upper_half(uint32x4_t w) { return vandq_u32(w, vdupq_n_u32(0xffff0000u)); }
RIVER_NEON Floats high_bf16(Words w) {
  return RIVER_PARTS(Floats, vreinterpretq_f32_u32(upper_half(w.v[i])));
}
RIVER_NEON Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
RIVER_NEON float32x4_t round_to_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vreinterpretq_f32_u32(upper_half(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)))));
}
RIVER_NEON void store_pairs(Floats x, Pair* out) {
  store(&out->even, RIVER_PARTS(Floats, round_to_bf16(x.v[i])));
}
RIVER_NEON Words low_nibbles(Words w) {
  return RIVER_PARTS(Words, vandq_u32(w.v[i], vdupq_n_u32(0x0f0f0f0fu)));
}
RIVER_NEON Words high_nibbles(Words w) {
  return low_nibbles(RIVER_PARTS(Words, vshrq_n_u32(w.v[i], 4)));
}
RIVER_NEON Words low_three_bits(Words w) {
  return RIVER_PARTS(Words, vandq_u32(w.v[i], vdupq_n_u32(0x07070707u)));
}
RIVER_NEON Words next_three_bits(Words w) {
  return low_three_bits(RIVER_PARTS(Words, vshrq_n_u32(w.v[i], 3)));
}
template <int Place>
RIVER_NEON Words with_fifth_bit(Words nibbles, Words upper) {
  const int32x4_t left = vdupq_n_s32(4 - Place);  // or right, where it is negative
  return RIVER_PARTS(Words, vorrq_u32(nibbles.v[i], vandq_u32(vshlq_u32(upper.v[i], left),
                                                              vdupq_n_u32(0x10101010u))));
}
RIVER_NEON Words low_six_bits(Words w) {
  return RIVER_PARTS(Words, vandq_u32(w.v[i], vdupq_n_u32(0x3f3f3f3fu)));
}
RIVER_NEON uint32x4_t upper_two_bits(uint32x4_t a, uint32x4_t b, uint32x4_t c) {
  // each shift inserts what it shifts below the bits that are there
  const uint8x16_t lower = vsriq_n_u8(vreinterpretq_u8_u32(b), vreinterpretq_u8_u32(a), 2);
  return vreinterpretq_u32_u8(vshrq_n_u8(vsriq_n_u8(vreinterpretq_u8_u32(c), lower, 2), 2));
}
RIVER_NEON Words upper_two_bits(Words a, Words b, Words c) {
  return RIVER_PARTS(Words, upper_two_bits(a.v[i], b.v[i], c.v[i]));
}
// Codes of at most six bits, so that 16 bits hold two products.
RIVER_NEON int32x4_t dot_six_bits(int32x4_t acc, uint32x4_t w, int8x16_t x) {
  const int8x16_t codes = vreinterpretq_s8_u32(w);
  const int16x8_t first = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
  return vpadalq_s16(acc, vpaddq_s16(first, vmull_high_s8(codes, x)));
}
RIVER_NEON Ints dot_six_bits(Ints acc, Words w, uint32_t x) {
  const int8x16_t factors = vreinterpretq_s8_u32(vdupq_n_u32(x));
  return RIVER_PARTS(Ints, dot_six_bits(acc.v[i], w.v[i], factors));
}
// Codes of eight lanes, all from one place in their words, times the activation of that place.
template <int Place>
RIVER_NEON void add_products(int32x4_t* acc, int16x8_t codes, int16x4_t x) {
  acc[0] = vmlal_lane_s16(acc[0], vget_low_s16(codes), x, Place);
  acc[1] = vmlal_high_lane_s16(acc[1], codes, x, Place);
}
RIVER_NEON int16x8_t even_bytes(uint32x4_t w) {
  return vreinterpretq_s16_u32(vandq_u32(w, vdupq_n_u32(0x00ff00ffu)));
}
RIVER_NEON int16x8_t odd_bytes(uint32x4_t w) {
  return vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_u32(w), 8));
}
RIVER_NEON void dot_bytes(int32x4_t* acc, const uint32x4_t* w, int16x4_t x) {  // eight lanes
  add_products<0>(acc, vuzp1q_s16(even_bytes(w[0]), even_bytes(w[1])), x);
  add_products<1>(acc, vuzp1q_s16(odd_bytes(w[0]), odd_bytes(w[1])), x);
  add_products<2>(acc, vuzp2q_s16(even_bytes(w[0]), even_bytes(w[1])), x);
  add_products<3>(acc, vuzp2q_s16(odd_bytes(w[0]), odd_bytes(w[1])), x);
}
RIVER_NEON Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  const int16x4_t factors = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(x))));
  dot_bytes(acc.v, w.v, factors);
  dot_bytes(acc.v + 2, w.v + 2, factors);
  return acc;
}
RIVER_NEON uint32x4_t first_codes(uint32x4_t w) {
  return vreinterpretq_u32_s16(vshrq_n_s16(vshlq_n_s16(vreinterpretq_s16_u32(w), 8), 8));
}
RIVER_NEON Words first_codes(Words w) { return RIVER_PARTS(Words, first_codes(w.v[i])); }
RIVER_NEON Words last_codes(Words w) {
  return RIVER_PARTS(Words, vreinterpretq_u32_s16(vshrq_n_s16(vreinterpretq_s16_u32(w.v[i]), 8)));
}
RIVER_NEON int32x4_t dot_shorts(int32x4_t acc, uint32x4_t w, int16x8_t x) {
  const int16x8_t numbers = vreinterpretq_s16_u32(w);
  const int32x4_t products = vmull_s16(vget_low_s16(numbers), vget_low_s16(x));
  return vaddq_s32(acc, vpaddq_s32(products, vmull_high_s16(numbers, x)));
}
RIVER_NEON Ints dot_shorts(Ints acc, Words w, const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  const int16x8_t factors = vreinterpretq_s16_s32(vdupq_n_s32(both));
  return RIVER_PARTS(Ints, dot_shorts(acc.v[i], w.v[i], factors));
}
RIVER_NEON Ints times_256_plus(Ints high, Ints low) {
  return RIVER_PARTS(Ints, vaddq_s32(vshlq_n_s32(high.v[i], 8), low.v[i]));
}
RIVER_NEON Floats to_floats(Ints x) { return RIVER_PARTS(Floats, vcvtq_f32_s32(x.v[i])); }
RIVER_NEON void split_fixed(Floats whole, int8_t* out) {
  float lanes[16];
  store(lanes, whole);
  split_fixed_lanes(lanes, out);
}
RIVER_NEON void store_shorts(Floats whole, int16_t* out) {
  for (int i = 0; i < 4; ++i) vst1_s16(out + 4 * i, vqmovn_s32(vcvtnq_s32_f32(whole.v[i])));
}
RIVER_NEON void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
RIVER_NEON void prefetch_near(const void* p) { __builtin_prefetch(p); }
#undef RIVER_PARTS
#undef RIVER_NEON

}  // namespace
}  // namespace river
