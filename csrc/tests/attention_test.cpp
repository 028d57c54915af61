// Attention over the pages of the KV cache, against attention in double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "kv_cache.h"

namespace river::test {
namespace {

constexpr int kPositions = 150;  // three pages, the last one not full

// Keys or values [positions, D] that the cache holds as they are: bfloat16, or codes times a scale.
std::vector<float> states(int head_dim, float size, int kv_bits, Random& random) {
  std::vector<float> all(static_cast<size_t>(kPositions) * head_dim);
  for (int p = 0; p < kPositions; ++p) {
    float* state = all.data() + p * head_dim;
    const float scale = random.real(0.1f, 1.0f) * size / 127;
    for (int d = 0; d < head_dim; ++d)
      state[d] = kv_bits == 16 ? rounded(random.real(-size, size))
                               : static_cast<float>(random.whole(-127, 127)) * scale;
    if (kv_bits == 8) state[random.whole(0, head_dim - 1)] = 127 * scale;
  }
  return all;
}

struct Sequence {
  Sequence(int dims, float size, int kv_bits, Random& random)
      : head_dim(dims),
        cache(1, 1, head_dim, kv_bits),
        keys(states(head_dim, size, kv_bits, random)),
        values(states(head_dim, 1.0f, kv_bits, random)) {
    cache.add();
    cache.reserve(0, kPositions);
    for (int p = 0; p < kPositions; ++p)
      cache.write(0, p, 0, 0, keys.data() + p * head_dim, values.data() + p * head_dim);
    cache.set_length(0, kPositions);
  }

  int head_dim;
  KvCache cache;
  std::vector<float> keys, values;  // [positions, D]
};

struct Queries {
  Queries(const KernelSet& kernels, int count, int head_dim, int kv_bits, Random& random)
      : stride(kernels.query_bytes(head_dim, kv_bits)),
        vectors(random.reals(static_cast<size_t>(count) * head_dim)),
        prepared(stride * static_cast<size_t>(count)) {
    for (int q = 0; q < count; ++q) {
      kernels.prepare_query(vectors.data() + q * head_dim, head_dim, kv_bits,
                            prepared.as<uint8_t>() + stride * static_cast<size_t>(q));
      begin.push_back(q % 3 == 0 ? 0 : random.whole(0, kPositions - 1));
      end.push_back(random.whole(begin.back() + 1, kPositions));
    }
    begin[0] = 0;
    end[0] = kPositions;
  }

  size_t stride;
  std::vector<float> vectors;  // [queries, D]
  Guarded prepared;
  std::vector<int> begin, end;  // positions that each sees
};

// begin and end count from the page's first position; partial is [queries, D + 2].
void attend_page(const KernelSet& kernels, const Sequence& sequence, int page,
                 const Queries& queries, const int* begin, const int* end, float* partial) {
  PageAttention attention{};
  attention.keys = sequence.cache.keys(0, page, 0, 0);
  attention.values = sequence.cache.values(0, page, 0, 0);
  attention.key_scales = sequence.cache.key_scales(0, page, 0, 0);
  attention.value_scales = sequence.cache.value_scales(0, page, 0, 0);
  attention.head_dim = sequence.head_dim;
  attention.queries = static_cast<int>(queries.begin.size());
  attention.query = queries.prepared.as<void>();
  attention.query_stride = queries.stride;
  attention.begin = begin;
  attention.end = end;
  attention.partial = partial;
  attention.partial_stride = static_cast<size_t>(sequence.head_dim + 2);
  kernels.attend_page(attention);
}

// [queries, D + 2] after all pages, as a pass computes it
std::vector<float> attend(const KernelSet& kernels, const Sequence& sequence,
                          const Queries& queries) {
  const int head_dim = sequence.head_dim;
  const int count = static_cast<int>(queries.begin.size());
  const auto partial_size = static_cast<size_t>(head_dim + 2);
  const Guarded partial(partial_size * static_cast<size_t>(count) * sizeof(float));
  std::vector<float> running(partial_size * static_cast<size_t>(count), 0.0f);
  for (int q = 0; q < count; ++q) running[partial_size * q + head_dim] = -1e30f;
  for (int page = 0; page * kPagePositions < kPositions; ++page) {
    std::vector<int> begin, end;
    for (int q = 0; q < count; ++q) {
      begin.push_back(std::max(0, queries.begin[q] - page * kPagePositions));
      end.push_back(std::min(kPagePositions, queries.end[q] - page * kPagePositions));
    }
    attend_page(kernels, sequence, page, queries, begin.data(), end.data(), partial.as<float>());
    for (int q = 0; q < count; ++q)
      kernels.merge_partial(partial.as<float>() + partial_size * q, head_dim,
                            running.data() + partial_size * q);
  }
  return running;
}

void check_query(const Sequence& sequence, const Queries& queries, int q, const float* actual) {
  const int head_dim = sequence.head_dim;
  const bool codes = sequence.cache.bits() == 8;
  const int begin = queries.begin[q], end = queries.end[q];
  std::vector<double> query(queries.vectors.begin() + q * head_dim,
                            queries.vectors.begin() + (q + 1) * head_dim);
  double largest = 0;
  for (const double x : query) largest = std::max(largest, std::fabs(x));
  for (double& x : query)  // fixed point has 32512 as its largest number
    x = codes ? std::nearbyint(x * 32512 / largest) * largest / 32512 : rounded(static_cast<float>(x));
  std::vector<double> scores;
  double maximum = -1e300, total = 0;
  for (int p = begin; p < end; ++p) {
    double score = 0;
    for (int d = 0; d < head_dim; ++d)
      score += query[static_cast<size_t>(d)] * sequence.keys[p * head_dim + d];
    scores.push_back(score);
    maximum = std::max(maximum, score);
  }
  for (double& score : scores) total += score = std::exp(score - maximum);
  std::vector<double> expected, magnitude;
  for (int d = 0; d < head_dim; ++d) {
    expected.push_back(0);
    magnitude.push_back(0);
    for (int p = begin; p < end; ++p) {
      const double value = sequence.values[p * head_dim + d];
      expected.back() += scores[p - begin] / total * value;
      magnitude.back() += scores[p - begin] / total * std::fabs(value);
    }
  }
  const double most = *std::max_element(magnitude.begin(), magnitude.end());
  for (int d = 0; d < head_dim; ++d) {
    // weights are rounded to bfloat16, or to fixed point by the largest of a page
    const double error = codes ? 0.0003 * most : 0.003 * magnitude[static_cast<size_t>(d)];
    CHECK(std::fabs(actual[d] - expected[static_cast<size_t>(d)]) <= error + 1e-6);
  }
}

}  // namespace

TEST(attention_by_pages_is_attention) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const int kv_bits : {16, 8})
      for (const int head_dim : {16, 48, 64, 80, 128, 256})
        for (const float size : {0.3f, 20.0f}) {  // of the keys: flat and sharp
          Random random(7);
          const Sequence sequence(head_dim, size, kv_bits, random);
          for (const int count : {1, 2, 3, 5, 9}) {
            const Queries queries(kernels, count, head_dim, kv_bits, random);
            const std::vector<float> running = attend(kernels, sequence, queries);
            const Guarded out(static_cast<size_t>(head_dim) * sizeof(float));
            for (int q = 0; q < count; ++q) {
              kernels.finish_partial(running.data() + q * (head_dim + 2), head_dim, out.as<float>());
              check_query(sequence, queries, q, out.as<float>());
            }
          }
        }
  });
}

TEST(sums_over_codes_are_exact_in_the_widest_heads) {
  constexpr int kDims = 512;
  with_each_kernel_set([](const KernelSet& kernels) {
    const std::vector<float> largest(kDims, -3.0f), value(kDims, 0.5f);
    KvCache cache(1, 1, kDims, 8);
    cache.add();
    cache.reserve(0, 1);
    cache.write(0, 0, 0, 0, largest.data(), value.data());
    const Guarded query(kernels.query_bytes(kDims, 8)), partial((kDims + 2) * sizeof(float));
    kernels.prepare_query(largest.data(), kDims, 8, query.as<void>());
    const int begin = 0, end = 1;
    PageAttention attention{};
    attention.keys = cache.keys(0, 0, 0, 0);
    attention.values = cache.values(0, 0, 0, 0);
    attention.key_scales = cache.key_scales(0, 0, 0, 0);
    attention.value_scales = cache.value_scales(0, 0, 0, 0);
    attention.head_dim = kDims;
    attention.queries = 1;
    attention.query = query.as<void>();
    attention.begin = &begin;
    attention.end = &end;
    attention.partial = partial.as<float>();
    kernels.attend_page(attention);
    CHECK(std::fabs(partial.as<float>()[kDims] - 9.0f * kDims) < 0.001f);  // the score
    CHECK(std::fabs(partial.as<float>()[kDims - 1] - 0.5f) < 1e-6f);
  });
}

// Nor where there is nothing: what a page holds behind the last position may be no number.
TEST(what_a_query_does_not_see_changes_no_bit) {
  constexpr int kHeadDim = 32, kStride = kHeadDim + 2;
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const int kv_bits : {16, 8})
      for (const int end : {1, 17, 40, 63}) {
        Random random(9);
        Sequence sequence(kHeadDim, 1.0f, kv_bits, random);
        const Queries queries(kernels, 2, kHeadDim, kv_bits, random);
        const int begins[2] = {0, 0}, ends[2] = {end, end};
        float before[2 * kStride], after[2 * kStride];
        attend_page(kernels, sequence, 0, queries, begins, ends, before);
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
          const std::vector<float> broken(kHeadDim, bad);
          for (int p = end; p < kPositions; ++p)
            sequence.cache.write(0, p, 0, 0, broken.data(), broken.data());
          sequence.cache.truncate(0, end);
          attend_page(kernels, sequence, 0, queries, begins, ends, after);
          CHECK(std::memcmp(before, after, sizeof before) == 0);
          sequence.cache.reserve(0, kPositions);
          sequence.cache.set_length(0, kPositions);
        }
      }
  });
}

TEST(a_query_that_sees_nothing_of_a_page_takes_nothing) {
  constexpr int kHeadDim = 32, kStride = kHeadDim + 2;
  const auto check = [](const KernelSet& kernels, int kv_bits) {
    Random random(8);
    const Sequence sequence(kHeadDim, 1.0f, kv_bits, random);
    const Queries queries(kernels, 3, kHeadDim, kv_bits, random);
    // alone, and beside one that sees all
    for (const int first_end : {0, kPagePositions}) {
      const int begin[3] = {0, 5, 64}, end[3] = {first_end, 5, 3};
      float partial[3 * kStride];
      attend_page(kernels, sequence, 0, queries, begin, end, partial);
      for (int q = 0; q < 3; ++q) {
        const bool sees = q == 0 && first_end > 0;
        CHECK((partial[q * kStride + kHeadDim + 1] > 0) == sees);
        std::vector<float> running = random.reals(kStride);
        running[kHeadDim + 1] = 2.0f;
        const std::vector<float> before = running;
        kernels.merge_partial(partial + q * kStride, kHeadDim, running.data());
        CHECK((running == before) == !sees);
      }
    }
  };
  with_each_kernel_set([&](const KernelSet& kernels) {
    for (const int kv_bits : {16, 8}) check(kernels, kv_bits);
  });
}

}  // namespace river::test
