// The kernels, once, in terms of the sixteen lanes of a simd_*.h that was included before. Each
// instruction set compiles them in its own translation unit with its own flags; everything here is
// in an unnamed namespace, so that no function compiled for one processor is linked for another.
// For the same reason no template of the standard library is used here.
#pragma once

#include <cmath>

#include "attention.inc.h"
#include "fixed.inc.h"
#include "kernel_set.h"
#include "repeat.inc.h"

namespace river {
namespace {

// How far ahead of their use codes are fetched, into the first level cache. Weights of bfloat16 are
// left to the processor's own prefetching: fetching them gained for two rows and lost for four.
constexpr int kCodesAhead = 8192;

// ---- activations ----------------------------------------------------------------------------

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

size_t pairs_bytes(int columns) {
  return sizeof(Pair) * static_cast<size_t>(round_up(columns, kInputBlock) / 2);
}

void prepare_pairs(const float* x, int count, void* out) {
  auto* pairs = static_cast<Pair*>(out);
  int i = 0;
  for (; i < count; i += kLanes) store_pairs(load(x + i), pairs + i / 2);
  for (; i < round_up(count, kInputBlock); i += kLanes) store_pairs(zero(), pairs + i / 2);
}

// A group of activations in fixed point: x = scale * (256 * high + low).
struct FixedGroup {
  float scale;
  float sum;          // of the group's x, as they were rounded
  int32_t whole_sum;  // the same without the scale
  int32_t unused;
};
// After the groups of a row, for every 8 inputs four words of signed bytes: high of the inputs
// 0 2 4 6, high of 1 3 5 7, low of 0 2 4 6, low of 1 3 5 7 (the order of nibbles in a code word).

size_t fixed_bytes(int columns, int group_size) {
  return static_cast<size_t>(columns / group_size) * sizeof(FixedGroup) +
         static_cast<size_t>(columns) * 2;
}

void prepare_fixed(const float* x, int count, int group_size, void* out) {
  const int num_groups = count / group_size;
  auto* groups = static_cast<FixedGroup*>(out);
  auto* bytes = reinterpret_cast<int8_t*>(groups + num_groups);
  for (int g = 0; g < num_groups; ++g, x += group_size, bytes += 2 * group_size) {
    const Fixed fixed = to_fixed(x, group_size, [&](Floats whole, int i) {
      split_fixed(whole, bytes + 2 * i);
    });
    groups[g] = {fixed.scale, fixed.scale * static_cast<float>(fixed.sum), fixed.sum, 0};
  }
}

// ---- products -------------------------------------------------------------------------------

// Sixteen outputs of each of `Panels` panels, for `Rows` rows, with bfloat16 weights: kChains sums
// of every kChains-th pair, whatever the numbers of rows and panels.
template <int Rows, int Panels>
void panel_pairs(const uint8_t* panel, size_t panel_bytes, int pairs, const uint8_t* x,
                 size_t x_stride, float* out, size_t out_stride) {
  static_assert(kChains == 1 || kChains == 2);
  Floats acc[Rows][Panels][kChains];
  repeat<Rows * Panels>([&]<int I>() RIVER_INLINE {
    repeat<kChains>([&]<int C>() RIVER_INLINE { acc[I / Panels][I % Panels][C] = zero(); });
  });
  for (int k = 0; k < pairs; k += kChains, panel += 64 * kChains) {
    repeat<kChains>([&]<int C>() RIVER_INLINE {
      Words w[Panels];
      repeat<Panels>([&]<int P>() RIVER_INLINE {
        w[P] = load_words(panel + P * panel_bytes + 64 * C);
      });
      repeat<Rows>([&]<int R>() RIVER_INLINE {
        const auto* pair = reinterpret_cast<const Pair*>(x + R * x_stride) + k + C;
        repeat<Panels>([&]<int P>()
                           RIVER_INLINE { acc[R][P][C] = dot_pair(acc[R][P][C], w[P], pair); });
      });
    });
  }
  repeat<Rows * Panels>([&]<int I>() RIVER_INLINE {
    constexpr int R = I / Panels, P = I % Panels;
    if constexpr (kChains == 2) acc[R][P][0] = add(acc[R][P][0], acc[R][P][1]);
    store(out + R * out_stride + P * kLanes, acc[R][P][0]);
  });
}

// Words of four codes that lie together: of the inputs 0 2 4 6, 1 3 5 7 (6 bits: 8 10 12 14 and
// 9 11 13 15 too; 3 and 5 bits: and so on, of 32 inputs).
template <int Bits>
constexpr int kCodeWords = Bits == 3 || Bits == 5 ? 8 : Bits == 6 ? 4 : 2;

// Calls use.operator()<0>(codes) ... <kCodeWords<Bits> - 1>(codes) with the words at `panel`;
// returns where the next ones are.
template <int Bits, class Use>
RIVER_INLINE inline const uint8_t* read_codes(const uint8_t* panel, Use use) {
  constexpr int kRegisters = kCodeWords<Bits> * Bits / 8;
  repeat<kRegisters>([&]<int R>() RIVER_INLINE { prefetch_near(panel + kCodesAhead + 64 * R); });
  if constexpr (Bits == 4) {
    const Words both = load_words(panel);
    use.template operator()<0>(low_nibbles(both));
    use.template operator()<1>(high_nibbles(both));
  } else if constexpr (Bits == 3) {
    const Words pairs[3] = {load_words(panel), load_words(panel + 64), load_words(panel + 128)};
    repeat<3>([&]<int P>() RIVER_INLINE {
      use.template operator()<2 * P>(low_three_bits(pairs[P]));
      use.template operator()<2 * P + 1>(next_three_bits(pairs[P]));
    });
    const Words last = upper_two_bits(pairs[0], pairs[1], pairs[2]);
    use.template operator()<6>(low_three_bits(last));
    use.template operator()<7>(next_three_bits(last));
  } else if constexpr (Bits == 5) {
    const Words upper = load_words(panel + 256);
    repeat<4>([&]<int P>() RIVER_INLINE {
      const Words both = load_words(panel + 64 * P);
      use.template operator()<2 * P>(with_fifth_bit<2 * P>(low_nibbles(both), upper));
      use.template operator()<2 * P + 1>(with_fifth_bit<2 * P + 1>(high_nibbles(both), upper));
    });
  } else if constexpr (Bits == 6) {
    const Words first = load_words(panel), second = load_words(panel + 64);
    const Words third = load_words(panel + 128);
    use.template operator()<0>(low_six_bits(first));
    use.template operator()<1>(low_six_bits(second));
    use.template operator()<2>(low_six_bits(third));
    use.template operator()<3>(upper_two_bits(first, second, third));
  } else {
    use.template operator()<0>(load_words(panel));
    use.template operator()<1>(load_words(panel + 64));
  }
  return panel + 64 * kRegisters;
}

// Sixteen outputs of `Rows` rows with codes of `Bits`, group by group:
//   sum of w x = scale * sum of (code - 2**(Bits - 1)) x + zero * sum of x
template <int Bits, int Rows>
void panel_codes(const uint8_t* panel, int num_groups, int group_size, const uint8_t* x,
                 size_t x_stride, float* out, size_t out_stride) {
  Floats total[Rows];
  for (int r = 0; r < Rows; ++r) total[r] = zero();
  const size_t words_start = static_cast<size_t>(num_groups) * sizeof(FixedGroup);
  for (int g = 0; g < num_groups; ++g) {
    prefetch_near(panel + kCodesAhead);
    const Words scale_and_zero = load_words(panel);
    panel += 64;
    Ints high[Rows], low[Rows];
    for (int r = 0; r < Rows; ++r) {
      const auto* groups = reinterpret_cast<const FixedGroup*>(x + r * x_stride);
      high[r] = zero_ints();
      low[r] = set1_int(-(1 << (Bits - 1)) * groups[g].whole_sum);
    }
    const uint8_t* words = x + words_start + static_cast<size_t>(g) * group_size * 2;
    for (int i = 0; i < group_size; i += 4 * kCodeWords<Bits>, words += 8 * kCodeWords<Bits>)
      panel = read_codes<Bits>(panel, [&]<int W>(Words codes) RIVER_INLINE {
        for (int r = 0; r < Rows; ++r) {
          const auto* w = reinterpret_cast<const uint32_t*>(words + r * x_stride) + W / 2 * 4 + W % 2;
          if constexpr (Bits == 8) {
            high[r] = dot_bytes(high[r], codes, w[0]);
            low[r] = dot_bytes(low[r], codes, w[2]);
          } else {
            high[r] = dot_six_bits(high[r], codes, w[0]);
            low[r] = dot_six_bits(low[r], codes, w[2]);
          }
        }
      });
    // Unrolled, or GCC 11 and 12 vectorise it at -O3 where lanes are an array, and then read the
    // group of the row after the last, where there may be no memory.
    static_assert(Rows <= 8);
    RIVER_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const FixedGroup& group = reinterpret_cast<const FixedGroup*>(x + r * x_stride)[g];
      const Floats codes = mul(to_floats(times_256_plus(high[r], low[r])), set1(group.scale));
      total[r] = fma(high_bf16(scale_and_zero), codes, total[r]);
      total[r] = fma(low_bf16(scale_and_zero), set1(group.sum), total[r]);
    }
  }
  for (int r = 0; r < Rows; ++r) store(out + r * out_stride, total[r]);
}

// Rows that stay in the second level cache while the panels pass by.
inline int rows_in_cache(size_t x_stride) {
  const auto rows = static_cast<int>((512u << 10) / (x_stride + 1));
  return rows < 12 ? 12 : rows;
}

template <int Panels>
void panel_pairs_rows(const PackedMatrix& matrix, int panel, const uint8_t* x, size_t x_stride,
                      int rows, float* out, size_t out_stride) {
  constexpr int kMaxRows = kPairSums / (kChains * Panels);
  for (int r = 0; r < rows; r += kMaxRows)
    with_count<kMaxRows>(rows - r, [&]<int Rows>() {
      panel_pairs<Rows, Panels>(matrix.panel(panel), matrix.panel_bytes, matrix.columns / 2,
                                x + r * x_stride, x_stride,
                                out + r * out_stride + panel * kLanes, out_stride);
    });
}

template <int Bits>
void panel_codes_rows(const PackedMatrix& matrix, int panel, const uint8_t* x, size_t x_stride,
                      int rows, float* out, size_t out_stride) {
  for (int r = 0; r < rows; r += kMaxCodeRows)
    with_count<kMaxCodeRows>(rows - r, [&]<int Rows>() {
      panel_codes<Bits, Rows>(matrix.panel(panel), matrix.columns / matrix.group_size,
                              matrix.group_size, x + r * x_stride, x_stride,
                              out + r * out_stride + panel * kLanes, out_stride);
    });
}

void matmul(const PackedMatrix& matrix, int first, int last, const void* x, size_t x_stride,
            int rows, float* out, size_t out_stride) {
  const int block = rows_in_cache(x_stride);
  for (int start = 0; start < rows; start += block) {
    const int count = rows - start < block ? rows - start : block;
    const uint8_t* x_block = static_cast<const uint8_t*>(x) + start * x_stride;
    float* out_block = out + start * out_stride;
    int p = first;
    if (matrix.bits == 16 && count > kPairSums / kChains)  // the panels are read several times
      for (; p + kPanelsTogether <= last; p += kPanelsTogether)
        panel_pairs_rows<kPanelsTogether>(matrix, p, x_block, x_stride, count, out_block, out_stride);
    for (; p < last; ++p) {
      if (matrix.bits == 16)
        panel_pairs_rows<1>(matrix, p, x_block, x_stride, count, out_block, out_stride);
      else if (matrix.bits == 3)
        panel_codes_rows<3>(matrix, p, x_block, x_stride, count, out_block, out_stride);
      else if (matrix.bits == 4)
        panel_codes_rows<4>(matrix, p, x_block, x_stride, count, out_block, out_stride);
      else if (matrix.bits == 5)
        panel_codes_rows<5>(matrix, p, x_block, x_stride, count, out_block, out_stride);
      else if (matrix.bits == 6)
        panel_codes_rows<6>(matrix, p, x_block, x_stride, count, out_block, out_stride);
      else
        panel_codes_rows<8>(matrix, p, x_block, x_stride, count, out_block, out_stride);
    }
  }
}

// ---- the rest of a layer --------------------------------------------------------------------

void rms_norm(const float* x, const float* weight, int count, float epsilon, float* out) {
  Floats squares = zero();
  for (int i = 0; i < count; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Floats factor = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + epsilon));
  for (int i = 0; i < count; i += kLanes) {
    const Floats normed = mul(load(x + i), factor);
    store(out + i, weight == nullptr ? normed : mul(normed, load(weight + i)));
  }
}

void add_to(float* x, const float* y, const float* bias, int count) {
  for (int i = 0; i < count; i += kLanes) {
    Floats total = add(load(x + i), load(y + i));
    if (bias != nullptr) total = add(total, load(bias + i));
    store(x + i, total);
  }
}

float cosine(const float* a, const float* b, int count) {
  Floats ab = zero(), aa = zero(), bb = zero();
  for (int i = 0; i < count; i += kLanes) {
    const Floats x = load(a + i), y = load(b + i);
    ab = fma(x, y, ab);
    aa = fma(x, x, aa);
    bb = fma(y, y, bb);
  }
  // each norm is at least 1e-8, as in torch.nn.functional.cosine_similarity
  const float a_norm = std::sqrt(sum(aa)), b_norm = std::sqrt(sum(bb));
  const float result =
      sum(ab) / ((a_norm > 1e-8f ? a_norm : 1e-8f) * (b_norm > 1e-8f ? b_norm : 1e-8f));
  return result > 1.0f ? 1.0f : result < -1.0f ? -1.0f : result;
}

void gated(const float* gate_up, const float* bias, int blocks, bool gelu, float* out) {
  for (int b = 0; b < blocks; ++b, gate_up += 2 * kLanes, out += kLanes) {
    Floats gate = load(gate_up), up = load(gate_up + kLanes);
    if (bias != nullptr) {
      gate = add(gate, load(bias));
      up = add(up, load(bias + kLanes));
      bias += 2 * kLanes;
    }
    Floats argument = gate;
    if (gelu) {  // the tanh form: gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3))
      const Floats cube = mul(mul(gate, gate), gate);
      argument = mul(fma(cube, set1(0.044715f), gate), set1(1.5957691216f));
    }
    const Floats denominator = add(set1(1.0f), exponential(sub(zero(), argument)));
    store(out, mul(div(gate, denominator), up));
  }
}

void rope(float* head, int head_dim, int rotary, const float* cosines, const float* sines,
          float scale) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosines[i] - second * sines[i];
    head[half + i] = second * cosines[i] + first * sines[i];
  }
  if (scale != 1.0f)
    for (int i = 0; i < head_dim; ++i) head[i] *= scale;
}

void fetch(const uint8_t* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) prefetch(data + i);
}

uint32_t read(const uint8_t* data, size_t bytes) {
  constexpr size_t kAhead = 2048;
  Ints sums = zero_ints();
  for (size_t i = 0; i + 256 <= bytes; i += 256)
    for (size_t line = 0; line < 256; line += 64) {
      prefetch(data + i + line + kAhead);
      sums = times_256_plus(sums, load_ints(data + i + line));
    }
  return static_cast<uint32_t>(sum(to_floats(sums)));
}

int argmax(const float* values, int count, float* most) {
  Floats maximum = set1(values[0]), differences = zero();
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats x = load(values + i);
    maximum = max(maximum, x);
    differences = add(differences, sub(x, x));  // NaN where one is infinite or NaN
  }
  float best = largest(maximum), difference = sum(differences);
  for (; i < count; ++i) {
    best = values[i] > best ? values[i] : best;
    difference += values[i] - values[i];
  }
  for (i = 0; difference != 0 && i < count; ++i)
    if (values[i] != values[i]) {
      *most = values[i];
      return i;
    }
  *most = best;
  for (i = 0; i < count; ++i)
    if (values[i] == best) return i;
  return 0;
}

// Constant-initialised: no code of this instruction set runs before the processor is known.
constexpr KernelSet make_kernel_set(const char* name) {
  KernelSet set{};
  set.name = name;
  set.pairs_bytes = pairs_bytes;
  set.prepare_pairs = prepare_pairs;
  set.query_bytes = query_bytes;
  set.prepare_query = prepare_query;
  set.fixed_bytes = fixed_bytes;
  set.prepare_fixed = prepare_fixed;
  set.matmul = matmul;
  set.attend_page = attend_page;
  set.merge_partial = merge_partial;
  set.finish_partial = finish_partial;
  set.rms_norm = rms_norm;
  set.add = add_to;
  set.cosine = cosine;
  set.gated = gated;
  set.rope = rope;
  set.argmax = argmax;
  set.fetch = fetch;
  set.read = read;
  return set;
}

}  // namespace
}  // namespace river
