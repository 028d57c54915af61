// A decoder of the Llama family with its exit river: shape and packed weights.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "buffer.h"
#include "packing.h"
#include "thread_pool.h"

namespace river {

// L layers, C model dim, H heads, G key-value heads, D head dim, I inner dim of the MLP, V vocabulary
struct Shape {
  int num_layers;         // L
  int hidden_size;        // C
  int num_heads;          // H
  int num_kv_heads;       // G
  int head_dim;           // D
  int intermediate_size;  // I
  int vocab_size;         // V
  int rotary_dim;         // of D, how many dims are rotated
  int rope_kinds;         // of layers that have rotary angles of their own
  int rope_boundary;      // see Model::is_long
  float norm_epsilon;
  float attention_scale;  // of query . key
  float embedding_scale;
  float logit_cap;        // logits = cap * tanh(logits / cap); 0: none
  bool gelu;              // the MLP's activation: GELU (tanh form) or SiLU
  bool tied_head;         // the LM head's bfloat16 weights are the embedding's
};

constexpr int kWeightLayout = 5;  // counts the changes of packing.h and of the order of weights
constexpr int kMaxGroupedQueries = 64;  // query heads that share a key-value head

// What may be prefetched past the last weight has to be mapped for speed, not for safety.
constexpr size_t kSlack = 16u << 10;

// How weights are stored.
struct Format {
  int bits = 16;       // 16, or 8 or 3 to 6 in groups
  int group_size = 0;  // of codes
};

// How a river's weights are: in codes, of a width that each projection of each layer has for itself.
struct RiverFormat {
  std::vector<std::array<int, 4>> bits;  // [L][Projection]
  int group_size = 0;
};

enum Side { kBackbone = 0, kRiver = 1 };
enum Projection { kQkv = 0, kOutput = 1, kGateUp = 2, kDown = 3 };

// An empty vector stands for a norm or bias that the architecture hasn't.
struct Layer {
  PackedMatrix projections[4][2];         // [Projection][Side]
  std::vector<float> biases[4];           // [Projection]; gate and up in turn, 16 by 16
  std::vector<float> attention_norm;      // (C) before attention
  std::vector<float> post_attention_norm; // (C) on what attention adds
  std::vector<float> mlp_norm;            // (C) before the MLP
  std::vector<float> post_mlp_norm;       // (C) on what the MLP adds
  std::vector<float> query_norm;          // (D) each head, or (H * D) all heads together
  std::vector<float> key_norm;            // (D) or (G * D)
  int window = 0;                         // positions that a token sees, itself among them; 0: all
  int rope = 0;                           // which kind of rotary angles; -1: no positions
};

// Rotary angles by position, as the model's own rotary embedding gives them.
struct RotaryTable {
  std::vector<float> cosines, sines;  // [positions][rotary_dim / 2]
};

class Model {
 public:
  // Takes memory for the weights of river and head and of the first `in_memory` backbone layers;
  // they are zero until they are set. Throws std::bad_alloc, std::invalid_argument.
  Model(const Shape& shape, Format backbone, const RiverFormat& river, Format head, int in_memory);

  const Shape shape;
  std::vector<Layer> layers;
  std::vector<float> final_norm;  // (C)
  PackedMatrix head;
  PackedMatrix draft_head;        // that drafts take; without rows where there is none
  const bf16* embedding = nullptr;  // [V, C], held by the caller; null: rows come from the head
  std::vector<RotaryTable> rotary;  // of each kind; then, with a boundary, the long ones of each
  std::vector<float> query_scales;  // by position; empty: one everywhere

  // Throw std::invalid_argument where the sources don't fit.
  // A side without sources stays as it is; where any don't fit, all stay.
  using Sources = std::array<std::vector<SourceMatrix>, 4>;  // [Projection]
  void set_layer(int layer, const Sources (&sources)[2], ThreadPool& pool);
  void set_head(const SourceMatrix& source, ThreadPool& pool);
  void set_draft_head(const SourceMatrix& source, Format format, ThreadPool& pool);
  // Rotary angles change once beyond a length (longrope): texts with more than `rope_boundary`
  // positions take the long ones. 0: there is no such length.
  bool is_long(int positions) const {
    return shape.rope_boundary > 0 && positions > shape.rope_boundary;
  }
  const RotaryTable& angles(int kind, bool is_long) const {
    return rotary[static_cast<size_t>(kind + (is_long ? shape.rope_kinds : 0))];
  }
  int positions(bool is_long) const;  // that all kinds' tables cover
  int inputs(int projection) const;   // columns of its matrices

  void embed(int token, float* out) const;
  // Bytes of a layer's weights on one side, and of the head.
  size_t layer_bytes(int layer, Side side) const;
  size_t head_bytes() const { return head.bytes(); }
  size_t weight_bytes() const;  // that memory is taken for

  // The packed weights are to be kept, and to be read again by a model of the same shape and
  // formats where kWeightLayout is the same: the backbone's layers one after the other, then river
  // and head in one part.
  struct Part {
    uint8_t* data;
    size_t bytes;
  };
  Part packed_layer(int layer) const;  // without data where it isn't in memory
  Part packed_rest() const { return {rest_.data(), rest_bytes_}; }
  size_t packed_bytes() const { return layers.size() * layer_bytes_ + rest_bytes_; }

  // A backbone layer's weights are in memory of their own from now on, and zero; or no longer.
  void take_layer(int layer);  // throws std::bad_alloc
  void drop_layer(int layer);
  // They are at `data`, for as long as the caller says; null: nowhere.
  void place_layer(int layer, const uint8_t* data);

 private:
  size_t layer_bytes_ = 0, rest_bytes_ = 0;
  std::vector<Buffer> backbone_;  // [L], empty where a layer isn't in memory
  Buffer rest_;                   // river and head, in the order of use
  Buffer draft_weights_;
};

}  // namespace river
