// A tiny random model of the Llama family, and passes over it.
#pragma once

#include <array>
#include <vector>

#include "decoder.h"
#include "sources.h"

namespace river::test {

constexpr int kLayers = 3, kVocabulary = 97, kPositions = 512;

struct Kind {
  int backbone_bits = 16, head_bits = 16;
  bool has_everything = false;  // biases, norms, windows, scales that plain models lack
  uint32_t backbone_seed = 1, river_seed = 2;
  std::array<int, 4> river_bits = {4, 4, 4, 4};  // [Projection], one projection further on each layer
  int kv_bits = 16;
  int rope_boundary = 0;
};

// What any pass gives, without padding.
struct Result {
  std::vector<int> exit_layers, best_tokens;
  std::vector<float> similarities, logits;  // logits [logit rows, V]

  // the same bits: NaN equals NaN
  bool operator==(const Result& other) const;
  // of one row, where all rows have logits
  Result row(int index) const;
};

class Subject {
 public:
  Subject(const KernelSet& kernels, int threads, const Kind& kind = {});

  // So many empty sequences are all that there are.
  void begin(int sequences);
  // A pass in which every row has logits; thresholds [L], or [rows][L].
  Result run(const std::vector<int>& tokens, const std::vector<int>& sequences,
             const std::vector<float>& thresholds);
  // Tokens of sequence 0.
  Result run(const std::vector<int>& tokens, const std::vector<float>& thresholds) {
    return run(tokens, std::vector<int>(tokens.size(), 0), thresholds);
  }

  ThreadPool pool;
  Model model;
  Decoder decoder;

 private:
  void set_weights(const Kind& kind);
  void set_everything();

  std::vector<bf16> embedding_;
};

Result take(const Pass& pass);

std::vector<float> never();
std::vector<float> always();
// Thresholds at which about half of the tokens leave after each layer.
std::vector<float> sometimes(Subject& subject);

std::vector<int> random_tokens(int count, uint32_t seed);

}  // namespace river::test
