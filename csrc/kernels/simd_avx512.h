// Sixteen lanes in a 512-bit register. RIVER_BF16 takes the processor's bfloat16 product,
// RIVER_VNNI its product of bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../bfloat16.h"

namespace river {
namespace {

using Floats = __m512;
using Words = __m512i;
using Ints = __m512i;

constexpr int kPairSums = 24;
constexpr int kPanelsTogether = 2;
constexpr int kMaxCodeRows = 6;
constexpr int kMaxQueries = 4;
constexpr int kValueVectors = 4;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Floats set1(float x) { return _mm512_set1_ps(x); }
inline Ints set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Words load_words(const void* p) { return _mm512_load_si512(p); }
inline Ints load_ints(const void* p) { return _mm512_load_si512(p); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats round_to_int(Floats a) { return _mm512_roundscale_ps(a, 0); }
inline Floats times_power_of_2(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline Floats keep_lanes(Floats a, int begin, int end, float other) {
  const auto mask = static_cast<__mmask16>(((1u << end) - 1) & ~((1u << begin) - 1));
  return _mm512_mask_mov_ps(_mm512_set1_ps(other), mask, a);
}
inline Floats low_bf16(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline Floats high_bf16(Words w) {
  return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline __m512i upper_halves(Floats x) {  // rounded to bfloat16, in the upper half of each lane
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
#ifdef RIVER_BF16
constexpr int kChains = 2;
using Pair = uint32_t;  // two bfloat16
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)));
}
inline void store_pairs(Floats x, Pair* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}
#else
constexpr int kChains = 1;
struct Pair { float even, odd; };  // two activations, rounded to bfloat16
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
inline void store_pairs(Floats x, Pair* out) {
  _mm512_storeu_si512(out, upper_halves(x));
}
#endif

inline Words low_nibbles(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Words high_nibbles(Words w) {
  return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
}
inline Words low_three_bits(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(7)); }
inline Words next_three_bits(Words w) { return low_three_bits(_mm512_srli_epi16(w, 3)); }
template <int Place>  // each byte's nibble with that bit of `upper`'s byte above it
inline Words with_fifth_bit(Words nibbles, Words upper) {
  const Words moved = Place < 4 ? _mm512_slli_epi32(upper, Place < 4 ? 4 - Place : 0)
                                : _mm512_srli_epi32(upper, Place < 4 ? 0 : Place - 4);
  return _mm512_ternarylogic_epi32(nibbles, moved, _mm512_set1_epi8(16), 0xf8);  // x | (y & z)
}
inline Words low_six_bits(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(63)); }
inline Words upper_two_bits(Words a, Words b, Words c) {  // shifted together: one mask for all
  constexpr int kOrAnd = 0xf8;                            // x | (y & z)
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xc0));
  __m512i bits = _mm512_srli_epi32(_mm512_and_si512(a, upper), 2);
  bits = _mm512_srli_epi32(_mm512_ternarylogic_epi32(bits, b, upper, kOrAnd), 2);
  return _mm512_srli_epi32(_mm512_ternarylogic_epi32(bits, c, upper, kOrAnd), 2);
}
#ifdef RIVER_VNNI
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(static_cast<int>(x)));
}
inline Ints dot_six_bits(Ints acc, Words w, uint32_t x) { return dot_bytes(acc, w, x); }
#else
// codes of at most six bits, so that 16 bits hold two products
inline Ints dot_six_bits(Ints acc, Words w, uint32_t x) {
  const Ints pairs = _mm512_maddubs_epi16(w, _mm512_set1_epi32(static_cast<int>(x)));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {  // two halves: maddubs saturates at 16 bits
  const Ints factor = _mm512_set1_epi32(static_cast<int>(x));
  const Ints low = _mm512_maddubs_epi16(low_nibbles(w), factor);
  const Ints high = _mm512_maddubs_epi16(high_nibbles(w), factor);
  acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
}
#endif
inline Words first_codes(Words w) { return _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8); }
inline Words last_codes(Words w) { return _mm512_srai_epi16(w, 8); }
inline Ints dot_shorts(Ints acc, Words w, const int16_t* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
#ifdef RIVER_VNNI
  return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(both));
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(w, _mm512_set1_epi32(both)));
#endif
}
inline Ints times_256_plus(Ints high, Ints low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline void split_fixed(Floats whole, int8_t* out) {  // as split_fixed_lanes
  const __m512i value = _mm512_cvtps_epi32(whole);
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
  const __m512i low = _mm512_and_si512(value, _mm512_set1_epi32(255));
  const __m256i both =
      _mm512_cvtepi32_epi16(_mm512_or_si512(_mm512_slli_epi32(high, 8), low));
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 5, 9, 13, 3, 7, 11, 15, 0, 4, 8, 12, 2, 6, 10, 14));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(both, order));
}
inline void store_shorts(Floats whole, int16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(whole)));
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
