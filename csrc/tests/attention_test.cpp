// Attention over the pages of the KV cache, against attention in double precision.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "kv_cache.h"
#include "tests.h"

namespace river::test {
namespace {

constexpr int kPositions = 150;  // three pages, the last one not full

struct Sequence {
  Sequence(int dims, float size, Random& random)
      : head_dim(dims),
        cache(1, 1, head_dim),
        keys(random.reals(static_cast<size_t>(kPositions) * head_dim, -size, size)),
        values(random.reals(static_cast<size_t>(kPositions) * head_dim)) {
    cache.resize(1);
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
  Queries(const KernelSet& kernels, int count, int head_dim, Random& random)
      : stride(kernels.query_bytes(head_dim)),
        vectors(random.reals(static_cast<size_t>(count) * head_dim)),
        prepared(stride * static_cast<size_t>(count)) {
    for (int q = 0; q < count; ++q) {
      kernels.prepare_query(vectors.data() + q * head_dim, head_dim,
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
  const int begin = queries.begin[q], end = queries.end[q];
  std::vector<double> scores;
  double maximum = -1e300, total = 0;
  for (int p = begin; p < end; ++p) {
    double score = 0;
    for (int d = 0; d < head_dim; ++d)
      score += static_cast<double>(rounded(queries.vectors[q * head_dim + d])) *
               rounded(sequence.keys[p * head_dim + d]);
    scores.push_back(score);
    maximum = std::max(maximum, score);
  }
  for (double& score : scores) total += score = std::exp(score - maximum);
  for (int d = 0; d < head_dim; ++d) {
    double expected = 0, magnitude = 0;
    for (int p = begin; p < end; ++p) {
      const double value = rounded(sequence.values[p * head_dim + d]);
      expected += scores[p - begin] / total * value;
      magnitude += scores[p - begin] / total * std::fabs(value);
    }
    CHECK(std::fabs(actual[d] - expected) <= 0.003 * magnitude + 1e-6);  // weights are bfloat16
  }
}

}  // namespace

void attention_by_pages_is_attention() {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const int head_dim : {16, 48, 64, 80, 128, 256})
      for (const float size : {0.3f, 20.0f}) {  // of the keys: flat and sharp
        Random random(7);
        const Sequence sequence(head_dim, size, random);
        for (const int count : {1, 2, 3, 5, 9}) {
          const Queries queries(kernels, count, head_dim, random);
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

void a_query_that_sees_nothing_of_a_page_takes_nothing() {
  constexpr int kHeadDim = 32, kStride = kHeadDim + 2;
  with_each_kernel_set([](const KernelSet& kernels) {
    Random random(8);
    const Sequence sequence(kHeadDim, 1.0f, random);
    const Queries queries(kernels, 3, kHeadDim, random);
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
  });
}

}  // namespace river::test
