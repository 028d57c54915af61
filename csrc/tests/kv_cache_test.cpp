// The KV cache: what is where, and what becomes of pages.
#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "tests.h"

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

// Whether the keys and values of a sequence are zero from a position on.
bool is_zero(const KvCache& cache, int sequence, int begin) {
  bf16 key[kDims], value[kDims];
  for (int p = begin; p < cache.length(sequence); ++p)
    for (int l = 0; l < kLayers; ++l)
      for (int h = 0; h < kHeads; ++h) {
        cache.read(sequence, p, l, h, key, value);
        for (int d = 0; d < kDims; ++d)
          if (key[d] != 0 || value[d] != 0) return false;
      }
  return true;
}

template <class Body>
void with_each_width(Body body) {
  for (const int bits : {16, 8}) {
    KvCache cache(kLayers, kHeads, kDims, bits);
    body(cache);
  }
}

}  // namespace

void what_was_written_is_read() {
  with_each_width([](KvCache& cache) {
    cache.resize(3);
    for (int begin = 0; begin < 200; begin += 50)  // in turn, so that their pages alternate
      for (int s = 0; s < 3; ++s) fill(cache, s, s, begin, begin + 40 + 10 * (begin < 150));
    for (int s = 0; s < 3; ++s) CHECK(cache.length(s) == 190 && holds(cache, s, s));
    CHECK(!holds(cache, 0, 1));  // the check can fail
  });
}

void pages_stay_where_they_are() {
  with_each_width([](KvCache& cache) {
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
  });
}

void sequences_that_are_kept_move_up() {
  with_each_width([](KvCache& cache) {
    cache.resize(5);
    for (int s = 0; s < 5; ++s) fill(cache, s, s, 0, 70 + 64 * s);
    const uint32_t* page = cache.keys(3, 0, 0, 0);
    const size_t bytes = cache.bytes();
    cache.keep({1, 3, 4});
    CHECK(cache.sequences() == 3 && cache.keys(1, 0, 0, 0) == page);
    const int kept[] = {1, 3, 4};
    for (int s = 0; s < 3; ++s)
      CHECK(cache.length(s) == 70 + 64 * kept[s] && holds(cache, s, kept[s]));
    cache.resize(4);
    CHECK(cache.length(3) == 0);
    fill(cache, 3, 2, 0, 300);  // in the pages of those that were left out
    CHECK(cache.bytes() == bytes && holds(cache, 3, 2) && holds(cache, 1, 3));
    cache.keep({});
    CHECK(cache.sequences() == 0);
  });
}

void freed_pages_are_used_again() {
  with_each_width([](KvCache& cache) {
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
  });
}

void codes_are_the_nearest() {
  KvCache cache(1, 1, kDims, 8);
  cache.resize(1);
  cache.reserve(0, 64);
  CHECK(cache.position_bytes() == 2 * (kDims + sizeof(float)));
  Random random(12);
  for (const float size : {1e-38f, 1e-25f, 0.01f, 300.0f, 1e30f})
    for (int place = 0; place < 64; ++place) {
      const std::vector<float> keys = random.reals(kDims, -size, size);
      const std::vector<float> values = random.reals(kDims, -size / 3, size / 3);
      cache.write(0, place, 0, 0, keys.data(), values.data());
      bf16 read[2][kDims];
      cache.read(0, place, 0, 0, read[0], read[1]);
      for (const int part : {0, 1}) {
        const std::vector<float>& states = part == 0 ? keys : values;
        double largest = 0;
        for (const float x : states) largest = std::max<double>(largest, std::fabs(x));
        for (int d = 0; d < kDims; ++d) {
          const double x = states[static_cast<size_t>(d)], y = to_float(read[part][d]);
          // half a code, and what bfloat16 rounds; very small ones become zero
          const double most = size < 1e-30f ? largest : largest / 254 * 1.0001 + std::fabs(x) / 256;
          CHECK(std::fabs(x - y) <= most);
          if (std::fabs(x) == largest && size > 1e-30f) CHECK(std::fabs(x - y) <= largest / 256);
        }
      }
    }
}

void codes_take_half_the_memory() {
  size_t bytes[2];
  for (const int which : {0, 1}) {
    KvCache cache(4, 2, 64, which == 0 ? 16 : 8);
    cache.resize(1);
    cache.reserve(0, 30000);
    bytes[which] = cache.bytes();
    CHECK(bytes[which] >= cache.position_bytes() * 4 * 30000);
  }
  const double share = static_cast<double>(bytes[1]) / static_cast<double>(bytes[0]);
  CHECK(std::fabs(share - (64.0 + 4) / 128) < 0.06);  // memory is taken in large pieces
}

void a_state_that_is_no_number_becomes_none() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  KvCache cache(1, 2, kDims, 8);
  cache.resize(1);
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
        cache.read(0, 0, 0, head, keys, values);
        for (int d = 0; d < kDims; ++d) {
          const float key = to_float(keys[d]), value = to_float(values[d]);
          CHECK(std::isnan(key) == (head == 0) && std::isnan(value) == (head == 1));
          CHECK((head == 0 ? value : key) == 1.0f);
        }
      }
      cache.read(0, 1, 0, 0, keys, values);
      CHECK(to_float(keys[place]) == 1.0f && to_float(values[place]) == 1.0f);
    }
}

void wrong_widths_are_refused() {
  for (const int bits : {-8, 0, 4, 32}) CHECK_THROWS(KvCache(1, 1, 64, bits), std::invalid_argument);
  CHECK_THROWS(KvCache(1, 1, 528, 8), std::invalid_argument);
  CHECK(KvCache(1, 1, 528).bits() == 16);
  CHECK(KvCache(1, 1, 512, 8).bits() == 8);
}

void pages_are_put_back() {
  with_each_width([](KvCache& cache) {
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
      cache.read(1, p, kLayers - 1, kHeads - 1, key, value);
      CHECK(value[kDims - 1] == (p < 10 ? 0xffff : 0));
    }
  });
}

void copies_of_a_page_hold_nothing_else() {
  with_each_width([](KvCache& cache) {
    cache.resize(2);
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

void what_is_lengthened_is_zero() {
  with_each_width([](KvCache& cache) {
    cache.resize(1);
    for (const int length : {0, 1, 63, 64, 70}) {
      cache.truncate(0, 0);
      fill(cache, 0, 0, 0, 200);
      cache.truncate(0, length);
      cache.lengthen(0, 150);
      CHECK(cache.length(0) == 150 && is_zero(cache, 0, length));
      cache.truncate(0, length);
      CHECK(holds(cache, 0, 0));
      cache.lengthen(0, length);
      CHECK(cache.length(0) == length && holds(cache, 0, 0));
    }
  });
}

}  // namespace river::test
