// Sixteen lanes in four 128-bit registers of an ARM processor (AArch64).
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "../bfloat16.h"
#include "fixed_point.h"

namespace river {
namespace {

struct Floats { float32x4_t v[4]; };
struct Words { uint32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Pair { float even, odd; };  // two activations, rounded to bfloat16

constexpr int kChains = 1;
constexpr int kPairSums = 4;
constexpr int kPanelsTogether = 1;
constexpr int kMaxCodeRows = 2;
constexpr int kMaxQueries = 4;
constexpr int kValueVectors = 1;

#define RIVER_PARTS for (int i = 0; i < 4; ++i)

inline Floats set1(float x) { Floats r; RIVER_PARTS r.v[i] = vdupq_n_f32(x); return r; }
inline Floats zero() { return set1(0.0f); }
inline Ints set1_int(int32_t x) { Ints r; RIVER_PARTS r.v[i] = vdupq_n_s32(x); return r; }
inline Ints zero_ints() { return set1_int(0); }
inline Floats load(const float* p) { Floats r; RIVER_PARTS r.v[i] = vld1q_f32(p + 4 * i); return r; }
inline void store(float* p, Floats x) { RIVER_PARTS vst1q_f32(p + 4 * i, x.v[i]); }
inline Words load_words(const void* p) {
  Words r;
  RIVER_PARTS r.v[i] = vld1q_u32(static_cast<const uint32_t*>(p) + 4 * i);
  return r;
}
inline Ints load_ints(const void* p) {
  Ints r;
  RIVER_PARTS r.v[i] = vld1q_s32(static_cast<const int32_t*>(p) + 4 * i);
  return r;
}
inline Floats add(Floats x, Floats y) { RIVER_PARTS x.v[i] = vaddq_f32(x.v[i], y.v[i]); return x; }
inline Floats sub(Floats x, Floats y) { RIVER_PARTS x.v[i] = vsubq_f32(x.v[i], y.v[i]); return x; }
inline Floats mul(Floats x, Floats y) { RIVER_PARTS x.v[i] = vmulq_f32(x.v[i], y.v[i]); return x; }
inline Floats div(Floats x, Floats y) { RIVER_PARTS x.v[i] = vdivq_f32(x.v[i], y.v[i]); return x; }
inline Floats fma(Floats x, Floats y, Floats c) {
  RIVER_PARTS c.v[i] = vfmaq_f32(c.v[i], x.v[i], y.v[i]);
  return c;
}
inline Floats max(Floats x, Floats y) { RIVER_PARTS x.v[i] = vmaxq_f32(x.v[i], y.v[i]); return x; }
inline Floats min(Floats x, Floats y) { RIVER_PARTS x.v[i] = vminq_f32(x.v[i], y.v[i]); return x; }
inline Floats round_to_int(Floats x) { RIVER_PARTS x.v[i] = vrndnq_f32(x.v[i]); return x; }
inline Floats times_power_of_2(Floats x, Floats n) {
  RIVER_PARTS {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  return x;
}
inline float sum(Floats x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
inline float largest(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline Floats keep_lanes(Floats x, int begin, int end, float other) {
  float lane[16];
  store(lane, x);
  for (int i = 0; i < 16; ++i)
    if (i < begin || i >= end) lane[i] = other;
  return load(lane);
}
inline Floats low_bf16(Words w) {
  Floats r;
  RIVER_PARTS r.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(w.v[i], 16));
  return r;
}
inline Floats high_bf16(Words w) {
  Floats r;
  RIVER_PARTS r.v[i] = vreinterpretq_f32_u32(vandq_u32(w.v[i], vdupq_n_u32(0xffff0000u)));
  return r;
}
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
inline void store_pairs(Floats x, Pair* out) {
  RIVER_PARTS {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    x.v[i] = vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(0xffff0000u)));
  }
  store(&out->even, x);
}
inline Words low_nibbles(Words w) {
  RIVER_PARTS w.v[i] = vandq_u32(w.v[i], vdupq_n_u32(0x0f0f0f0fu));
  return w;
}
inline Words high_nibbles(Words w) {
  RIVER_PARTS w.v[i] = vshrq_n_u32(w.v[i], 4);
  return low_nibbles(w);
}
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  const int16x8_t factors = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(x)));
  RIVER_PARTS {
    const uint8x16_t codes = vreinterpretq_u8_u32(w.v[i]);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(codes)));
    const int32x4_t first = vpaddq_s32(vmull_s16(vget_low_s16(low), vget_low_s16(factors)),
                                       vmull_s16(vget_high_s16(low), vget_high_s16(factors)));
    const int32x4_t second = vpaddq_s32(vmull_s16(vget_low_s16(high), vget_low_s16(factors)),
                                        vmull_s16(vget_high_s16(high), vget_high_s16(factors)));
    acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(first, second));
  }
  return acc;
}
inline Ints dot_nibbles(Ints acc, Words w, uint32_t x) { return dot_bytes(acc, w, x); }
inline Ints times_256_plus(Ints high, Ints low) {
  RIVER_PARTS high.v[i] = vaddq_s32(vshlq_n_s32(high.v[i], 8), low.v[i]);
  return high;
}
inline Floats to_floats(Ints x) {
  Floats r;
  RIVER_PARTS r.v[i] = vcvtq_f32_s32(x.v[i]);
  return r;
}
inline void split_fixed(Floats whole, int8_t* out) {
  float lanes[16];
  store(lanes, whole);
  split_fixed_lanes(lanes, out);
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_near(const void* p) { __builtin_prefetch(p); }
#undef RIVER_PARTS

}  // namespace
}  // namespace river
