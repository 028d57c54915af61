// What a step asks of an instruction set. One KernelSet for each: portable, neon, avx2, avx512,
// avx512bf16, amx. All of them compute the same thing from the same packed weights (packing.h);
// only the order of summation differs, and within one set it does not depend on the number of rows,
// so that a row of a batch has the same bits as that row alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../bfloat16.h"

namespace river {

constexpr int kLanes = 16;         // outputs in a panel: the lanes of a vector register
constexpr int kInputBlock = 32;    // inputs are padded to a multiple of this
constexpr int kPagePositions = 64; // positions in a page of the KV cache

// A weight matrix in panels of 16 outputs, see packing.h.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  size_t panel_bytes = 0;
  int rows = 0;        // outputs, N
  int columns = 0;     // inputs, K, a multiple of kInputBlock
  int bits = 16;       // 16: bfloat16; 3, 4, 5, 6 or 8: codes in groups
  int group_size = 0;  // of codes

  int panels() const { return (rows + kLanes - 1) / kLanes; }
  size_t bytes() const { return panel_bytes * static_cast<size_t>(panels()); }
  const uint8_t* panel(int index) const { return data + panel_bytes * static_cast<size_t>(index); }
};

// One page of one key-value head of one layer, for a block of query vectors. Words of keys and
// values are pairs of bfloat16, or four signed codes: x = code * scale of the position.
struct PageAttention {
  const uint32_t* keys;       // [position / 16][D / 2 or D / 4][16], of dims
  const uint32_t* values;     // [position / 2 or position / 4][D], of positions
  const float* key_scales;    // [positions]; null: bfloat16
  const float* value_scales;  // [positions]
  ptrdiff_t next;             // bytes to the same place of the page that comes after this one; or 0
  int head_dim;               // D, a multiple of 16
  int queries;                // Q
  const void* query;          // [Q][D], as prepare_query wrote them
  size_t query_stride;        // bytes from one query to the next
  const int* begin;           // [Q] first position in the page that the query sees
  const int* end;             // [Q] one past the last; begin >= end: it sees none
  float* partial;             // [Q][D + 2]: weighted sum of values, maximum score, sum of weights
  size_t partial_stride;      // floats from one query's partial to the next
};

struct KernelSet {
  const char* name;

  // Activations of one row for a product with bfloat16 weights: rounded to bfloat16, zero from
  // `count` on to the next multiple of kInputBlock.
  size_t (*pairs_bytes)(int columns);
  void (*prepare_pairs)(const float* x, int count, void* out);

  // A query of attention, [D], for a cache of so many bits: rounded to bfloat16, or for codes to
  // 16-bit fixed point with one scale.
  size_t (*query_bytes)(int head_dim, int kv_bits);
  void (*prepare_query)(const float* x, int head_dim, int kv_bits, void* out);

  // Activations of one row for a product with codes: 16-bit fixed point, one scale a group.
  size_t (*fixed_bytes)(int columns, int group_size);
  void (*prepare_fixed)(const float* x, int count, int group_size, void* out);

  // out[row][p * 16 + lane] for the panels p in [first, last) of `matrix`; `x` holds `rows` rows
  // prepared as the matrix's bits ask, `x_stride` bytes apart; `out_stride` counts floats.
  void (*matmul)(const PackedMatrix& matrix, int first, int last, const void* x, size_t x_stride,
                 int rows, float* out, size_t out_stride);

  void (*attend_page)(const PageAttention& page);
  // Adds a page's partial to a running one, in the order of pages; both [D + 2].
  void (*merge_partial)(const float* partial, int head_dim, float* running);
  // out[d] = running[d] / running sum of weights
  void (*finish_partial)(const float* running, int head_dim, float* out);

  // out = x / rms(x) * weight; a null weight stands for ones. out may be x.
  void (*rms_norm)(const float* x, const float* weight, int count, float epsilon, float* out);
  // x += y (+ bias)
  void (*add)(float* x, const float* y, const float* bias, int count);
  // cos(a, b), in [-1, 1]; 0 where one of them is zero, as PyTorch defines it
  float (*cosine)(const float* a, const float* b, int count);
  // out[i] = activation(gate[i]) * up[i] for 16-wide blocks that lie in turn: gate, up, gate ...
  void (*gated)(const float* gate_up, const float* bias, int blocks, bool gelu, float* out);
  // Rotates the first `rotary` dims of a head by the position's angles, then scales the head.
  void (*rope)(float* head, int head_dim, int rotary, const float* cosines, const float* sines,
               float scale);
  // Starts to bring memory that is wanted next into the cache.
  void (*fetch)(const uint8_t* data, size_t bytes);
  // Reads memory as fast as it can, to measure how fast that is; the result means nothing.
  uint32_t (*read)(const uint8_t* data, size_t bytes);
  // The largest of `count` values and its index; the first one of equals. NaN is the largest.
  int (*argmax)(const float* values, int count, float* largest);
};

// The sets that this processor can run, best first. Always ends with the portable one.
int available_kernel_sets(const KernelSet** sets);  // at most kMaxKernelSets
constexpr int kMaxKernelSets = 6;

}  // namespace river
