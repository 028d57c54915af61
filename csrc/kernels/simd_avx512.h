// Sixteen lanes in a 512-bit register. RIVER_BF16 takes the processor's bfloat16 product,
// RIVER_VNNI its product of bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../bfloat16.h"

namespace river {
namespace {

using Floats = __m512;
using Words = __m512i;
using Ints = __m512i;

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

#ifdef RIVER_BF16
constexpr int kChains = 4;
constexpr int kMaxPairRows = 6;
using Pair = uint32_t;  // two bfloat16
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)));
}
inline void prepare_pair(const float* x, Pair* out) {
  *out = to_bf16(x[0]) | static_cast<uint32_t>(to_bf16(x[1])) << 16;
}
#else
constexpr int kChains = 1;
constexpr int kMaxPairRows = 12;
struct Pair { float even, odd; };  // two activations, rounded to bfloat16
inline Floats dot_pair(Floats acc, Words w, const Pair* x) {
  return fma(high_bf16(w), set1(x->odd), fma(low_bf16(w), set1(x->even), acc));
}
inline void prepare_pair(const float* x, Pair* out) {
  out->even = to_float(to_bf16(x[0]));
  out->odd = to_float(to_bf16(x[1]));
}
#endif

inline Words low_nibbles(Words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Words high_nibbles(Words w) {
  return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
}
#ifdef RIVER_VNNI
inline Ints dot_bytes(Ints acc, Words w, uint32_t x) {
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(static_cast<int>(x)));
}
inline Ints dot_nibbles(Ints acc, Words w, uint32_t x) { return dot_bytes(acc, w, x); }
#else
inline Ints dot_nibbles(Ints acc, Words w, uint32_t x) {
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
inline Ints times_256_plus(Ints high, Ints low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace river
