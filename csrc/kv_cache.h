// The KV cache of several sequences, in pages of 64 positions that hold every layer. A sequence
// grows by a page at a time, nothing is ever copied, and pages that truncation frees are used again.
// A page holds bfloat16, or signed codes of 8 bits with a float for each key and each value of each
// head: x = code * scale, -127 <= code <= 127.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels/kernel_set.h"

namespace river {

constexpr int kCacheLayout = 1;  // counts the changes of how a page lies in memory

class KvCache {
 public:
  // `bits` are 16 or 8. Throws std::invalid_argument for others, and for 8 where heads are too wide.
  KvCache(int layers, int kv_heads, int head_dim, int bits = 16);

  int bits() const { return bits_; }
  size_t bytes() const { return slabs_.size() * slab_pages_ * page_bytes_; }
  // Of the keys and values of one position in one layer.
  size_t position_bytes() const { return part_words_ * sizeof(uint32_t) * kv_heads_ / kPagePositions; }

  // A new, empty sequence: the smallest number that is free. Its rotary angles are those of a text of
  // `prompt_length` positions at least, see Model::is_long. Throws std::bad_alloc, with nothing lost.
  int add(int prompt_length = 0);
  void drop(int sequence);  // its number is free again
  bool has(int sequence) const {
    return sequence >= 0 && sequence < limit() && sequences_[sequence].is_used;
  }
  int limit() const { return static_cast<int>(sequences_.size()); }  // all numbers are below
  int length(int sequence) const { return sequences_[sequence].length; }
  int prompt_length(int sequence) const { return sequences_[sequence].prompt_length; }

  // Makes room for positions up to `length`. Throws std::bad_alloc, with nothing lost.
  void reserve(int sequence, int length);
  void set_length(int sequence, int length) { sequences_[sequence].length = length; }
  // Forgets the positions from `length` on; what stood there leaves no trace, be it no numbers.
  void truncate(int sequence, int length);

  // A page as it lies in memory, to be kept and put back where kCacheLayout and the sizes are the same.
  size_t page_bytes() const { return page_bytes_; }
  uint8_t* page(int sequence, int page) const {
    return reinterpret_cast<uint8_t*>(sequences_[sequence].pages[page]);
  }
  // Copies a page to `out`, with zeros at the sequence's positions from `end` on.
  void copy_page(int sequence, int page, int end, uint8_t* out) const;
  // `sequence` becomes `length` positions that stand in these pages. Throws std::bad_alloc, with the
  // sequence empty.
  void restore(int sequence, const std::vector<const uint8_t*>& pages, int length);

  // [position in page / 16][D / 2][16], pairs of dims; of codes fours, [..][D / 4][16]
  uint32_t* keys(int sequence, int page, int layer, int head) const {
    return sequences_[sequence].pages[page] + part_words_ * (layer * kv_heads_ + head);
  }
  // [position in page / 2][D], pairs of positions; of codes fours, [position in page / 4][D]
  uint32_t* values(int sequence, int page, int layer, int head) const {
    return keys(sequence, page, layer, head) + state_words_;
  }
  // [position in page], of codes; null for bfloat16
  float* key_scales(int sequence, int page, int layer, int head) const {
    if (bits_ == 16) return nullptr;
    return reinterpret_cast<float*>(values(sequence, page, layer, head) + state_words_);
  }
  float* value_scales(int sequence, int page, int layer, int head) const {
    if (bits_ == 16) return nullptr;
    return key_scales(sequence, page, layer, head) + kPagePositions;
  }

  // Writes the key and value [D] of one position. As codes, one that holds a value that is infinite
  // or no number becomes no numbers at all.
  void write(int sequence, int position, int layer, int head, const float* key, const float* value);

 private:
  struct Sequence {
    std::vector<uint32_t*> pages;
    int length = 0, prompt_length = 0;
    bool is_used = false;
  };

  void forget(int sequence, int begin, int end);
  // Of a page: what belongs to one layer and head.
  int parts() const { return static_cast<int>(page_bytes_ / (part_words_ * sizeof(uint32_t))); }
  // Zeroes a page's keys, values and scales from a place on.
  void clear(uint32_t* page, int begin) const;
  // Of one place of a part, which begins with its keys: where the key and the value start, whose
  // dims lie apart.
  int8_t* key_codes(uint32_t* part, int place) const;
  int8_t* value_codes(uint32_t* part, int place) const;
  uint32_t* key_pairs(uint32_t* part, int place) const;
  bf16* value_elements(uint32_t* part, int place) const;

  int kv_heads_, head_dim_, bits_;
  size_t state_words_;  // of the keys, or of the values, of one page, layer and head
  size_t part_words_;   // of both, with their scales
  size_t page_bytes_;
  size_t slab_pages_;  // pages that memory is taken for at a time, so that they are in huge pages
  std::vector<Buffer> slabs_;
  std::vector<uint32_t*> free_;
  std::vector<Sequence> sequences_;
};

}  // namespace river
