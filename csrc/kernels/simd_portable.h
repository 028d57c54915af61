// Sixteen lanes in plain C++, for any processor: what the other simd_*.h do in registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../bfloat16.h"
#include "fixed_point.h"

namespace river {
namespace {

struct Floats { float lane[16]; };
struct Words { uint32_t lane[16]; };
struct Ints { int32_t lane[16]; };
struct Pair { float even, odd; };  // two activations, rounded to bfloat16

constexpr int kChains = 1;         // accumulators of a row in a product of bfloat16
constexpr int kPairSums = 4;       // accumulators that registers hold in such a product
constexpr int kPanelsTogether = 1; // panels that share one read of the activations, many rows
constexpr int kMaxCodeRows = 4;    // rows that share one read of the weights
constexpr int kMaxQueries = 4;
constexpr int kValueVectors = 2;   // vectors of a head's dims that attention sums at a time

#define RIVER_LANES for (int i = 0; i < 16; ++i)

inline Floats zero() { return Floats{}; }
inline Ints zero_ints() { return Ints{}; }
inline Floats set1(float x) { Floats r; RIVER_LANES r.lane[i] = x; return r; }
inline Ints set1_int(int32_t x) { Ints r; RIVER_LANES r.lane[i] = x; return r; }
inline Floats load(const float* p) { Floats r; std::memcpy(&r, p, sizeof r); return r; }
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline Words load_words(const void* p) { Words r; std::memcpy(&r, p, sizeof r); return r; }
inline Ints load_ints(const void* p) { Ints r; std::memcpy(&r, p, sizeof r); return r; }
inline Floats add(Floats a, Floats b) { RIVER_LANES a.lane[i] += b.lane[i]; return a; }
inline Floats sub(Floats a, Floats b) { RIVER_LANES a.lane[i] -= b.lane[i]; return a; }
inline Floats mul(Floats a, Floats b) { RIVER_LANES a.lane[i] *= b.lane[i]; return a; }
inline Floats div(Floats a, Floats b) { RIVER_LANES a.lane[i] /= b.lane[i]; return a; }
inline Floats fma(Floats a, Floats b, Floats c) {
  RIVER_LANES c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Floats max(Floats a, Floats b) {
  RIVER_LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline Floats min(Floats a, Floats b) {
  RIVER_LANES a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
inline Floats round_to_int(Floats a) { RIVER_LANES a.lane[i] = std::nearbyintf(a.lane[i]); return a; }
inline Floats times_power_of_2(Floats a, Floats n) {
  RIVER_LANES {
    const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    a.lane[i] *= power;
  }
  return a;
}
inline float sum(Floats a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.lane[i] += a.lane[i + width];
  return a.lane[0];
}
inline float largest(Floats a) {
  float r = a.lane[0];
  RIVER_LANES r = a.lane[i] > r ? a.lane[i] : r;
  return r;
}
// keeps the lanes in [begin, end), puts `other` into the rest
inline Floats keep_lanes(Floats a, int begin, int end, float other) {
  RIVER_LANES a.lane[i] = i >= begin && i < end ? a.lane[i] : other;
  return a;
}
inline Floats low_bf16(Words w) {  // the lower bfloat16 of each word
  Floats r;
  RIVER_LANES { const uint32_t b = w.lane[i] << 16; std::memcpy(&r.lane[i], &b, 4); }
  return r;
}
inline Floats high_bf16(Words w) {
  Floats r;
  RIVER_LANES { const uint32_t b = w.lane[i] & 0xffff0000u; std::memcpy(&r.lane[i], &b, 4); }
  return r;
}
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
inline void store_pairs(Floats x, Pair* out) {  // sixteen activations
  for (int i = 0; i < 8; ++i)
    out[i] = {to_float(to_bf16(x.lane[2 * i])), to_float(to_bf16(x.lane[2 * i + 1]))};
}
inline Words low_nibbles(Words w) { RIVER_LANES w.lane[i] &= 0x0f0f0f0fu; return w; }
inline Words high_nibbles(Words w) {
  RIVER_LANES w.lane[i] = (w.lane[i] >> 4) & 0x0f0f0f0fu;
  return w;
}
inline Words low_three_bits(Words w) { RIVER_LANES w.lane[i] &= 0x07070707u; return w; }
inline Words next_three_bits(Words w) {
  RIVER_LANES w.lane[i] = (w.lane[i] >> 3) & 0x07070707u;
  return w;
}
template <int Place>  // each byte's nibble with that bit of `upper`'s byte above it
inline Words with_fifth_bit(Words nibbles, Words upper) {
  RIVER_LANES nibbles.lane[i] |= (upper.lane[i] >> Place & 0x01010101u) << 4;
  return nibbles;
}
inline Words low_six_bits(Words w) { RIVER_LANES w.lane[i] &= 0x3f3f3f3fu; return w; }
// six bits out of the upper two of three words' bytes, a's lowest
inline Words upper_two_bits(Words a, Words b, Words c) {
  constexpr uint32_t kUpper = 0xc0c0c0c0u;
  RIVER_LANES {
    const uint32_t lower = (a.lane[i] & kUpper) >> 2 | (b.lane[i] & kUpper);
    c.lane[i] = (lower >> 2 | (c.lane[i] & kUpper)) >> 2;
  }
  return c;
}
// adds the products of four unsigned bytes of each lane with the four signed bytes of x
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  for (int byte = 0; byte < 4; ++byte) {
    const int32_t factor = static_cast<int8_t>(x >> (8 * byte));
    RIVER_LANES acc.lane[i] += static_cast<int32_t>((w.lane[i] >> (8 * byte)) & 0xffu) * factor;
  }
  return acc;
}
// the same for codes of at most six bits
inline Ints dot_six_bits(Ints acc, Words w, uint32_t x) { return dot_bytes(acc, w, x); }
// The first two of a word's four signed codes as 16-bit numbers, and the last two. Codes lie in the
// order 0, 2, 1, 3, so that shifts widen them.
inline Words first_codes(Words w) {
  RIVER_LANES {
    const int code = static_cast<int8_t>(w.lane[i]), next = static_cast<int8_t>(w.lane[i] >> 16);
    w.lane[i] = (static_cast<uint32_t>(code) & 0xffffu) | static_cast<uint32_t>(next) << 16;
  }
  return w;
}
inline Words last_codes(Words w) {
  RIVER_LANES w.lane[i] >>= 8;
  return first_codes(w);
}
// adds the products of two 16-bit numbers of each lane with two of x
inline Ints dot_shorts(Ints acc, Words w, const int16_t* x) {
  RIVER_LANES acc.lane[i] += static_cast<int16_t>(w.lane[i]) * x[0] +
                             static_cast<int16_t>(w.lane[i] >> 16) * x[1];
  return acc;
}
inline Ints times_256_plus(Ints high, Ints low) {
  RIVER_LANES high.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(high.lane[i]) * 256 +
                                                  static_cast<uint32_t>(low.lane[i]));
  return high;
}
inline Floats to_floats(Ints a) {
  Floats r;
  RIVER_LANES r.lane[i] = static_cast<float>(a.lane[i]);
  return r;
}
inline void split_fixed(Floats whole, int8_t* out) { split_fixed_lanes(whole.lane, out); }
// sixteen whole numbers of at most 16 bits; what is no number becomes any
inline void store_shorts(Floats whole, int16_t* out) {
  RIVER_LANES out[i] = whole.lane[i] == whole.lane[i] ? static_cast<int16_t>(whole.lane[i]) : 0;
}
inline void prefetch(const void*) {}
inline void prefetch_near(const void*) {}
#undef RIVER_LANES

}  // namespace
}  // namespace river
