// Sixteen lanes in two 256-bit registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../bfloat16.h"

namespace river {
namespace {

struct Floats { __m256 a, b; };
struct Words { __m256i a, b; };
using Ints = Words;
struct Pair { float even, odd; };  // two activations, rounded to bfloat16

constexpr int kChains = 1;
constexpr int kPairSums = 4;
constexpr int kPanelsTogether = 1;
constexpr int kMaxCodeRows = 2;
constexpr int kMaxQueries = 4;
constexpr int kValueVectors = 1;

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Words load_words(const void* p) {
  const auto* v = static_cast<const __m256i*>(p);
  return {_mm256_load_si256(v), _mm256_load_si256(v + 1)};
}
inline Ints load_ints(const void* p) { return load_words(p); }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats c) {
  return {_mm256_fmadd_ps(x.a, y.a, c.a), _mm256_fmadd_ps(x.b, y.b, c.b)};
}
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats round_to_int(Floats x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 times_power_of_2(__m256 x, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats times_power_of_2(Floats x, Floats n) {
  return {times_power_of_2(x.a, n.a), times_power_of_2(x.b, n.b)};
}
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline __m256 keep_lanes(__m256 x, int first, int begin, int end, float other) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                        _mm256_set1_epi32(first));
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
  const __m256i inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(inside));
}
inline Floats keep_lanes(Floats x, int begin, int end, float other) {
  return {keep_lanes(x.a, 0, begin, end, other), keep_lanes(x.b, 8, begin, end, other)};
}
inline Floats low_bf16(Words w) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
}
inline Floats high_bf16(Words w) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
}
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
inline __m256 round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void store_pairs(Floats x, Pair* out) {
  store(&out->even, {round_to_bf16(x.a), round_to_bf16(x.b)});
}
inline Words low_nibbles(Words w) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
inline Words high_nibbles(Words w) {
  return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)});
}
inline Words low_three_bits(Words w) {
  const __m256i mask = _mm256_set1_epi8(7);
  return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
inline Words next_three_bits(Words w) {
  return low_three_bits({_mm256_srli_epi16(w.a, 3), _mm256_srli_epi16(w.b, 3)});
}
template <int Place>
inline __m256i with_fifth_bit(__m256i nibbles, __m256i upper) {
  const __m256i moved = Place < 4 ? _mm256_slli_epi32(upper, Place < 4 ? 4 - Place : 0)
                                  : _mm256_srli_epi32(upper, Place < 4 ? 0 : Place - 4);
  return _mm256_or_si256(nibbles, _mm256_and_si256(moved, _mm256_set1_epi8(16)));
}
template <int Place>
inline Words with_fifth_bit(Words nibbles, Words upper) {
  return {with_fifth_bit<Place>(nibbles.a, upper.a), with_fifth_bit<Place>(nibbles.b, upper.b)};
}
inline Words low_six_bits(Words w) {
  const __m256i mask = _mm256_set1_epi8(63);
  return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
inline __m256i upper_two_bits(__m256i a, __m256i b, __m256i c) {  // shifted together: one mask
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xc0));
  __m256i bits = _mm256_srli_epi32(_mm256_and_si256(a, upper), 2);
  bits = _mm256_srli_epi32(_mm256_or_si256(bits, _mm256_and_si256(b, upper)), 2);
  return _mm256_srli_epi32(_mm256_or_si256(bits, _mm256_and_si256(c, upper)), 2);
}
inline Words upper_two_bits(Words a, Words b, Words c) {
  return {upper_two_bits(a.a, b.a, c.a), upper_two_bits(a.b, b.b, c.b)};
}
// factor 1 or 16 times the products; codes of at most six bits, so that 16 bits hold two products
inline __m256i dot_six_bits(__m256i acc, __m256i w, __m256i x, int factor) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<short>(factor))));
}
inline Ints dot_six_bits(Ints acc, Words w, uint32_t x) {
  const __m256i bytes = _mm256_set1_epi32(static_cast<int>(x));
  return {dot_six_bits(acc.a, w.a, bytes, 1), dot_six_bits(acc.b, w.b, bytes, 1)};
}
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  const __m256i bytes = _mm256_set1_epi32(static_cast<int>(x));
  const Words high = high_nibbles(w);
  acc = dot_six_bits(acc, low_nibbles(w), x);
  return {dot_six_bits(acc.a, high.a, bytes, 16), dot_six_bits(acc.b, high.b, bytes, 16)};
}
inline Words first_codes(Words w) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(w.a, 8), 8),
          _mm256_srai_epi16(_mm256_slli_epi16(w.b, 8), 8)};
}
inline Words last_codes(Words w) {
  return {_mm256_srai_epi16(w.a, 8), _mm256_srai_epi16(w.b, 8)};
}
inline Ints dot_shorts(Ints acc, Words w, const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  const __m256i factors = _mm256_set1_epi32(both);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, factors)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, factors))};
}
inline Ints times_256_plus(Ints high, Ints low) {
  return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 8), low.a),
          _mm256_add_epi32(_mm256_slli_epi32(high.b, 8), low.b)};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i high_and_low(__m256 whole) {
  const __m256i value = _mm256_cvtps_epi32(whole);
  const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(value, _mm256_set1_epi32(128)), 8);
  return _mm256_or_si256(_mm256_slli_epi32(high, 8), _mm256_and_si256(value, _mm256_set1_epi32(255)));
}
inline void split_fixed(Floats whole, int8_t* out) {  // as split_fixed_lanes
  const __m256i packed = _mm256_packs_epi32(high_and_low(whole.a), high_and_low(whole.b));
  const __m256i both = _mm256_permute4x64_epi64(packed, 0xd8);  // packs works on halves
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 5, 9, 13, 3, 7, 11, 15, 0, 4, 8, 12, 2, 6, 10, 14));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(both, order));
}
inline void store_shorts(Floats whole, int16_t* out) {
  const __m256i packed =
      _mm256_packs_epi32(_mm256_cvtps_epi32(whole.a), _mm256_cvtps_epi32(whole.b));
  // packs works on halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}
// Inlined by command: GCC 12 drops calls in lambdas that do nothing but prefetch.
#define RIVER_PREFETCH __attribute__((always_inline)) inline void
RIVER_PREFETCH prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
RIVER_PREFETCH prefetch_near(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
#undef RIVER_PREFETCH

}  // namespace
}  // namespace river
