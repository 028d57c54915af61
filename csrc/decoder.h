// The forward pass: tokens in, KV cache extended, logits, exit layers and similarities out.
#pragma once

#include <climits>
#include <memory>
#include <vector>

#include "kv_cache.h"
#include "model.h"
#include "residency.h"
#include "thread_pool.h"

namespace river {

// One pass over some rows; a row is one token of one sequence, and the rows of a sequence are
// appended to it in their order. Vectors have one entry for each row unless said otherwise.
struct Pass {
  std::vector<int> tokens;
  std::vector<int> sequences;
  // [L], or [rows][L] each row its own: leave after l layers where the similarity exceeds entry l.
  // A group's similarity is that of its rows in the backbone; each compares it with its own threshold.
  std::vector<float> thresholds;
  std::vector<int> mean_groups;     // rows of one group share their mean similarity; empty: none do
  std::vector<int> minimum_groups;  // and then their smallest; empty: none do
  std::vector<int> logit_rows;      // rows that go through the LM head
  int depth_limit = INT_MAX;        // rows leave after so many layers at the latest
  bool record_similarities = false;
  bool draft_head = false;   // logits of the drafts' LM head
  bool rank_second = false;  // margins are wanted

  // results
  std::vector<int> exit_layers;     // how many backbone layers a row ran
  int depth_capped = 0;             // rows that left for the depth limit alone
  std::vector<float> similarities;  // [L][rows], NaN where a row had left; empty unless recorded
  std::vector<float> logits;        // [logit rows][logit_stride], V of them
  size_t logit_stride = 0;          // V, and what rounds it up to whole panels
  std::vector<int> best_tokens;     // [logit rows] argmax, the first of equals; -1 where the largest
                                    // logit is no finite number, as where one is NaN
  std::vector<float> margins;       // [logit rows] 1 - p2 / p1 of the two best tokens, NaN where the
                                    // largest logit is no finite number; if ranked
};

// How some sequences go on, as the layers that draft have it. Vectors have one entry for each
// sequence unless said otherwise.
struct Drafts {
  std::vector<int> sequences;
  std::vector<int> tokens;  // that comes next
  std::vector<int> most;    // tokens to draft at most, 1 or more
  int exit_layer = 0;       // backbone layers that a drafted token runs
  float least_margin = 0;   // a token whose margin isn't as large ends a draft, and belongs to it
  std::vector<int> stop_tokens;  // end a draft, too; not by sequence
  bool draft_head = false;  // as of a Pass

  // results, each as long as the draft
  std::vector<std::vector<int>> drafted;
  std::vector<std::vector<float>> margins;
};

class Decoder {
 public:
  // The model's first `resident` backbone layers are in memory; `kv_bits` are those of the KV cache,
  // 16 or 8.
  Decoder(Model& model, int resident, const KernelSet& kernels, ThreadPool& pool, int kv_bits = 16);
  ~Decoder();

  KvCache cache;
  Residency residency;

  // Throws std::invalid_argument for tokens, sequences or groups that there aren't,
  // std::runtime_error where an evicted layer can't be brought back, and std::bad_alloc. After an
  // error the cache holds what it held before.
  void forward(Pass& pass);
  // Forgets the rows of a pass, of which nothing was appended to since.
  void undo(const Pass& pass);
  // Drafts token after token, greedily. The cache holds what it held before.
  void draft(Drafts& drafts);

 private:
  class Run;
  struct Buffers;

  const Model& model_;
  const KernelSet& kernels_;
  ThreadPool& pool_;
  AdaptiveThreads adaptive_threads_;
  std::unique_ptr<Buffers> buffers_;
  Pass draft_pass_;  // its memory is used again
};

}  // namespace river
