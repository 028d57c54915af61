// The KV cache: what is where, and what becomes of pages.
#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"

namespace river::test {
namespace {

constexpr int kLayers = 2, kHeads = 3, kDims = 32;

// Another vector for each place: small whole numbers, which bfloat16 holds, and with one of 127 among
// them codes do too.
std::vector<float> vector_of(int sequence, int position, int layer, int head, int part) {
  std::vector<float> vector(kDims);
  for (int d = 0; d < kDims; ++d)
    vector[static_cast<size_t>(d)] = static_cast<float>(
        (sequence * 7919 + position * 131 + layer * 31 + head * 17 + part * 5 + d) % 251 - 125);
  vector[static_cast<size_t>(position % kDims)] = 127.0f;
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

// A key and a value, rounded to bfloat16, from where kv_cache.h says that they are.
void read(const KvCache& cache, int sequence, int position, int layer, int head, bf16* key, bf16* value) {
  const int page = position / kPagePositions, place = position % kPagePositions;
  const uint32_t* keys = cache.keys(sequence, page, layer, head);
  const uint32_t* values = cache.values(sequence, page, layer, head);
  if (cache.bits() == 16) {
    for (int d = 0; d < kDims; ++d) {
      const uint32_t k = keys[(place / 16 * kDims / 2 + d / 2) * 16 + place % 16];
      key[d] = static_cast<bf16>(k >> (d % 2 * 16));
      value[d] = static_cast<bf16>(values[place / 2 * kDims + d] >> (place % 2 * 16));
    }
    return;
  }
  constexpr int kShift[] = {0, 16, 8, 24};  // of the codes 0, 1, 2, 3 of a word
  const float key_scale = cache.key_scales(sequence, page, layer, head)[place];
  const float value_scale = cache.value_scales(sequence, page, layer, head)[place];
  for (int d = 0; d < kDims; ++d) {
    const uint32_t k = keys[(place / 16 * kDims / 4 + d / 4) * 16 + place % 16] >> kShift[d % 4];
    const uint32_t v = values[place / 4 * kDims + d] >> kShift[place % 4];
    key[d] = to_bf16(static_cast<int8_t>(k) * key_scale);
    value[d] = to_bf16(static_cast<int8_t>(v) * value_scale);
  }
}

bool holds(const KvCache& cache, int sequence, int identity) {
  bf16 key[kDims], value[kDims];
  for (int p = 0; p < cache.length(sequence); ++p)
    for (int l = 0; l < kLayers; ++l)
      for (int h = 0; h < kHeads; ++h) {
        read(cache, sequence, p, l, h, key, value);
        const std::vector<float> keys = vector_of(identity, p, l, h, 0);
        const std::vector<float> values = vector_of(identity, p, l, h, 1);
        for (size_t d = 0; d < kDims; ++d)
          if (to_float(key[d]) != keys[d] || to_float(value[d]) != values[d]) return false;
      }
  return true;
}

// Whether the keys and values of a sequence are zero from a position on.
bool is_zero(const KvCache& cache, int sequence, int begin) {
  bf16 key[kDims], value[kDims];
  for (int p = begin; p < cache.length(sequence); ++p)
    for (int l = 0; l < kLayers; ++l)
      for (int h = 0; h < kHeads; ++h) {
        read(cache, sequence, p, l, h, key, value);
        for (int d = 0; d < kDims; ++d)
          if (key[d] != 0 || value[d] != 0) return false;
      }
  return true;
}

void add(KvCache& cache, int sequences) {
  for (int s = 0; s < sequences; ++s) CHECK(cache.add() == s);
}

template <class Body>
void with_each_width(Body body) {
  for (const int bits : {16, 8}) {
    KvCache cache(kLayers, kHeads, kDims, bits);
    body(cache);
  }
}

}  // namespace

TEST(what_was_written_is_read) {
  with_each_width([](KvCache& cache) {
    add(cache, 3);
    for (int begin = 0; begin < 200; begin += 50)  // in turn, so that their pages alternate
      for (int s = 0; s < 3; ++s) fill(cache, s, s, begin, begin + 40 + 10 * (begin < 150));
    for (int s = 0; s < 3; ++s) CHECK(cache.length(s) == 190 && holds(cache, s, s));
    CHECK(!holds(cache, 0, 1));  // the check can fail
  });
}

TEST(pages_stay_where_they_are) {
  with_each_width([](KvCache& cache) {
    add(cache, 2);
    fill(cache, 0, 0, 0, 64);
    const uint32_t* page = cache.keys(0, 0, 0, 0);
    const size_t bytes = cache.bytes();
    cache.reserve(0, 64);  // there already
    CHECK(cache.bytes() == bytes);
    for (int end = 65; end < 1500; end += 333) fill(cache, 0, 0, end - 1, end);
    fill(cache, 1, 1, 0, 300);
    for (int s = 2; s < 50; ++s) CHECK(cache.add() == s);
    CHECK(cache.keys(0, 0, 0, 0) == page);
    cache.truncate(0, 64);
    CHECK(holds(cache, 0, 0));
    CHECK(holds(cache, 1, 1));
  });
}

TEST(numbers_of_dropped_sequences_are_given_again) {
  with_each_width([](KvCache& cache) {
    add(cache, 5);
    for (int s = 0; s < 5; ++s) fill(cache, s, s, 0, 70 + 64 * s);
    const uint32_t* page = cache.keys(3, 0, 0, 0);
    const size_t bytes = cache.bytes();
    for (const int s : {4, 0, 2}) cache.drop(s);
    for (int s = -1; s < 7; ++s) CHECK(cache.has(s) == (s == 1 || s == 3));
    for (const int s : {1, 3}) CHECK(cache.length(s) == 70 + 64 * s && holds(cache, s, s));
    CHECK(cache.keys(3, 0, 0, 0) == page);
    for (const int expected : {0, 2, 4, 5}) {  // the smallest first
      const int s = cache.add(7 * expected);
      CHECK(s == expected && cache.length(s) == 0 && cache.prompt_length(s) == 7 * expected);
    }
    fill(cache, 2, 2, 0, 300);  // in the pages of those that were dropped
    CHECK(cache.bytes() == bytes && holds(cache, 2, 2) && holds(cache, 3, 3));
  });
}

TEST(freed_pages_are_used_again) {
  with_each_width([](KvCache& cache) {
    add(cache, 2);
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
    cache.drop(1);
    CHECK(cache.add() == 1 && cache.length(1) == 0 && holds(cache, 0, 0));
    fill(cache, 1, 2, 0, 180);
    CHECK(holds(cache, 1, 2) && cache.bytes() == bytes);
  });
}

TEST(codes_are_the_nearest) {
  KvCache cache(1, 1, kDims, 8);
  add(cache, 1);
  cache.reserve(0, 64);
  CHECK(cache.position_bytes() == 2 * (kDims + sizeof(float)));
  Random random(12);
  for (const float size : {1e-38f, 1e-25f, 0.01f, 300.0f, 1e30f})
    for (int place = 0; place < 64; ++place) {
      const std::vector<float> keys = random.reals(kDims, -size, size);
      const std::vector<float> values = random.reals(kDims, -size / 3, size / 3);
      cache.write(0, place, 0, 0, keys.data(), values.data());
      bf16 states[2][kDims];
      read(cache, 0, place, 0, 0, states[0], states[1]);
      for (const int part : {0, 1}) {
        const std::vector<float>& exact = part == 0 ? keys : values;
        double largest = 0;
        for (const float x : exact) largest = std::max<double>(largest, std::fabs(x));
        for (int d = 0; d < kDims; ++d) {
          const double x = exact[static_cast<size_t>(d)], y = to_float(states[part][d]);
          // half a code, and what bfloat16 rounds; very small ones become zero
          const double most = size < 1e-30f ? largest : largest / 254 * 1.0001 + std::fabs(x) / 256;
          CHECK(std::fabs(x - y) <= most);
          if (std::fabs(x) == largest && size > 1e-30f) CHECK(std::fabs(x - y) <= largest / 256);
        }
      }
    }
}

TEST(codes_take_half_the_memory) {
  size_t bytes[2];
  for (const int which : {0, 1}) {
    KvCache cache(4, 2, 64, which == 0 ? 16 : 8);
    add(cache, 1);
    cache.reserve(0, 30000);
    bytes[which] = cache.bytes();
    CHECK(bytes[which] >= cache.position_bytes() * 4 * 30000);
  }
  const double share = static_cast<double>(bytes[1]) / static_cast<double>(bytes[0]);
  CHECK(std::fabs(share - (64.0 + 4) / 128) < 0.06);  // memory is taken in large pieces
}

TEST(a_state_with_nan_or_infinity_becomes_nan) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  KvCache cache(1, 2, kDims, 8);
  add(cache, 1);
  cache.reserve(0, 64);
  for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()})
    for (const int place : {0, 13, kDims - 1}) {
      std::vector<float> broken(kDims, 1.0f);
      const std::vector<float> good(kDims, 1.0f);
      broken[static_cast<size_t>(place)] = bad;
      cache.write(0, 0, 0, 0, broken.data(), good.data());
      cache.write(0, 0, 0, 1, good.data(), broken.data());
      cache.write(0, 1, 0, 0, good.data(), good.data());
      bf16 keys[kDims], values[kDims];
      for (const int head : {0, 1}) {
        read(cache, 0, 0, 0, head, keys, values);
        for (int d = 0; d < kDims; ++d) {
          const float key = to_float(keys[d]), value = to_float(values[d]);
          CHECK(std::isnan(key) == (head == 0) && std::isnan(value) == (head == 1));
          CHECK((head == 0 ? value : key) == 1.0f);
        }
      }
      read(cache, 0, 1, 0, 0, keys, values);
      CHECK(to_float(keys[place]) == 1.0f && to_float(values[place]) == 1.0f);
    }
}

TEST(wrong_widths_are_refused) {
  for (const int bits : {-8, 0, 4, 32}) CHECK_THROWS(KvCache(1, 1, 64, bits), std::invalid_argument);
  CHECK_THROWS(KvCache(1, 1, 528, 8), std::invalid_argument);
  CHECK(KvCache(1, 1, 528).bits() == 16);
  CHECK(KvCache(1, 1, 512, 8).bits() == 8);
}

TEST(pages_are_put_back) {
  with_each_width([](KvCache& cache) {
    add(cache, 3);
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
      cache.set_length(1, static_cast<int>(pages.size()) * kPagePositions);
      CHECK(is_zero(cache, 1, length));
      cache.set_length(1, length);
      CHECK(cache.length(0) == 200 && holds(cache, 0, 0));
      fill(cache, 1, 0, length, 200);  // and it goes on
      CHECK(holds(cache, 1, 0));
    }
    cache.restore(1, {}, 0);
    CHECK(cache.length(1) == 0);
    // values of a page are no numbers where nobody wrote: they don't come in with it
    if (cache.bits() == 8) return;  // codes are numbers always
    std::vector<uint8_t> page(cache.page_bytes(), 0xff);
    cache.restore(1, {page.data()}, 10);
    cache.set_length(1, kPagePositions);
    bf16 key[kDims], value[kDims];
    for (int p = 0; p < kPagePositions; ++p) {
      read(cache, 1, p, kLayers - 1, kHeads - 1, key, value);
      CHECK(value[kDims - 1] == (p < 10 ? 0xffff : 0));
    }
  });
}

TEST(copies_of_a_page_hold_nothing_else) {
  with_each_width([](KvCache& cache) {
    add(cache, 2);
    fill(cache, 0, 0, 0, 64);
    fill(cache, 1, 0, 0, 10);  // the rest of its page was never written
    for (const int end : {0, 1, 9, 10}) {
      std::vector<uint8_t> copies[2];
      for (const int sequence : {0, 1}) {
        copies[sequence].assign(cache.page_bytes(), 0xff);
        cache.copy_page(sequence, 0, end, copies[sequence].data());
      }
      CHECK(copies[0] == copies[1]);
    }
  });
}

}  // namespace river::test
