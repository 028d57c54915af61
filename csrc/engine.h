// What Python holds: the weights, the threads and the KV cache of one model.
#pragma once

#include <array>
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
  // The pairs are bits and group size; a river's bits are [L][Projection]. Weights are zero until they
  // are loaded.
  Engine(const nb::dict& shape, std::pair<int, int> backbone,
         const std::pair<std::vector<std::array<int, 4>>, int>& river, std::pair<int, int> head,
         int threads, const std::string& kernels, int resident_layers, int kv_bits);
  ~Engine();

  // Any of a layer's parts: norms, biases, "window" and "rope" as Layer has them, and of either side,
  // "backbone" or "river", the matrices of each Projection, which stand below each other.
  void load_layer(int layer, const nb::dict& parts);
  // Any of "final_norm", "weights", and "embedding" [V, C], which is kept alive, where its rows aren't
  // those of a bfloat16 head.
  void load_head(const nb::dict& parts);
  void load_draft_head(const Codes& codes, int bits, int group_size);
  // From position `first` on the (cosines, sines) of each rotary table, and what queries are scaled by
  // (empty: nothing); what stood there before is replaced. Tables of short angles end at the boundary.
  void load_positions(int first, const std::vector<std::pair<FloatMatrix, FloatMatrix>>& angles,
                      const FloatVector& query_scales);
  // Rows [first, first + count) of a bfloat16 LM head, as bfloat16 in uint16 [count, C].
  nb::object head_rows(int first, int count);

  // Best tokens [logit rows], exit layers [rows], if recorded, similarities [L, rows] and margins
  // [logit rows], and the number of the pass. An interrupt that came meanwhile undoes the pass.
  nb::tuple forward(std::vector<int> tokens, std::vector<int> sequences, const Floats& thresholds,
                    std::vector<int> logit_rows, std::vector<int> mean_groups,
                    std::vector<int> minimum_groups, bool record_similarities, bool record_margins,
                    bool draft_head, int depth_limit);
  // A copy of the logits [logit rows, V], if no pass came after this one.
  nb::object logits(int64_t pass);
  // The drafted tokens of each of some sequences, and their margins.
  nb::tuple draft(std::vector<int> sequences, std::vector<int> tokens, std::vector<int> most,
                  int exit_layer, float least_margin, std::vector<int> stop_tokens, bool draft_head);

  int add_sequence(int prompt_length);
  void drop_sequence(int sequence);
  void truncate(int sequence, int length);
  int length(int sequence) const;
  std::vector<int> sequences() const;
  // The longest of some sequences, after each has got another token as often as it is named.
  int longest_after(const std::vector<int>& sequences);
  // The pages [page_bytes] with the first `length` positions of a sequence. They are no copies and
  // good until the next pass, but for a last one that is not full, which holds nothing else; the
  // arrays keep the engine.
  nb::list read_pages(int sequence, int length);
  // A sequence becomes `length` positions in such pages.
  void write_pages(int sequence, const std::vector<Bytes>& pages, int length);

  // The packed weights as arrays of bytes in the order of a file, none of them a copy; they keep
  // the engine. Layers that aren't in memory are None.
  nb::list packed_weights();
  size_t layer_bytes(int layer, int side) const;
  // See Residency.
  void open_weights(const std::string& path);
  void keep_layers(int layers);
  // Bytes [begin, end) of the file of packed weights.
  nb::object stored_weights(size_t begin, size_t end);
  // Misses, bytes read, seconds waited, rows that a depth limit capped.
  nb::tuple offload_counts() const;

  const Model& model() const { return model_; }
  const KvCache& cache() const { return decoder_.cache; }
  int resident_layers() const { return decoder_.residency.resident(); }
  int positions() const { return model_.positions(model_.shape.rope_boundary > 0); }
  int threads() const { return pool_->size(); }
  const char* kernels() const { return kernels_.name; }

 private:
  // Keeps a second thread out, and a forked child, whose copy of the engine has no threads.
  class Lock {
   public:
    explicit Lock(Engine& engine);
    ~Lock() { engine_.busy_ = false; }

   private:
    Engine& engine_;
  };

  void check_layer(int layer) const;
  void check_sequence(int sequence) const;
  void check_complete() const;
  nb::object bytes_of(uint8_t* data, size_t count);

  const KernelSet& kernels_;
  std::unique_ptr<ThreadPool> pool_;
  Model model_;
  Decoder decoder_;
  int process_;
  std::atomic<bool> busy_{false};
  Matrix16 embedding_;
  Pass pass_;  // the last one: its logits, and memory that is used again
  int64_t passes_ = 0, logits_of_ = 0;  // counted from 1; 0: of none
  int64_t depth_capped_ = 0;
};

}  // namespace river
