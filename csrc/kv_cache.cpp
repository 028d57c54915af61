#include "kv_cache.h"

#include <algorithm>
#include <cstring>

namespace river {
namespace {

constexpr size_t kSlabBytes = 8u << 20;

}  // namespace

KvCache::KvCache(int layers, int kv_heads, int head_dim)
    : kv_heads_(kv_heads),
      head_dim_(head_dim),
      part_words_(static_cast<size_t>(kPagePositions) * head_dim / 2),
      page_bytes_(part_words_ * 2 * sizeof(uint32_t) * kv_heads * layers),
      slab_pages_(std::max<size_t>(1, kSlabBytes / page_bytes_)) {}

void KvCache::resize(int count) {
  for (int s = count; s < sequences(); ++s) truncate(s, 0);
  sequences_.resize(static_cast<size_t>(count));
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
// zero where there is none, and zero times infinity would be no number. Keys need none of it.
void KvCache::forget(int sequence, int begin, int end) {
  if (begin >= end) return;
  const int page = begin / kPagePositions;
  for (int part = 0; part < parts(); ++part) {
    auto* all = reinterpret_cast<bf16*>(values(sequence, page, 0, part));
    for (int place = begin % kPagePositions; place < end - page * kPagePositions; ++place) {
      bf16* v = all + static_cast<size_t>(place / 2) * 2 * head_dim_ + place % 2;
      for (int d = 0; d < head_dim_; ++d) v[2 * d] = 0;
    }
  }
}

void KvCache::copy(int from, int to) {
  if (from == to) return;
  truncate(to, 0);
  reserve(to, sequences_[from].length);
  for (size_t p = 0; p < sequences_[to].pages.size(); ++p)
    std::memcpy(sequences_[to].pages[p], sequences_[from].pages[p], page_bytes_);
  sequences_[to].length = sequences_[from].length;
}

void KvCache::copy_page(int sequence, int page, int end, uint8_t* out) const {
  std::memcpy(out, sequences_[sequence].pages[page], page_bytes_);
  for (int place = std::max(0, end - page * kPagePositions); place < kPagePositions; ++place)
    for (int part = 0; part < parts(); ++part) {
      auto* k = reinterpret_cast<uint32_t*>(out) + part_words_ * 2 * part;
      auto* v = reinterpret_cast<bf16*>(k + part_words_);
      for (int d = 0; d < head_dim_ / 2; ++d)
        k[(place / kLanes * head_dim_ / 2 + d) * kLanes + place % kLanes] = 0;
      for (int d = 0; d < head_dim_; ++d) v[(place / 2 * head_dim_ + d) * 2 + place % 2] = 0;
    }
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
  uint32_t* k = keys(sequence, page, layer, head) +
                static_cast<size_t>(place / kLanes) * head_dim_ / 2 * kLanes + place % kLanes;
  for (int d = 0; d < head_dim_; d += 2)
    k[d / 2 * kLanes] = to_bf16(key[d]) | static_cast<uint32_t>(to_bf16(key[d + 1])) << 16;
  auto* v = reinterpret_cast<bf16*>(values(sequence, page, layer, head) +
                                    static_cast<size_t>(place / 2) * head_dim_) +
            place % 2;
  for (int d = 0; d < head_dim_; ++d) v[2 * d] = to_bf16(value[d]);
}

void KvCache::read(int sequence, int position, int layer, int head, bf16* key, bf16* value) const {
  const int page = position / kPagePositions, place = position % kPagePositions;
  const uint32_t* k = keys(sequence, page, layer, head) +
                      static_cast<size_t>(place / kLanes) * head_dim_ / 2 * kLanes + place % kLanes;
  for (int d = 0; d < head_dim_; d += 2) {
    key[d] = static_cast<bf16>(k[d / 2 * kLanes]);
    key[d + 1] = static_cast<bf16>(k[d / 2 * kLanes] >> 16);
  }
  const auto* v = reinterpret_cast<const bf16*>(values(sequence, page, layer, head) +
                                                static_cast<size_t>(place / 2) * head_dim_) +
                  place % 2;
  for (int d = 0; d < head_dim_; ++d) value[d] = v[2 * d];
}

}  // namespace river
