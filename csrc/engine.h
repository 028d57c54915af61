// What Python holds: the weights, the threads and one KV cache. One pass at a time.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"
#include "python_values.h"

namespace river {

// Methods throw std::invalid_argument for what doesn't fit the model, and std::runtime_error while
// another thread is in one or after a fork.
class Engine {
 public:
  // The pairs are bits and group size.
  Engine(const nb::dict& shape, std::pair<int, int> backbone, std::pair<int, int> river,
         std::pair<int, int> head, int rotary_tables, int threads, const std::string& kernels,
         int resident_layers, int kv_bits);
  ~Engine();

  void set_layer(int layer, const nb::dict& parts);
  void set_weights(int layer, int projection, const std::vector<Matrix16>& matrices);
  void set_codes(int layer, int projection, int side, const std::vector<Codes>& matrices);
  void set_head_weights(const Matrix16& matrix);
  void set_head_codes(const Codes& codes);
  // An LM head in 8 or 4 bits for drafts.
  void set_draft_head(const Codes& codes, int bits, int group_size);
  // Rows [first, first + count) of a bfloat16 LM head, as bfloat16 in uint16 [count, C].
  nb::object head_rows(int first, int count);
  void set_final_norm(const FloatVector& weight);
  // Embedding rows that don't come from the LM head's weights; the array is kept alive.
  void set_embedding(const Matrix16& rows);
  // Angles of the positions from `first` on; what stood there before is replaced.
  void set_rotary(int table, int first, const FloatMatrix& cosines, const FloatMatrix& sines);
  void set_query_scales(const FloatVector& scales);

  // Best tokens [logit rows], exit layers [rows], if recorded, similarities [L, rows], and the rows
  // that the depth limit held back.
  nb::tuple forward(std::vector<int> tokens, std::vector<int> sequences,
                    std::vector<float> thresholds, std::vector<int> logit_rows,
                    std::vector<int> mean_groups, std::vector<int> minimum_groups,
                    bool record_similarities, bool draft_head, int head_tokens, int depth_limit);
  // The drafted tokens of each of some sequences, and their margins.
  nb::tuple draft(std::vector<int> sequences, std::vector<int> tokens, std::vector<int> most,
                  std::vector<float> thresholds, std::vector<float> chances,
                  std::vector<float> least_chances, std::vector<int> stop_tokens, bool draft_head,
                  int head_tokens);
  // A copy of the last pass's logits [rows, V], or of those that there are.
  nb::object logits();

  void resize(int sequences);
  // Of the sequences only these are left, ascending; they become 0, 1 and so on.
  void keep_sequences(const std::vector<int>& sequences);
  void truncate(int sequence, int length);
  // As if the sequence had so many positions, with keys and values of zero in the new ones: what
  // memory and speed are at length can be measured without computing a text.
  void lengthen(int sequence, int length);
  int length(int sequence) const;
  // Keys and values [2, layers, kv_heads, length, head_dim] of a sequence, as bfloat16 in uint16,
  // to which those in codes are rounded.
  nb::object read_cache(int sequence);
  // The pages [page_bytes] with the first `length` positions of a sequence. They are no copies and
  // good until the next pass, but for a last one that is not full, which holds nothing else; the
  // arrays keep the engine, whose handle `self` is.
  nb::list read_pages(int sequence, int length, nb::handle self);
  // A sequence becomes `length` positions in such pages.
  void write_pages(int sequence, const std::vector<Bytes>& pages, int length);

  size_t layer_bytes(int layer, int side);
  size_t head_bytes() const { return model_.head_bytes(); }
  size_t weight_bytes() const { return model_.weight_bytes(); }
  // The packed weights as arrays of bytes in the order of a file, none of them a copy; they keep
  // the engine, whose handle `self` is. Layers that aren't in memory are None.
  nb::list packed_weights(nb::handle self);
  size_t packed_bytes() const { return model_.packed_bytes(); }

  // See Residency.
  void open_weights(const std::string& path);
  void keep_layers(int layers);
  // Bytes [begin, end) of the file of packed weights.
  nb::object stored_weights(size_t begin, size_t end);
  int resident_layers() const { return decoder_.residency.resident(); }
  // Misses, bytes read, seconds waited.
  nb::tuple offload_counts() const;
  size_t cache_bytes() const { return decoder_.cache.bytes(); }
  // Of the keys and values of one position in one layer.
  size_t position_bytes() const { return decoder_.cache.position_bytes(); }
  int kv_bits() const { return decoder_.cache.bits(); }
  int positions() const { return model_.positions(); }
  int threads() const { return team_->size(); }
  const char* kernels() const { return kernels_.name; }

 private:
  class Turn;

  Layer& layer_at(int layer);
  const PackedMatrix& projection_at(int layer, int projection, Side side);
  size_t columns(int projection) const;
  size_t hidden_size() const { return static_cast<size_t>(model_.shape.hidden_size); }
  void check_sequence(int sequence) const;
  void check_complete() const;

  const KernelSet& kernels_;
  std::unique_ptr<Team> team_;
  Model model_;
  Decoder decoder_;
  int process_;
  std::atomic<bool> busy_{false};
  Matrix16 embedding_;
  std::vector<float> logits_;
  size_t logit_stride_ = 0, logit_count_ = 0, logit_tokens_ = 0;
};

}  // namespace river
