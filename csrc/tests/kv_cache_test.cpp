// The KV cache: what is where, and what becomes of pages.
#include "kv_cache.h"

#include <vector>

#include "check.h"
#include "tests.h"

namespace river::test {
namespace {

constexpr int kLayers = 2, kHeads = 3, kDims = 32;

// Another vector for each place: small whole numbers, which bfloat16 holds.
std::vector<float> vector_of(int sequence, int position, int layer, int head, int part) {
  std::vector<float> vector(kDims);
  for (int d = 0; d < kDims; ++d)
    vector[static_cast<size_t>(d)] = static_cast<float>(
        (sequence * 7919 + position * 131 + layer * 31 + head * 17 + part * 5 + d) % 251 - 125);
  return vector;
}

void fill(KvCache& cache, int sequence, int identity, int begin, int end) {
  cache.reserve(sequence, end);
  for (int p = begin; p < end; ++p)
    for (int l = 0; l < kLayers; ++l)
      for (int h = 0; h < kHeads; ++h)
        cache.write(sequence, p, l, h, vector_of(identity, p, l, h, 0).data(),
                    vector_of(identity, p, l, h, 1).data());
  cache.set_length(sequence, end);
}

bool holds(const KvCache& cache, int sequence, int identity) {
  bf16 key[kDims], value[kDims];
  for (int p = 0; p < cache.length(sequence); ++p)
    for (int l = 0; l < kLayers; ++l)
      for (int h = 0; h < kHeads; ++h) {
        cache.read(sequence, p, l, h, key, value);
        const std::vector<float> keys = vector_of(identity, p, l, h, 0);
        const std::vector<float> values = vector_of(identity, p, l, h, 1);
        for (size_t d = 0; d < kDims; ++d)
          if (to_float(key[d]) != keys[d] || to_float(value[d]) != values[d]) return false;
      }
  return true;
}

}  // namespace

void what_was_written_is_read() {
  KvCache cache(kLayers, kHeads, kDims);
  cache.resize(3);
  for (int begin = 0; begin < 200; begin += 50)  // in turn, so that their pages alternate
    for (int s = 0; s < 3; ++s) fill(cache, s, s, begin, begin + 40 + 10 * (begin < 150));
  for (int s = 0; s < 3; ++s) CHECK(cache.length(s) == 190 && holds(cache, s, s));
  CHECK(!holds(cache, 0, 1));  // the check can fail
}

void pages_stay_where_they_are() {
  KvCache cache(kLayers, kHeads, kDims);
  cache.resize(2);
  fill(cache, 0, 0, 0, 64);
  const uint32_t* page = cache.keys(0, 0, 0, 0);
  const size_t bytes = cache.bytes();
  cache.reserve(0, 64);  // there already
  CHECK(cache.bytes() == bytes);
  for (int end = 65; end < 1500; end += 333) fill(cache, 0, 0, end - 1, end);
  fill(cache, 1, 1, 0, 300);
  cache.resize(50);
  CHECK(cache.keys(0, 0, 0, 0) == page);
  cache.truncate(0, 64);
  CHECK(holds(cache, 0, 0));
  CHECK(holds(cache, 1, 1));
}

void freed_pages_are_used_again() {
  KvCache cache(kLayers, kHeads, kDims);
  cache.resize(2);
  fill(cache, 0, 0, 0, 300);
  fill(cache, 1, 1, 0, 129);
  const size_t bytes = cache.bytes();
  for (int round = 0; round < 5; ++round) {
    cache.truncate(0, 65);
    CHECK(cache.length(0) == 65 && holds(cache, 0, 0));
    cache.truncate(0, 100);  // no longer than it is
    CHECK(cache.length(0) == 65);
    fill(cache, 1, 1, 129, 129 + 64 * 3);
    CHECK(holds(cache, 0, 0) && holds(cache, 1, 1));
    cache.truncate(1, 129);
    fill(cache, 0, 0, 65, 300);
    CHECK(holds(cache, 0, 0) && holds(cache, 1, 1));
    CHECK(cache.bytes() == bytes);
  }
  cache.resize(1);
  CHECK(cache.sequences() == 1 && holds(cache, 0, 0));
  cache.resize(2);
  CHECK(cache.length(1) == 0);
  fill(cache, 1, 2, 0, 180);
  CHECK(holds(cache, 1, 2) && cache.bytes() == bytes);
  cache.resize(0);
  CHECK(cache.sequences() == 0 && cache.bytes() == bytes);
}

void copies_are_apart() {
  KvCache cache(kLayers, kHeads, kDims);
  cache.resize(3);
  fill(cache, 0, 0, 0, 150);
  fill(cache, 1, 1, 0, 400);
  cache.copy(0, 1);  // shorter than what was there
  cache.copy(0, 2);  // and longer
  for (int s = 0; s < 3; ++s) CHECK(cache.length(s) == 150 && holds(cache, s, 0));
  cache.truncate(1, 0);
  fill(cache, 1, 5, 0, 150);
  CHECK(holds(cache, 0, 0) && holds(cache, 1, 5) && holds(cache, 2, 0));
  cache.copy(2, 2);  // onto itself
  CHECK(cache.length(2) == 150 && holds(cache, 2, 0));
}

void pages_are_put_back() {
  KvCache cache(kLayers, kHeads, kDims);
  cache.resize(3);
  fill(cache, 0, 0, 0, 200);
  fill(cache, 2, 2, 0, 500);  // what a page held before must not be seen in it
  cache.truncate(2, 0);
  for (const int length : {1, 2, 63, 64, 65, 128, 199, 200}) {
    std::vector<std::vector<uint8_t>> copies;
    std::vector<const uint8_t*> pages;
    for (int page = 0; page * kPagePositions < length; ++page) {
      copies.emplace_back(cache.page_bytes());
      cache.copy_page(0, page, length, copies.back().data());
    }
    for (const auto& copy : copies) pages.push_back(copy.data());
    cache.restore(1, pages, length);
    CHECK(cache.length(1) == length && holds(cache, 1, 0));
    bool is_clean = true;
    cache.set_length(1, static_cast<int>(pages.size()) * kPagePositions);
    bf16 key[kDims], value[kDims];
    for (int p = length; p < cache.length(1); ++p)
      for (int l = 0; l < kLayers; ++l)
        for (int h = 0; h < kHeads; ++h) {
          cache.read(1, p, l, h, key, value);
          for (int d = 0; d < kDims; ++d) is_clean = is_clean && key[d] == 0 && value[d] == 0;
        }
    CHECK(is_clean);
    cache.set_length(1, length);
    CHECK(cache.length(0) == 200 && holds(cache, 0, 0));
    fill(cache, 1, 0, length, 200);  // and it goes on
    CHECK(holds(cache, 1, 0));
  }
  cache.restore(1, {}, 0);
  CHECK(cache.length(1) == 0);
  // values of a page are no numbers where nobody wrote: they don't come in with it
  std::vector<uint8_t> page(cache.page_bytes(), 0xff);
  cache.restore(1, {page.data()}, 10);
  cache.set_length(1, kPagePositions);
  bf16 key[kDims], value[kDims];
  for (int p = 0; p < kPagePositions; ++p) {
    cache.read(1, p, kLayers - 1, kHeads - 1, key, value);
    CHECK(value[kDims - 1] == (p < 10 ? 0xffff : 0));
  }
}

}  // namespace river::test
