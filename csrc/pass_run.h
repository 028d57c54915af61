// One pass on the threads of a pool: its parts, the memory they share, and where each part is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "buffer.h"
#include "decoder.h"
#include "kernels/kernel_set.h"
#include "kv_cache.h"
#include "model.h"
#include "thread_pool.h"
#include "work_stealing.h"

namespace river {

constexpr int kChunkRows = 256;  // rows that a layer runs at a time: bounds the memory of a pass
constexpr int kPrivateRows = 4;  // so few rows each thread norms for itself, instead of waiting
constexpr int kQueryRows = 4;    // rows whose queries share one read of the keys and values
constexpr size_t kGateUpBytes = 256u << 10;  // gate and up outputs that stay in a thread's cache

template <class T>
class Array {  // grows, never shrinks, aligned for vector registers; holds no values across growth
 public:
  T* fit(size_t count) {
    if (count * sizeof(T) > buffer_.size()) buffer_ = Buffer(count * sizeof(T) * 5 / 4 + 64);
    return data();
  }
  T* data() const { return buffer_.as<T>(); }

 private:
  Buffer buffer_;
};

// The argmax of the logits, the first of equals, and the second largest logit. NaN is larger than any
// number.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int token = 0;
  float second = -std::numeric_limits<float>::infinity();

  void take(const Best& other) {
    const float runner_up = std::max({second, other.second, std::min(value, other.value)});
    if (other.value > value || std::isnan(other.value) ||
        (other.value == value && other.token < token))
      *this = other;
    second = runner_up;
  }
};

// Memory that passes use one after the other; shapes in the letters of Shape.
struct Decoder::Buffers {
  // of one thread
  struct Private {
    Array<float> hidden, before;  // [kPrivateRows, C]
    Array<uint8_t> inputs[2];
    Array<float> normed;   // one row
    Array<float> gate_up;  // some panels of a chunk
    Array<uint8_t> query;  // [H / G]
    Array<float> heads;    // the heads of one key-value head: queries, key, value
    Array<float> running, partial;
    Array<float> attended;  // [kPrivateRows, H D]
    int loops = 0;  // parallel ones of this pass so far
    std::vector<int> order;
    std::vector<char> in_backbone;
    std::vector<float> similarity;
    std::vector<float> joined;         // [rows] similarities, joined in groups
    std::vector<double> group_values;  // [groups]
    std::vector<int> group_members;    // [groups]
    std::vector<Best> best;  // [logit rows] of the tokens whose logits this thread computed
  };
  std::vector<Private> threads;
  std::unique_ptr<WorkStealing> panels;  // of the products

  Array<float> hidden;     // [rows, C]
  Array<float> before;     // [rows, C] as the layer found it
  Array<uint8_t> inputs[2];  // [rows of a chunk], as the side's products take them
  Array<float> qkv;        // [rows of a chunk, (H + 2 G) D]
  Array<uint8_t> queries;  // [rows of a chunk, H]
  Array<float> attended;   // [rows of a chunk, H D]
  Array<float> projected;  // [rows of a chunk, C]
  Array<float> inner;      // [rows of a chunk, I]
  Array<float> partials;   // [items, H / G, D + 2]
  std::vector<float> similarity;
  std::vector<int> positions;
  std::vector<char> long_angles;  // rows that take the model's long rotary angles
  std::atomic<int> next_item{0};
};

// One pass on all threads of the pool; each calls operator().
class Decoder::Run {
 public:
  Run(Decoder& decoder, Pass& pass, int threads)
      : model_(decoder.model_),
        shape_(decoder.model_.shape),
        head_(pass.draft_head ? decoder.model_.draft_head : decoder.model_.head),
        kernels_(decoder.kernels_),
        pool_(decoder.pool_),
        cache_(decoder.cache),
        residency_(decoder.residency),
        pass_(pass),
        buffers_(*decoder.buffers_),
        threads_(threads),
        rows_(static_cast<int>(pass.tokens.size())),
        private_(rows_ <= kPrivateRows),
        own_thresholds_(pass.thresholds.size() != size(shape_.num_layers) &&
                        pass.thresholds.size() == size(rows_) * size(shape_.num_layers)),
        queries_per_kv_(shape_.num_heads / shape_.num_kv_heads) {}

  void prepare();
  void operator()(int thread);
  void commit();

 private:
  using Private = Buffers::Private;

  // The rows [first, first + count) of the pass; slots are their places in the products: first
  // those that are in the backbone, then those in the river.
  struct Chunk {
    int first, count, in_backbone;
    const int* order;  // slot -> row of the chunk

    int begin(Side side) const { return side == kBackbone ? 0 : in_backbone; }
    int end(Side side) const { return side == kBackbone ? in_backbone : count; }
    Side side(int slot) const { return slot < in_backbone ? kBackbone : kRiver; }
  };

  // decoder.cpp
  bool bring_layer(int index, Private& own, int thread);
  void embed(Private& own, int thread);

  // layer.cpp
  void run_layer(const Layer& layer, int index, Chunk chunk, Private& own, int thread);
  void set_input(const PackedMatrix (&matrix)[2], const Chunk& chunk, int slot, const float* x,
                 int count, Private& own);
  void project(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own, int thread,
               float* out, size_t out_stride);
  void multiply(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own, Range panels,
                float* out, size_t out_stride);
  int grain(const PackedMatrix& matrix, int rows) const;
  void fetch_next(const PackedMatrix (&matrix)[2], const Chunk& chunk, int thread);
  void gate_up(const Layer& layer, const Chunk& chunk, Private& own, int thread);
  void add_branch(const Chunk& chunk, int slot, const std::vector<float>& bias,
                  const std::vector<float>& post_norm, Private& own);

  // attention.cpp
  void prepare_heads(const Layer& layer, int index, const Chunk& chunk, int slot, int kv_head,
                     Private& own, uint8_t* queries, bool write);
  bool attend_by_page(const Layer& layer, int index, const Chunk& chunk, Private& own, int thread);
  void attend_by_rows(const Layer& layer, int index, const Chunk& chunk, Private& own, int thread);
  void attend_page(const Layer& layer, int index, int sequence, int page, int next_page,
                   int kv_head, const uint8_t* queries, size_t row_stride, const int* positions,
                   int rows, float* partial);

  // exits.cpp
  bool needs_similarity(int layers_run, const Private& own) const;
  Chunk chunk(int first, Private& own) const;
  void decide(int layers_run, Private& own, int thread);
  const std::vector<float>& join_groups(Private& own) const;
  float threshold(int row, int layers_run) const {
    return pass_.thresholds[size(own_thresholds_ ? row * shape_.num_layers + layers_run : layers_run)];
  }

  // head.cpp
  void head(Private& own, int thread);
  float second_best(float* logits, int count, int best) const;
  float margin(const Best& best) const;

  float* hidden(Private& own, int row) const {
    return (private_ ? own.hidden.data() : buffers_.hidden.data()) + row * size(shape_.hidden_size);
  }
  float* before(Private& own, int row) const {
    return (private_ ? own.before.data() : buffers_.before.data()) + row * size(shape_.hidden_size);
  }
  uint8_t* inputs(Private& own, Side side) const {
    return (private_ ? own.inputs : buffers_.inputs)[side].data();
  }
  size_t query_bytes() const { return kernels_.query_bytes(shape_.head_dim, cache_.bits()); }
  size_t input_bytes(const PackedMatrix& matrix) const {
    return matrix.bits == 16 ? kernels_.pairs_bytes(matrix.columns)
                             : kernels_.fixed_bytes(matrix.columns, matrix.group_size);
  }
  // Rows of which this thread computes norms and inputs, and the barrier after it.
  Range rows_of(int count, int thread) const {
    return private_ ? Range{0, count} : share(count, thread, threads_);
  }
  void barrier_unless_private(int thread) {
    if (!private_) pool_.barrier(thread);
  }
  // With fewer rows than this, rows and key-value heads are too few to keep all threads busy.
  int few_rows_limit() const {
    return (4 * threads_ + shape_.num_kv_heads - 1) / shape_.num_kv_heads;
  }
  int first_seen(const Layer& layer, int position) const {
    return layer.window > 0 ? std::max(0, position - layer.window + 1) : 0;
  }
  static size_t size(int value) { return static_cast<size_t>(value); }
  static const float* or_null(const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  }

  const Model& model_;
  const Shape& shape_;
  const PackedMatrix& head_;
  const KernelSet& kernels_;
  ThreadPool& pool_;
  KvCache& cache_;
  Residency& residency_;
  Pass& pass_;
  Buffers& buffers_;
  const int threads_;
  const int rows_;
  const bool private_;
  const bool own_thresholds_;  // each row has its own
  const int queries_per_kv_;
  bool one_row_each_ = true;  // no sequence has two rows in this pass
};

}  // namespace river
