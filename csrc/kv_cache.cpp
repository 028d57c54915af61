#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "require.h"

namespace river {
namespace {

constexpr size_t kSlabBytes = 8u << 20;

constexpr float kLargestCode = 127.0f;
constexpr int kMostDims = 512;  // of a head in codes: sums of 16 times 8 bits stay within 32

int checked_bits(int bits, int head_dim) {
  require(bits == 16 || bits == 8, "a KV cache has 16 or 8 bits");
  require(bits == 16 || head_dim <= kMostDims, "a KV cache of 8 bits takes heads of 512 dims at most");
  return bits;
}

// How a key or value [D] is rounded to codes: its largest value becomes 127.
struct CodeScale {
  float scale = 0.0f, inverse = 0.0f;

  CodeScale(const float* x, int dims) {
    float largest = 0.0f;
    for (int d = 0; d < dims; ++d) {
      if (!std::isfinite(x[d])) {
        scale = std::numeric_limits<float>::quiet_NaN();
        return;
      }
      largest = std::max(largest, std::fabs(x[d]));
    }
    if (largest <= 1e-30f) return;  // the inverse might be infinite
    scale = largest / kLargestCode;
    inverse = kLargestCode / largest;
  }

  int8_t code(float x) const {
    return inverse > 0.0f ? static_cast<int8_t>(std::lrintf(x * inverse)) : int8_t{0};
  }
};

// The codes 0, 1, 2, 3 of a word lie in this order, see simd_portable.h.
size_t byte_of(int code) { return static_cast<size_t>(code % 4 % 2 * 2 + code % 4 / 2); }

// From the first code of a key to that of dim d: words of four are 16 words apart.
size_t key_byte(int d) { return static_cast<size_t>(d / 4 * 4 * kLanes) + byte_of(d); }

}  // namespace

KvCache::KvCache(int layers, int kv_heads, int head_dim, int bits)
    : kv_heads_(kv_heads),
      head_dim_(head_dim),
      bits_(checked_bits(bits, head_dim)),
      state_words_(static_cast<size_t>(kPagePositions) * head_dim * bits / 32),
      part_words_(2 * (state_words_ + (bits == 8 ? kPagePositions : 0))),
      page_bytes_(part_words_ * sizeof(uint32_t) * kv_heads * layers),
      slab_pages_(std::max<size_t>(1, kSlabBytes / page_bytes_)) {}

int KvCache::add(int prompt_length) {
  int sequence = 0;
  while (has(sequence)) ++sequence;
  if (sequence == limit()) sequences_.emplace_back();
  sequences_[sequence].is_used = true;
  sequences_[sequence].prompt_length = prompt_length;
  return sequence;
}

void KvCache::drop(int sequence) {
  truncate(sequence, 0);
  sequences_[sequence].is_used = false;
}

void KvCache::reserve(int sequence, int length) {
  auto& pages = sequences_[sequence].pages;
  while (static_cast<int>(pages.size()) * kPagePositions < length) {
    pages.reserve(pages.size() + 1);
    if (free_.empty()) {
      free_.reserve((slabs_.size() + 1) * slab_pages_);
      slabs_.emplace_back(slab_pages_ * page_bytes_);
      for (size_t p = slab_pages_; p-- > 0;)
        free_.push_back(slabs_.back().as<uint32_t>() + p * page_bytes_ / sizeof(uint32_t));
    }
    std::memset(free_.back(), 0, page_bytes_);  // what another sequence left in it
    pages.push_back(free_.back());
    free_.pop_back();
  }
}

void KvCache::truncate(int sequence, int length) {
  Sequence& s = sequences_[sequence];
  const int before = s.length;
  if (length < s.length) s.length = length;
  const auto needed = static_cast<size_t>((s.length + kPagePositions - 1) / kPagePositions);
  while (s.pages.size() > needed) {
    free_.push_back(s.pages.back());
    s.pages.pop_back();
  }
  forget(sequence, s.length, std::min(before, static_cast<int>(needed) * kPagePositions));
}

// Zeroes the values of positions in the last page: attention reads them by sixteen, with a weight of
// zero where there is none, and zero times infinity would be no number. Keys need none of it, nor
// do codes, which are numbers always; attention leaves out their scales where there is no position.
void KvCache::forget(int sequence, int begin, int end) {
  if (begin >= end || bits_ == 8) return;
  const int page = begin / kPagePositions;
  for (int part = 0; part < parts(); ++part)
    for (int place = begin % kPagePositions; place < end - page * kPagePositions; ++place) {
      bf16* v = value_elements(sequences_[sequence].pages[page] + part_words_ * part, place);
      for (int d = 0; d < head_dim_; ++d) v[2 * d] = 0;
    }
}

int8_t* KvCache::key_codes(uint32_t* part, int place) const {
  return reinterpret_cast<int8_t*>(part + static_cast<size_t>(place / kLanes) * head_dim_ / 4 * kLanes +
                                   place % kLanes);
}

int8_t* KvCache::value_codes(uint32_t* part, int place) const {
  return reinterpret_cast<int8_t*>(part + state_words_ + static_cast<size_t>(place / 4) * head_dim_) +
         byte_of(place);
}

uint32_t* KvCache::key_pairs(uint32_t* part, int place) const {
  return part + static_cast<size_t>(place / kLanes) * head_dim_ / 2 * kLanes + place % kLanes;
}

bf16* KvCache::value_elements(uint32_t* part, int place) const {
  return reinterpret_cast<bf16*>(part + state_words_ + static_cast<size_t>(place / 2) * head_dim_) +
         place % 2;
}

void KvCache::clear(uint32_t* page, int begin) const {
  for (int i = 0; i < parts(); ++i) {
    uint32_t* part = page + part_words_ * i;
    for (int place = begin; place < kPagePositions; ++place) {
      if (bits_ == 16) {
        for (int d = 0; d < head_dim_ / 2; ++d) key_pairs(part, place)[d * kLanes] = 0;
        for (int d = 0; d < head_dim_; ++d) value_elements(part, place)[2 * d] = 0;
        continue;
      }
      for (int d = 0; d < head_dim_; ++d) {
        key_codes(part, place)[key_byte(d)] = 0;
        value_codes(part, place)[4 * d] = 0;
      }
      for (const int scales : {0, kPagePositions})
        reinterpret_cast<float*>(part + 2 * state_words_)[scales + place] = 0.0f;
    }
  }
}

void KvCache::copy_page(int sequence, int page, int end, uint8_t* out) const {
  std::memcpy(out, sequences_[sequence].pages[page], page_bytes_);
  clear(reinterpret_cast<uint32_t*>(out), std::max(0, end - page * kPagePositions));
}

void KvCache::restore(int sequence, const std::vector<const uint8_t*>& pages, int length) {
  truncate(sequence, 0);
  try {
    reserve(sequence, length);
  } catch (...) {
    truncate(sequence, 0);
    throw;
  }
  for (size_t p = 0; p < sequences_[sequence].pages.size(); ++p)
    std::memcpy(sequences_[sequence].pages[p], pages[p], page_bytes_);
  sequences_[sequence].length = length;
  forget(sequence, length, static_cast<int>(sequences_[sequence].pages.size()) * kPagePositions);
}

void KvCache::write(int sequence, int position, int layer, int head, const float* key,
                    const float* value) {
  const int page = position / kPagePositions, place = position % kPagePositions;
  uint32_t* part = keys(sequence, page, layer, head);
  if (bits_ == 8) {
    const CodeScale of_key(key, head_dim_), of_value(value, head_dim_);
    key_scales(sequence, page, layer, head)[place] = of_key.scale;
    value_scales(sequence, page, layer, head)[place] = of_value.scale;
    int8_t* k = key_codes(part, place);
    int8_t* v = value_codes(part, place);
    for (int d = 0; d < head_dim_; ++d) {
      k[key_byte(d)] = of_key.code(key[d]);
      v[4 * d] = of_value.code(value[d]);
    }
    return;
  }
  uint32_t* k = key_pairs(part, place);
  for (int d = 0; d < head_dim_; d += 2)
    k[d / 2 * kLanes] = to_bf16(key[d]) | static_cast<uint32_t>(to_bf16(key[d + 1])) << 16;
  bf16* v = value_elements(part, place);
  for (int d = 0; d < head_dim_; ++d) v[2 * d] = to_bf16(value[d]);
}

}  // namespace river
