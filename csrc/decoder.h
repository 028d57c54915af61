// The forward pass: tokens in, KV cache extended, logits, exit layers and similarities out.
#pragma once

#include <climits>
#include <memory>
#include <vector>

#include "kv_cache.h"
#include "model.h"
#include "residency.h"
#include "team.h"

namespace river {

// One pass over some rows; a row is one token of one sequence, and the rows of a sequence are
// appended to it in their order. Vectors have one entry for each row unless said otherwise.
struct Pass {
  std::vector<int> tokens;
  std::vector<int> sequences;
  std::vector<float> thresholds;    // [L] leave after l layers where the similarity exceeds [l]
  std::vector<int> mean_groups;     // rows of one group share their mean similarity; empty: none do
  std::vector<int> minimum_groups;  // and then their smallest; empty: none do
  std::vector<int> logit_rows;      // rows that go through the LM head
  int depth_limit = INT_MAX;        // rows leave after so many layers at the latest
  bool record_similarities = false;
  bool draft_head = false;   // logits of the drafts' LM head
  int head_tokens = 0;       // logits of the vocabulary's first so many tokens only; 0: of all
  bool rank_second = false;  // margins are wanted

  // results
  std::vector<int> exit_layers;     // how many backbone layers a row ran
  int held_back = 0;                // rows that left for the depth limit alone
  std::vector<float> similarities;  // [L][rows], NaN where a row had left; empty unless recorded
  std::vector<float> logits;        // [logit rows][logit_stride], head_tokens of them
  size_t logit_stride = 0;          // V, and what rounds it up to whole panels
  std::vector<int> best_tokens;     // [logit rows] the first token of the largest logit; -1 where
                                    // that is no finite number, as where one is NaN
  std::vector<float> margins;       // [logit rows] 1 - p2 / p1 of the two likeliest; if ranked
};

// How some sequences go on, as the layers that draft have it. Vectors have one entry for each
// sequence unless said otherwise.
struct Drafts {
  std::vector<int> sequences;
  std::vector<int> tokens;        // that comes next
  std::vector<int> most;          // tokens to draft at most, 1 or more
  std::vector<float> thresholds;  // [L] as of a Pass
  std::vector<float> chances;     // that a token is accepted, by its margin in equal parts of [0, 1]
  // A draft ends where the product of its chances falls below: the entry [n - 1] counts while n
  // sequences draft, the last one for more. Not by sequence.
  std::vector<float> least_chances;
  std::vector<int> stop_tokens;  // end a draft; not by sequence
  bool draft_head = false;
  int head_tokens = 0;  // as of a Pass

  // results, each as long as the draft
  std::vector<std::vector<int>> drafted;
  std::vector<std::vector<float>> margins;
};

class Decoder {
 public:
  // The model's first `resident` backbone layers are in memory; `kv_bits` are those of the KV cache,
  // 16 or 8.
  Decoder(Model& model, int resident, const KernelSet& kernels, Team& team, int kv_bits = 16);
  ~Decoder();

  KvCache cache;
  Residency residency;

  // Throws std::invalid_argument for tokens, sequences or groups that there aren't,
  // std::runtime_error where an evicted layer can't be brought back, and std::bad_alloc. After an
  // error the cache holds what it held before.
  void forward(Pass& pass);
  // Drafts token after token, the likeliest one each. The cache holds what it held before.
  void draft(Drafts& drafts);

 private:
  class Run;
  struct Buffers;

  const Model& model_;
  const KernelSet& kernels_;
  Team& team_;
  Crew crew_;
  std::unique_ptr<Buffers> buffers_;
  Pass draft_pass_;  // its memory is used again
};

}  // namespace river
