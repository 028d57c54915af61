// Attention over a page of the KV cache, in bfloat16 and in codes, in terms of the sixteen lanes of a
// simd_*.h. See kernels.inc.h for why all is unnamed here.
#pragma once

#include <cmath>

#include "fixed.inc.h"
#include "kernel_set.h"
#include "repeat.inc.h"

namespace river {
namespace {

// ---- queries --------------------------------------------------------------------------------

// A query for keys in codes: scale * whole number, D of them after this.
struct FixedQuery {
  float scale;
  int32_t unused;

  int16_t* numbers() { return reinterpret_cast<int16_t*>(this + 1); }
  const int16_t* numbers() const { return reinterpret_cast<const int16_t*>(this + 1); }
};

size_t query_bytes(int head_dim, int kv_bits) {
  const auto dims = static_cast<size_t>(head_dim);
  return kv_bits == 16 ? sizeof(Pair) * dims / 2 : sizeof(FixedQuery) + sizeof(int16_t) * dims;
}

void prepare_query(const float* x, int head_dim, int kv_bits, void* out) {
  if (kv_bits == 16) {
    auto* pairs = static_cast<Pair*>(out);
    for (int d = 0; d < head_dim; d += kLanes) store_pairs(load(x + d), pairs + d / 2);
  } else {
    auto* query = static_cast<FixedQuery*>(out);
    query->scale = to_fixed(x, head_dim, [&](Floats whole, int d) {
      store_shorts(whole, query->numbers() + d);
    }).scale;
  }
}

// ---- scores and weights ---------------------------------------------------------------------

// e**x within 2e-7, by a polynomial on [-ln 2 / 2, ln 2 / 2]
inline Floats exponential(Floats x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  const Floats n = round_to_int(mul(x, set1(1.44269504f)));
  Floats r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Floats p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return times_power_of_2(p, n);
}

constexpr float kNothingSeen = -1e30f;  // the maximum of no scores

// The blocks of sixteen positions of which some query of a group sees some.
struct Blocks {
  int first = kPagePositions / kLanes, last = 0;  // [first, last)

  Blocks(const PageAttention& page, int start, int queries) {
    for (int q = start; q < start + queries; ++q) {
      const int begin = page.begin[q] / kLanes, end = (page.end[q] + kLanes - 1) / kLanes;
      first = begin < first ? begin : first;
      last = end > last ? end : last;
    }
  }
};

// Puts `other` in place of those positions of a block that a query doesn't see.
inline Floats keep_seen(const PageAttention& page, int query, int block, Floats x, float other) {
  int begin = page.begin[query] - block * kLanes, end = page.end[query] - block * kLanes;
  begin = begin < 0 ? 0 : begin > kLanes ? kLanes : begin;
  end = end < begin ? begin : end > kLanes ? kLanes : end;
  return begin > 0 || end < kLanes ? keep_lanes(x, begin, end, other) : x;
}

// weights = e**(score - maximum), in place of a query's scores; their maximum and the weights' sum
// go into its partial.
inline void weigh(const PageAttention& page, int query, Blocks blocks, Floats most, float* scores) {
  float* partial = page.partial + query * page.partial_stride;
  const float maximum = largest(most);
  Floats weight_sum = zero();
  for (int b = blocks.first; b < blocks.last; ++b) {
    const Floats score = load(&scores[b * kLanes]);
    // where a query sees nothing, its weights are zero, not e**0 and not e**-87
    Floats weight = maximum > kNothingSeen ? exponential(sub(score, set1(maximum))) : zero();
    weight = keep_seen(page, query, b, weight, 0.0f);
    weight_sum = add(weight_sum, weight);
    store(&scores[b * kLanes], weight);
  }
  partial[page.head_dim] = maximum;
  partial[page.head_dim + 1] = sum(weight_sum);
}

// Starts to bring that line of the page which comes next into the cache: the processor's own
// prefetching ends with a page.
RIVER_INLINE inline void fetch_next(const PageAttention& page, const void* line) {
  prefetch(static_cast<const uint8_t*>(line) + page.next);
}

inline const void* query_at(const PageAttention& page, int query) {
  return static_cast<const uint8_t*>(page.query) + query * page.query_stride;
}

// ---- a page in bfloat16 ---------------------------------------------------------------------

template <int Queries>
void attend(const PageAttention& page, int start) {
  const int dims = page.head_dim;
  const Blocks blocks(page, start, Queries);
  const Pair* query[Queries];
  for (int q = 0; q < Queries; ++q) query[q] = static_cast<const Pair*>(query_at(page, start + q));

  // scores[q][position] = query . key
  float scores[Queries][kPagePositions];
  Floats most[Queries];
  for (int q = 0; q < Queries; ++q) most[q] = set1(kNothingSeen);
  for (int b = blocks.first; b < blocks.last; ++b) {
    const uint32_t* keys = page.keys + static_cast<size_t>(b) * dims / 2 * kLanes;
    Floats acc[Queries];
    repeat<Queries>([&]<int Q>() RIVER_INLINE { acc[Q] = zero(); });
    for (int pair = 0; pair < dims / 2; ++pair) {
      const Words w = load_words(keys + pair * kLanes);
      fetch_next(page, keys + pair * kLanes);
      repeat<Queries>([&]<int Q>()
                          RIVER_INLINE { acc[Q] = dot_pair(acc[Q], w, query[Q] + pair); });
    }
    repeat<Queries>([&]<int Q>() RIVER_INLINE {
      acc[Q] = keep_seen(page, start + Q, b, acc[Q], kNothingSeen);
      most[Q] = max(most[Q], acc[Q]);
      store(&scores[Q][b * kLanes], acc[Q]);
    });
  }

  Pair weights[Queries][kPagePositions / 2];
  for (int q = 0; q < Queries; ++q) {
    weigh(page, start + q, blocks, most[q], scores[q]);
    for (int b = blocks.first; b < blocks.last; ++b)
      store_pairs(load(&scores[q][b * kLanes]), &weights[q][b * kLanes / 2]);
  }

  // partial[d] = sum over positions of weight * value, kValueVectors times 16 dims at a time
  for (int d = 0; d < dims; d += kLanes * kValueVectors) {
    with_count<kValueVectors>((dims - d) / kLanes, [&]<int Vectors>() {
      Floats acc[Queries][Vectors];
      repeat<Queries * Vectors>(
          [&]<int I>() RIVER_INLINE { acc[I / Vectors][I % Vectors] = zero(); });
      for (int pair = blocks.first * kLanes / 2; pair < blocks.last * kLanes / 2; ++pair) {
        const uint32_t* values = page.values + static_cast<size_t>(pair) * dims + d;
        repeat<Vectors>([&]<int V>() RIVER_INLINE {
          const Words w = load_words(values + V * kLanes);
          fetch_next(page, values + V * kLanes);
          repeat<Queries>([&]<int Q>() RIVER_INLINE {
            acc[Q][V] = dot_pair(acc[Q][V], w, &weights[Q][pair]);
          });
        });
      }
      repeat<Queries * Vectors>([&]<int I>() RIVER_INLINE {
        constexpr int Q = I / Vectors, V = I % Vectors;
        store(page.partial + (start + Q) * page.partial_stride + d + V * kLanes, acc[Q][V]);
      });
    });
  }
}

// ---- a page in codes ------------------------------------------------------------------------

// The sums over codes are whole numbers, and exact. A position's scale is a factor of its score, and
// of its weight where that meets its value.
template <int Queries>
void attend_codes(const PageAttention& page, int start) {
  const int dims = page.head_dim;
  const Blocks blocks(page, start, Queries);
  const FixedQuery* query[Queries];
  for (int q = 0; q < Queries; ++q)
    query[q] = static_cast<const FixedQuery*>(query_at(page, start + q));

  // scores[q][position] = query . key
  float scores[Queries][kPagePositions];
  Floats most[Queries];
  for (int q = 0; q < Queries; ++q) most[q] = set1(kNothingSeen);
  for (int b = blocks.first; b < blocks.last; ++b) {
    const uint32_t* keys = page.keys + static_cast<size_t>(b) * dims / 4 * kLanes;
    Ints acc[Queries];
    repeat<Queries>([&]<int Q>() RIVER_INLINE { acc[Q] = zero_ints(); });
    for (int d = 0; d < dims; d += 4) {
      const Words w = load_words(keys + d / 4 * kLanes);
      fetch_next(page, keys + d / 4 * kLanes);
      const Words first = first_codes(w), last = last_codes(w);
      repeat<Queries>([&]<int Q>() RIVER_INLINE {
        const int16_t* x = query[Q]->numbers() + d;
        acc[Q] = dot_shorts(dot_shorts(acc[Q], first, x), last, x + 2);
      });
    }
    const Floats scales = load(page.key_scales + b * kLanes);
    fetch_next(page, page.key_scales + b * kLanes);
    repeat<Queries>([&]<int Q>() RIVER_INLINE {
      const Floats score = mul(to_floats(acc[Q]), mul(scales, set1(query[Q]->scale)));
      const Floats seen = keep_seen(page, start + Q, b, score, kNothingSeen);
      most[Q] = max(most[Q], seen);
      store(&scores[Q][b * kLanes], seen);
    });
  }

  int16_t weights[Queries][kPagePositions];
  float weight_scale[Queries];
  const int begin = blocks.first * kLanes, end = blocks.last * kLanes;
  for (int b = blocks.first; b < blocks.last; ++b) fetch_next(page, page.value_scales + b * kLanes);
  for (int q = 0; q < Queries; ++q) {
    weigh(page, start + q, blocks, most[q], scores[q]);
    for (int b = blocks.first; b < blocks.last; ++b) {
      float* of_block = &scores[q][b * kLanes];
      const Floats scaled = mul(load(of_block), load(page.value_scales + b * kLanes));
      // the scale of a position that isn't seen may be no number
      store(of_block, keep_seen(page, start + q, b, scaled, 0.0f));
    }
    weight_scale[q] = to_fixed(&scores[q][begin], end - begin, [&](Floats whole, int p) {
      store_shorts(whole, &weights[q][begin + p]);
    }).scale;
  }

  // partial[d] = sum over positions of weight * value
  for (int d = 0; d < dims; d += kLanes * kValueVectors) {
    with_count<kValueVectors>((dims - d) / kLanes, [&]<int Vectors>() {
      Ints acc[Queries][Vectors];
      repeat<Queries * Vectors>(
          [&]<int I>() RIVER_INLINE { acc[I / Vectors][I % Vectors] = zero_ints(); });
      for (int p = begin; p < end; p += 4) {
        const uint32_t* values = page.values + static_cast<size_t>(p) / 4 * dims + d;
        repeat<Vectors>([&]<int V>() RIVER_INLINE {
          const Words w = load_words(values + V * kLanes);
          fetch_next(page, values + V * kLanes);
          const Words first = first_codes(w), last = last_codes(w);
          repeat<Queries>([&]<int Q>() RIVER_INLINE {
            const int16_t* x = &weights[Q][p];
            acc[Q][V] = dot_shorts(dot_shorts(acc[Q][V], first, x), last, x + 2);
          });
        });
      }
      repeat<Queries * Vectors>([&]<int I>() RIVER_INLINE {
        constexpr int Q = I / Vectors, V = I % Vectors;
        store(page.partial + (start + Q) * page.partial_stride + d + V * kLanes,
              mul(to_floats(acc[Q][V]), set1(weight_scale[Q])));
      });
    });
  }
}

// ---- pages together -------------------------------------------------------------------------

void attend_page(const PageAttention& page) {
  for (int q = 0; q < page.queries; q += kMaxQueries)
    with_count<kMaxQueries>(page.queries - q, [&]<int Queries>() {
      if (page.key_scales == nullptr)
        attend<Queries>(page, q);
      else
        attend_codes<Queries>(page, q);
    });
}

void merge_partial(const float* partial, int head_dim, float* running) {
  if (partial[head_dim + 1] == 0.0f) return;  // it saw nothing
  const float maximum =
      partial[head_dim] > running[head_dim] ? partial[head_dim] : running[head_dim];
  const float old_factor = std::exp(running[head_dim] - maximum);
  const float new_factor = std::exp(partial[head_dim] - maximum);
  for (int d = 0; d < head_dim; d += kLanes)
    store(running + d, fma(load(partial + d), set1(new_factor),
                           mul(load(running + d), set1(old_factor))));
  running[head_dim] = maximum;
  running[head_dim + 1] =
      running[head_dim + 1] * old_factor + partial[head_dim + 1] * new_factor;
}

void finish_partial(const float* running, int head_dim, float* out) {
  const Floats inverse = set1(1.0f / running[head_dim + 1]);
  for (int d = 0; d < head_dim; d += kLanes) store(out + d, mul(load(running + d), inverse));
}

}  // namespace
}  // namespace river
