// The KV cache of several sequences, in pages of 64 positions that hold every layer. A sequence
// grows by a page at a time, nothing is ever copied, and pages that truncation frees are used again.
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
  KvCache(int layers, int kv_heads, int head_dim);

  int sequences() const { return static_cast<int>(sequences_.size()); }
  int length(int sequence) const { return sequences_[sequence].length; }
  size_t bytes() const { return slabs_.size() * slab_pages_ * page_bytes_; }

  // There are `count` sequences from now on; those beyond are forgotten, new ones are empty.
  void resize(int count);
  // Makes room for positions up to `length`. Throws std::bad_alloc, with nothing lost.
  void reserve(int sequence, int length);
  void set_length(int sequence, int length) { sequences_[sequence].length = length; }
  // Forgets the positions from `length` on; what stood there leaves no trace, be it no numbers.
  void truncate(int sequence, int length);
  // `to` becomes what `from` is, by copy of its pages.
  void copy(int from, int to);

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

  // [position in page / 16][D / 2][16], pairs of dims
  uint32_t* keys(int sequence, int page, int layer, int head) const {
    return sequences_[sequence].pages[page] + part_words_ * 2 * (layer * kv_heads_ + head);
  }
  // [position in page / 2][D], pairs of positions
  uint32_t* values(int sequence, int page, int layer, int head) const {
    return keys(sequence, page, layer, head) + part_words_;
  }

  // Writes the key and value [D] of one position.
  void write(int sequence, int position, int layer, int head, const float* key, const float* value);
  // Reads them back, as bfloat16.
  void read(int sequence, int position, int layer, int head, bf16* key, bf16* value) const;

 private:
  struct Sequence {
    std::vector<uint32_t*> pages;
    int length = 0;
  };

  void forget(int sequence, int begin, int end);
  int parts() const { return static_cast<int>(page_bytes_ / (2 * part_words_ * sizeof(uint32_t))); }

  int kv_heads_, head_dim_;
  size_t part_words_;  // words of the keys, or of the values, of one page, layer and head
  size_t page_bytes_;
  size_t slab_pages_;  // pages that memory is taken for at a time, so that they are in huge pages
  std::vector<Buffer> slabs_;
  std::vector<uint32_t*> free_;
  std::vector<Sequence> sequences_;
};

}  // namespace river
