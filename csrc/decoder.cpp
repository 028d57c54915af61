#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "work_share.h"

namespace river {
namespace {

constexpr int kChunkRows = 256;   // rows that a layer runs at a time: bounds the memory of a pass
constexpr int kPrivateRows = 4;   // so few rows each thread norms for itself, instead of waiting
constexpr int kPrivateItems = 16;  // so few pages of key-value heads each thread joins for itself
constexpr size_t kSmallRows = 16;  // so few rows wait for memory, and a busy core matters most
constexpr int kQueryRows = 4;     // rows whose queries share one read of the keys and values
constexpr size_t kFetchBytes = 8u << 10;    // of the next product, fetched while threads meet
constexpr size_t kGateUpBytes = 256u << 10;  // gate and up outputs that stay in a thread's cache
constexpr size_t kPieceBytes = 32u << 10;    // of weights that a thread takes at a time, few rows
constexpr int kPiecesEach = 8;               // that a thread takes of a product, many rows

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

// The token of the largest logit, the first one of equals.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int token = 0;

  void take(const Best& other) {
    if (other.value > value || (other.value == value && other.token < token)) *this = other;
  }
};

}  // namespace

// Memory that passes use one after the other; shapes as in Run.
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
    int turn = 0;  // products of this pass so far
    std::vector<int> order;
    std::vector<char> in_backbone;
    std::vector<float> similarity;
    std::vector<float> joined;         // [rows] similarities, joined in groups
    std::vector<double> group_values;  // [groups]
    std::vector<int> group_members;    // [groups]
    std::vector<Best> best;  // [logit rows] of the tokens whose logits this thread computed
  };
  std::vector<Private> threads;
  std::unique_ptr<WorkShare> panels;  // of the products

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
  std::atomic<int> next_item{0};
};

// One pass on all threads of the team; each calls operator().
class Decoder::Run {
 public:
  Run(Decoder& decoder, Pass& pass, int threads)
      : model_(decoder.model_),
        shape_(decoder.model_.shape),
        kernels_(decoder.kernels_),
        team_(decoder.team_),
        cache_(decoder.cache),
        pass_(pass),
        buffers_(*decoder.buffers_),
        threads_(threads),
        rows_(static_cast<int>(pass.tokens.size())),
        private_(rows_ <= kPrivateRows),
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

  void embed(Private& own, int thread);
  void run_layer(const Layer& layer, int index, Chunk chunk, Private& own, int thread);
  void prepare_heads(const Layer& layer, int index, const Chunk& chunk, int slot, int kv_head,
                     Private& own, uint8_t* queries, bool write);
  bool attend_by_page(const Layer& layer, int index, const Chunk& chunk, Private& own, int thread);
  void attend_by_rows(const Layer& layer, int index, const Chunk& chunk, Private& own, int thread);
  void attend_page(const Layer& layer, int index, int sequence, int page, int kv_head,
                   const uint8_t* queries, size_t row_stride, const int* positions, int rows,
                   float* partial);
  void project(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own, int thread,
               float* out, size_t out_stride);
  void multiply(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own, Range panels,
                float* out, size_t out_stride);
  void fetch_next(const PackedMatrix (&matrix)[2], const Chunk& chunk, int thread);
  int piece(const PackedMatrix& matrix, int rows) const;
  void gate_up(const Layer& layer, const Chunk& chunk, Private& own, int thread);
  void set_input(const PackedMatrix (&matrix)[2], const Chunk& chunk, int slot, const float* x,
                 int count, Private& own);
  void add_branch(const Chunk& chunk, int slot, const std::vector<float>& bias,
                  const std::vector<float>& post_norm, Private& own);
  void decide(int layers_run, Private& own, int thread);
  void leave(Private& own, int thread, int row, int layers_run);
  void head(Private& own, int thread);

  Chunk chunk(int first, Private& own) const;
  bool needs_similarity(int layers_run) const;
  float* hidden(Private& own, int row) const {
    return (private_ ? own.hidden.data() : buffers_.hidden.data()) + row * size(shape_.hidden_size);
  }
  float* before(Private& own, int row) const {
    return (private_ ? own.before.data() : buffers_.before.data()) + row * size(shape_.hidden_size);
  }
  uint8_t* inputs(Private& own, Side side) const {
    return (private_ ? own.inputs : buffers_.inputs)[side].data();
  }
  size_t input_bytes(const PackedMatrix& matrix) const {
    return matrix.bits == 16 ? kernels_.pairs_bytes(matrix.columns)
                             : kernels_.fixed_bytes(matrix.columns, matrix.group_size);
  }
  // Rows of which this thread computes norms and inputs, and the meeting after it.
  Range rows_of(int count, int thread) const {
    return private_ ? Range{0, count} : share(count, thread, threads_);
  }
  void meet_unless_private(int thread) {
    if (!private_) team_.barrier(thread);
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
  const KernelSet& kernels_;
  Team& team_;
  KvCache& cache_;
  Pass& pass_;
  Buffers& buffers_;
  const int threads_;
  const int rows_;
  const bool private_;
  const int queries_per_kv_;
  bool one_row_each_ = true;  // no sequence has two rows in this pass
};

// ---- the pass -------------------------------------------------------------------------------

void Decoder::Run::operator()(int thread) {
  Private& own = buffers_.threads[size(thread)];
  own.in_backbone.assign(size(rows_), 1);
  if (private_) own.similarity.assign(size(rows_), 0.0f);
  embed(own, thread);
  if (pass_.thresholds[0] == -std::numeric_limits<float>::infinity())
    for (int row = 0; row < rows_; ++row) leave(own, thread, row, 0);
  for (int l = 0; l < shape_.num_layers; ++l) {
    for (int first = 0; first < rows_; first += kChunkRows)
      run_layer(model_.layers[size(l)], l, chunk(first, own), own, thread);
    decide(l + 1, own, thread);
  }
  head(own, thread);
}

void Decoder::Run::embed(Private& own, int thread) {
  const Range range = rows_of(rows_, thread);
  for (int row = range.begin; row < range.end; ++row)
    model_.embed(pass_.tokens[size(row)], hidden(own, row));
  meet_unless_private(thread);
}

// A decoder layer: h += attention(norm(h)), h += mlp(norm(h)). Backbone and exit layer share norms,
// biases, positions and the slot in the KV cache; each row's products take its side's weights.
void Decoder::Run::run_layer(const Layer& layer, int index, Chunk chunk, Private& own,
                             int thread) {
  const auto& projections = layer.projections;
  const int hidden_size = shape_.hidden_size;
  const Range rows = rows_of(chunk.count, thread);
  const bool similarity = needs_similarity(index + 1);

  // norm
  for (int slot = rows.begin; slot < rows.end; ++slot) {
    const int row = chunk.first + chunk.order[slot];
    const float* x = hidden(own, row);
    if (similarity && chunk.side(slot) == kBackbone) std::copy_n(x, hidden_size, before(own, row));
    if (!layer.attention_norm.empty()) {
      kernels_.rms_norm(x, layer.attention_norm.data(), hidden_size, shape_.norm_epsilon,
                        own.normed.data());
      x = own.normed.data();
    }
    set_input(projections[kQkv], chunk, slot, x, hidden_size, own);
  }
  meet_unless_private(thread);

  // query, key, value
  const int qkv_rows = projections[kQkv][kBackbone].rows;
  project(projections[kQkv], chunk, own, thread, buffers_.qkv.data(), size(qkv_rows));
  fetch_next(projections[kOutput], chunk, thread);
  team_.barrier(thread);

  // attention
  const float* attended = buffers_.attended.data();
  bool is_own = false;
  if (chunk.count < few_rows_limit())
    is_own = attend_by_page(layer, index, chunk, own, thread);
  else
    attend_by_rows(layer, index, chunk, own, thread);
  if (is_own)
    attended = own.attended.data();
  else
    team_.barrier(thread);

  // output projection
  const int attended_size = shape_.num_heads * shape_.head_dim;
  for (int slot = rows.begin; slot < rows.end; ++slot)
    set_input(projections[kOutput], chunk, slot,
              attended + chunk.order[slot] * size(attended_size), attended_size, own);
  meet_unless_private(thread);
  project(projections[kOutput], chunk, own, thread, buffers_.projected.data(), size(hidden_size));
  fetch_next(projections[kGateUp], chunk, thread);
  team_.barrier(thread);

  // residual, norm
  for (int slot = rows.begin; slot < rows.end; ++slot) {
    add_branch(chunk, slot, layer.biases[kOutput], layer.post_attention_norm, own);
    const float* x = hidden(own, chunk.first + chunk.order[slot]);
    if (!layer.mlp_norm.empty()) {
      kernels_.rms_norm(x, layer.mlp_norm.data(), hidden_size, shape_.norm_epsilon,
                        own.normed.data());
      x = own.normed.data();
    }
    set_input(projections[kGateUp], chunk, slot, x, hidden_size, own);
  }
  meet_unless_private(thread);

  // gated MLP
  gate_up(layer, chunk, own, thread);
  fetch_next(projections[kDown], chunk, thread);
  team_.barrier(thread);
  for (int slot = rows.begin; slot < rows.end; ++slot)
    set_input(projections[kDown], chunk, slot,
              buffers_.inner.data() + slot * size(shape_.intermediate_size),
              shape_.intermediate_size, own);
  meet_unless_private(thread);
  project(projections[kDown], chunk, own, thread, buffers_.projected.data(), size(hidden_size));
  if (index + 1 < shape_.num_layers)
    fetch_next(model_.layers[size(index + 1)].projections[kQkv], chunk, thread);
  team_.barrier(thread);

  // residual, state transition similarity s[l] = cos(h[l-1], h[l])
  for (int slot = rows.begin; slot < rows.end; ++slot) {
    const int row = chunk.first + chunk.order[slot];
    add_branch(chunk, slot, layer.biases[kDown], layer.post_mlp_norm, own);
    if (!similarity || chunk.side(slot) == kRiver) continue;
    const float s = kernels_.cosine(before(own, row), hidden(own, row), hidden_size);
    (private_ ? own.similarity : buffers_.similarity)[size(row)] = s;
    if (pass_.record_similarities && (!private_ || thread == 0))
      pass_.similarities[size(index) * size(rows_) + size(row)] = s;
  }
  // the next chunk uses the same buffers
  meet_unless_private(thread);
}

// ---- attention ------------------------------------------------------------------------------

// Norms and rotates the heads of one key-value head of a row: leaves the queries, ready for
// attention, in `queries` and, if `write` says so, puts the key and value into the cache.
void Decoder::Run::prepare_heads(const Layer& layer, int index, const Chunk& chunk, int slot,
                                 int kv_head, Private& own, uint8_t* queries, bool write) {
  const int dims = shape_.head_dim, row = chunk.first + chunk.order[slot];
  const int position = buffers_.positions[size(row)];
  const float* qkv = buffers_.qkv.data() + slot * size(layer.projections[kQkv][kBackbone].rows);
  const int first_query = kv_head * queries_per_kv_;
  const int key_start = (shape_.num_heads + kv_head) * dims;
  const int value_start = (shape_.num_heads + shape_.num_kv_heads + kv_head) * dims;
  const std::vector<float>& bias = layer.biases[kQkv];

  const auto head = [&](int start, float* out) {
    for (int d = 0; d < dims; ++d) out[d] = qkv[start + d];
    if (!bias.empty())
      for (int d = 0; d < dims; ++d) out[d] += bias[size(start + d)];
  };
  // a norm over one head, or over all heads of its kind, of which this one is a part
  const auto norm = [&](const std::vector<float>& weight, int kind_start, int kind_size, int start,
                        float* out) {
    if (weight.empty()) return;
    if (static_cast<int>(weight.size()) == dims) {
      kernels_.rms_norm(out, weight.data(), dims, shape_.norm_epsilon, out);
      return;
    }
    double squares = 0;
    for (int i = kind_start; i < kind_start + kind_size; ++i) {
      const float x = bias.empty() ? qkv[i] : qkv[i] + bias[size(i)];
      squares += static_cast<double>(x) * x;
    }
    const float factor =
        1.0f / std::sqrt(static_cast<float>(squares / kind_size) + shape_.norm_epsilon);
    for (int d = 0; d < dims; ++d) out[d] *= factor * weight[size(start - kind_start + d)];
  };
  const auto rotate = [&](float* out, float scale) {
    const int half = shape_.rotary_dim / 2;
    if (layer.rope < 0) {
      kernels_.rope(out, dims, 0, nullptr, nullptr, scale);
      return;
    }
    const RotaryTable& table = model_.rotary[size(layer.rope)];
    const size_t place = size(position) * size(half);
    kernels_.rope(out, dims, shape_.rotary_dim, table.cosines.data() + place,
                  table.sines.data() + place, scale);
  };

  float* out = own.heads.data();
  const float scale = shape_.attention_scale *
                      (model_.query_scales.empty() ? 1.0f : model_.query_scales[size(position)]);
  for (int q = 0; q < queries_per_kv_; ++q) {
    const int start = (first_query + q) * dims;
    head(start, out);
    norm(layer.query_norm, 0, shape_.num_heads * dims, start, out);
    rotate(out, scale);
    kernels_.prepare_query(out, dims, queries + size(q) * kernels_.query_bytes(dims));
  }
  if (!write) return;
  float* value = out + dims;
  head(key_start, out);
  norm(layer.key_norm, shape_.num_heads * dims, shape_.num_kv_heads * dims, key_start, out);
  rotate(out, 1.0f);
  head(value_start, value);
  cache_.write(pass_.sequences[size(row)], position, index, kv_head, out, value);
}

void Decoder::Run::attend_page(const Layer& layer, int index, int sequence, int page, int kv_head,
                               const uint8_t* queries, size_t row_stride, const int* positions,
                               int rows, float* partial) {
  const int dims = shape_.head_dim;
  int begin[kQueryRows * kMaxGroupedQueries], end[kQueryRows * kMaxGroupedQueries];
  PageAttention attention;
  attention.keys = cache_.keys(sequence, page, index, kv_head);
  attention.values = cache_.values(sequence, page, index, kv_head);
  attention.head_dim = dims;
  attention.query_stride = kernels_.query_bytes(dims);
  attention.partial_stride = size(dims + 2);
  // queries of one row lie next to each other; rows do where row_stride says so
  const int start = page * kPagePositions;
  const bool adjacent = row_stride == size(queries_per_kv_) * attention.query_stride;
  for (int r = 0; r < rows; ++r)
    for (int q = 0; q < queries_per_kv_; ++q) {
      begin[r * queries_per_kv_ + q] = std::max(0, first_seen(layer, positions[r]) - start);
      end[r * queries_per_kv_ + q] = std::min(kPagePositions, positions[r] + 1 - start);
    }
  const int blocks = adjacent ? 1 : rows;
  for (int b = 0; b < blocks; ++b) {
    attention.queries = (adjacent ? rows : 1) * queries_per_kv_;
    attention.query = queries + size(b) * row_stride;
    attention.begin = begin + b * queries_per_kv_;
    attention.end = end + b * queries_per_kv_;
    attention.partial = partial + size(b * queries_per_kv_) * attention.partial_stride;
    kernels_.attend_page(attention);
  }
}

// Few rows: the threads share the pages of a row, and its partial sums are joined afterwards, in
// the order of the pages, as attend_by_rows joins them. Returns whether each thread has joined all
// of them for itself, in place of waiting for the others' parts.
bool Decoder::Run::attend_by_page(const Layer& layer, int index, const Chunk& chunk, Private& own,
                                  int thread) {
  const int dims = shape_.head_dim, kv_heads = shape_.num_kv_heads, threads = threads_;
  const size_t query_bytes = kernels_.query_bytes(dims);
  const size_t row_bytes = size(queries_per_kv_) * query_bytes;
  const size_t partial_size = size(queries_per_kv_) * size(dims + 2);
  const auto first_page = [&](int position) { return first_seen(layer, position) / kPagePositions; };
  const auto pages = [&](int position) {
    return position / kPagePositions - first_page(position) + 1;
  };
  int items = 0;
  for (int slot = 0; slot < chunk.count; ++slot)
    items += kv_heads * pages(buffers_.positions[size(chunk.first + chunk.order[slot])]);

  if (!one_row_each_) {  // rows see each other's keys and values: write them all first
    const Range range = share(chunk.count * kv_heads, thread, threads);
    for (int i = range.begin; i < range.end; ++i)
      prepare_heads(layer, index, chunk, i / kv_heads, i % kv_heads, own,
                    buffers_.queries.data() + size(i) * row_bytes, true);
    team_.barrier(thread);
  }

  const Range range = share(items, thread, threads);
  int item = 0;
  for (int slot = 0; slot < chunk.count; ++slot) {
    const int row = chunk.first + chunk.order[slot];
    const int position = buffers_.positions[size(row)];
    const int first = first_page(position), count = pages(position);
    for (int kv_head = 0; kv_head < kv_heads; ++kv_head, item += count) {
      const int begin = std::max(range.begin, item), end = std::min(range.end, item + count);
      if (begin >= end) continue;
      const uint8_t* queries = buffers_.queries.data() + size(slot * kv_heads + kv_head) * row_bytes;
      if (one_row_each_) {
        // every thread makes the queries for itself; that of the last page writes the row's key
        // and value before it reads them, and nobody else reads them
        queries = own.query.data();
        prepare_heads(layer, index, chunk, slot, kv_head, own, own.query.data(),
                      end == item + count);
      }
      for (int i = begin; i < end; ++i)
        attend_page(layer, index, pass_.sequences[size(row)], first + i - item, kv_head, queries,
                    row_bytes, &position, 1, buffers_.partials.data() + size(i) * partial_size);
    }
  }
  team_.barrier(thread);

  // join the pages of each head
  const bool is_own = private_ && items <= kPrivateItems;
  const int all_heads = chunk.count * shape_.num_heads;
  const Range heads = is_own ? Range{0, all_heads} : share(all_heads, thread, threads);
  float* attended = is_own ? own.attended.data() : buffers_.attended.data();
  item = 0;
  for (int slot = 0; slot < chunk.count; ++slot) {
    const int chunk_row = chunk.order[slot];
    const int count = pages(buffers_.positions[size(chunk.first + chunk_row)]);
    for (int h = 0; h < shape_.num_heads; ++h) {
      const int i = slot * shape_.num_heads + h;
      if (i < heads.begin || i >= heads.end) continue;
      float* running = own.running.data();
      std::fill_n(running, dims + 2, 0.0f);
      running[dims] = -1e30f;
      const int kv_head = h / queries_per_kv_;
      for (int page = 0; page < count; ++page)
        kernels_.merge_partial(buffers_.partials.data() +
                                   size(item + kv_head * count + page) * partial_size +
                                   size(h % queries_per_kv_) * size(dims + 2),
                               dims, running);
      kernels_.finish_partial(
          running, dims,
          attended + (size(chunk_row) * size(shape_.num_heads) + size(h)) * size(dims));
    }
    item += kv_heads * count;
  }
  return is_own;
}

// Many rows: each thread takes some rows and one key-value head at a time.
void Decoder::Run::attend_by_rows(const Layer& layer, int index, const Chunk& chunk, Private& own,
                                  int thread) {
  const int dims = shape_.head_dim, kv_heads = shape_.num_kv_heads;
  const size_t query_bytes = kernels_.query_bytes(dims);
  const size_t head_bytes = size(queries_per_kv_) * query_bytes;
  const size_t partial_size = size(dims + 2);
  if (thread == 0) buffers_.next_item = 0;
  const Range range = share(chunk.count * kv_heads, thread, threads_);
  for (int i = range.begin; i < range.end; ++i) {
    const int slot = i / kv_heads, kv_head = i % kv_heads;
    // queries lie as [key-value head][row], so that rows of one head are adjacent
    prepare_heads(
        layer, index, chunk, slot, kv_head, own,
        buffers_.queries.data() + size(kv_head * chunk.count + chunk.order[slot]) * head_bytes, true);
  }
  team_.barrier(thread);

  const int blocks = (chunk.count + kQueryRows - 1) / kQueryRows;
  for (;;) {
    const int item = buffers_.next_item.fetch_add(1, std::memory_order_relaxed);
    if (item >= blocks * kv_heads) return;
    const int block = blocks - 1 - item / kv_heads, kv_head = item % kv_heads;  // longest first
    const int block_end = std::min(chunk.count, (block + 1) * kQueryRows);
    for (int start = block * kQueryRows; start < block_end;) {
      const int row = chunk.first + start;
      const int sequence = pass_.sequences[size(row)];
      int count = 1;
      while (start + count < block_end && pass_.sequences[size(row + count)] == sequence) ++count;
      const int* positions = buffers_.positions.data() + row;
      const int queries = count * queries_per_kv_;
      float* running = own.running.data();
      std::fill_n(running, size(queries) * partial_size, 0.0f);
      for (int q = 0; q < queries; ++q) running[size(q) * partial_size + size(dims)] = -1e30f;
      const int last_page = positions[count - 1] / kPagePositions;
      for (int page = first_seen(layer, positions[0]) / kPagePositions; page <= last_page; ++page) {
        attend_page(layer, index, sequence, page, kv_head,
                    buffers_.queries.data() + size(kv_head * chunk.count + start) * head_bytes,
                    head_bytes, positions, count, own.partial.data());
        for (int q = 0; q < queries; ++q)
          kernels_.merge_partial(own.partial.data() + size(q) * partial_size, dims,
                                 running + size(q) * partial_size);
      }
      for (int q = 0; q < queries; ++q)
        kernels_.finish_partial(
            running + size(q) * partial_size, dims,
            buffers_.attended.data() +
                (size(start + q / queries_per_kv_) * size(shape_.num_heads) +
                 size(kv_head * queries_per_kv_ + q % queries_per_kv_)) * size(dims));
      start += count;
    }
  }
}

// ---- products and residuals -----------------------------------------------------------------

void Decoder::Run::set_input(const PackedMatrix (&matrix)[2], const Chunk& chunk, int slot,
                             const float* x, int count, Private& own) {
  const Side side = chunk.side(slot);
  const PackedMatrix& weights = matrix[side];
  uint8_t* out = inputs(own, side) + size(slot - chunk.begin(side)) * input_bytes(weights);
  if (weights.bits == 16)
    kernels_.prepare_pairs(x, count, out);
  else
    kernels_.prepare_fixed(x, count, weights.group_size, out);
}

// Panels that a thread takes at a time.
int Decoder::Run::piece(const PackedMatrix& matrix, int rows) const {
  const int each = (matrix.panels() + threads_ - 1) / threads_;
  if (rows > kPrivateRows) return std::max(2, each / kPiecesEach & ~1);  // kernels take them in twos
  return std::max({1, each / 128, static_cast<int>(kPieceBytes / matrix.panel_bytes)});
}

void Decoder::Run::project(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own,
                           int thread, float* out, size_t out_stride) {
  const PackedMatrix& larger = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  buffers_.panels->hand_out(
      larger.panels(), piece(larger, chunk.count), thread, own.turn++,
      [&](Range panels) { multiply(matrix, chunk, own, panels, out, out_stride); });
}

void Decoder::Run::multiply(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own,
                            Range panels, float* out, size_t out_stride) {
  for (const Side side : {kBackbone, kRiver}) {
    const int begin = chunk.begin(side), count = chunk.end(side) - begin;
    if (count > 0)
      kernels_.matmul(matrix[side], panels.begin, panels.end, inputs(own, side),
                      input_bytes(matrix[side]), count, out + size(begin) * out_stride, out_stride);
  }
}

// Starts to bring this thread's part of the next product into the cache, before it waits.
void Decoder::Run::fetch_next(const PackedMatrix (&matrix)[2], const Chunk& chunk, int thread) {
  if (!private_) return;
  const PackedMatrix& next = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  kernels_.fetch(next.panel(share(next.panels(), thread, threads_).begin), kFetchBytes);
}

void Decoder::Run::gate_up(const Layer& layer, const Chunk& chunk, Private& own, int thread) {
  const PackedMatrix(&matrix)[2] = layer.projections[kGateUp];
  const std::vector<float>& bias = layer.biases[kGateUp];
  const PackedMatrix& larger = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  const int fitting =
      static_cast<int>(kGateUpBytes / (size(chunk.count) * 2 * kLanes * sizeof(float)));
  const int pairs = std::max(1, std::min(fitting, piece(larger, chunk.count) / 2));
  float* temporary = own.gate_up.data();
  buffers_.panels->hand_out(larger.panels() / 2, pairs, thread, own.turn++, [&](Range range) {
    const int count = range.end - range.begin;
    const size_t start = size(range.begin) * 2 * kLanes, stride = size(count) * 2 * kLanes;
    // the products address their outputs from panel 0 on
    multiply(matrix, chunk, own, {2 * range.begin, 2 * range.end}, temporary - start, stride);
    for (int slot = 0; slot < chunk.count; ++slot)
      kernels_.gated(temporary + size(slot) * stride, bias.empty() ? nullptr : bias.data() + start,
                     count, shape_.gelu,
                     buffers_.inner.data() + size(slot) * size(shape_.intermediate_size) +
                         start / 2);
  });
}

void Decoder::Run::add_branch(const Chunk& chunk, int slot, const std::vector<float>& bias,
                              const std::vector<float>& post_norm, Private& own) {
  const int hidden_size = shape_.hidden_size;
  float* h = hidden(own, chunk.first + chunk.order[slot]);
  float* branch = buffers_.projected.data() + size(slot) * size(hidden_size);
  if (post_norm.empty()) {
    kernels_.add(h, branch, or_null(bias), hidden_size);
    return;
  }
  float* normed = own.normed.data();
  std::copy_n(branch, hidden_size, normed);
  if (!bias.empty())
    for (int i = 0; i < hidden_size; ++i) normed[i] += bias[size(i)];
  kernels_.rms_norm(normed, post_norm.data(), hidden_size, shape_.norm_epsilon, normed);
  kernels_.add(h, normed, nullptr, hidden_size);
}

// ---- exits ----------------------------------------------------------------------------------

bool Decoder::Run::needs_similarity(int layers_run) const {
  return pass_.record_similarities ||
         (layers_run < shape_.num_layers && std::isfinite(pass_.thresholds[size(layers_run)]));
}

Decoder::Run::Chunk Decoder::Run::chunk(int first, Private& own) const {
  const int count = std::min(kChunkRows, rows_ - first);
  own.order.clear();
  for (const char backbone : {1, 0})
    for (int row = 0; row < count; ++row)
      if (own.in_backbone[size(first + row)] == backbone) own.order.push_back(row);
  const auto begin = own.in_backbone.begin() + first;
  return {first, count, static_cast<int>(std::count(begin, begin + count, 1)), own.order.data()};
}

void Decoder::Run::leave(Private& own, int thread, int row, int layers_run) {
  own.in_backbone[size(row)] = 0;
  if (thread == 0) pass_.exit_layers[size(row)] = layers_run;
}

// Every thread comes to the same decision from the same similarities.
void Decoder::Run::decide(int layers_run, Private& own, int thread) {
  constexpr float kAlways = -std::numeric_limits<float>::infinity();
  if (layers_run >= shape_.num_layers) return;
  const float threshold = pass_.thresholds[size(layers_run)];
  if (threshold == std::numeric_limits<float>::infinity()) return;
  if (threshold == kAlways) {
    for (int row = 0; row < rows_; ++row)
      if (own.in_backbone[size(row)]) leave(own, thread, row, layers_run);
    return;
  }
  const std::vector<float>& similarity = private_ ? own.similarity : buffers_.similarity;
  std::vector<float>& joined = own.joined;
  joined.assign(similarity.begin(), similarity.end());
  const auto join = [&](const std::vector<int>& groups, bool mean) {
    if (groups.empty()) return;
    std::vector<double>& value = own.group_values;
    std::vector<int>& members = own.group_members;
    value.assign(size(rows_), mean ? 0.0 : 2.0);
    members.assign(size(rows_), 0);
    for (int row = 0; row < rows_; ++row) {
      if (!own.in_backbone[size(row)]) continue;
      double& v = value[size(groups[size(row)])];
      const double s = joined[size(row)];
      v = mean ? v + s : std::min(v, s);
      ++members[size(groups[size(row)])];
    }
    for (int row = 0; row < rows_; ++row) {
      const size_t g = size(groups[size(row)]);
      if (own.in_backbone[size(row)])
        joined[size(row)] = static_cast<float>(mean ? value[g] / members[g] : value[g]);
    }
  };
  join(pass_.mean_groups, true);
  join(pass_.minimum_groups, false);
  for (int row = 0; row < rows_; ++row)
    if (own.in_backbone[size(row)] && joined[size(row)] > threshold)
      leave(own, thread, row, layers_run);
}

// ---- logits ---------------------------------------------------------------------------------

void Decoder::Run::head(Private& own, int thread) {
  const int total = static_cast<int>(pass_.logit_rows.size());
  const size_t input_size = input_bytes(model_.head);
  own.best.assign(size(total), Best{});
  for (int first = 0; first < total; first += kChunkRows) {
    const int count = std::min(kChunkRows, total - first);
    const Range rows = rows_of(count, thread);
    uint8_t* input = inputs(own, kBackbone);
    for (int i = rows.begin; i < rows.end; ++i) {
      kernels_.rms_norm(hidden(own, pass_.logit_rows[size(first + i)]), or_null(model_.final_norm),
                        shape_.hidden_size, shape_.norm_epsilon, own.normed.data());
      if (model_.head.bits == 16)
        kernels_.prepare_pairs(own.normed.data(), shape_.hidden_size, input + size(i) * input_size);
      else
        kernels_.prepare_fixed(own.normed.data(), shape_.hidden_size, model_.head.group_size,
                               input + size(i) * input_size);
    }
    meet_unless_private(thread);
    float* logits = pass_.logits.data() + size(first) * pass_.logit_stride;
    const auto multiply_and_rank = [&](Range panels) {
      kernels_.matmul(model_.head, panels.begin, panels.end, input, input_size, count, logits,
                      pass_.logit_stride);
      const int token = panels.begin * kLanes;
      const int tokens = std::min(panels.end * kLanes, shape_.vocab_size) - token;
      for (int i = 0; i < count; ++i) {
        float* part = logits + size(i) * pass_.logit_stride + token;
        Best& best = own.best[size(first + i)];
        float value;
        const int place = kernels_.argmax(part, tokens, &value);
        best.take({value, token + place});
        if (shape_.logit_cap > 0)
          for (int j = 0; j < tokens; ++j)
            part[j] = shape_.logit_cap * std::tanh(part[j] / shape_.logit_cap);
      }
    };
    buffers_.panels->hand_out(model_.head.panels(), piece(model_.head, count), thread, own.turn++,
                              multiply_and_rank);
    meet_unless_private(thread);
  }
}

// ---- before and after -----------------------------------------------------------------------

void Decoder::Run::prepare() {
  const auto check = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  const size_t rows = pass_.tokens.size();
  check(rows > 0, "a pass has no rows");
  check(pass_.sequences.size() == rows, "tokens and sequences differ in number");
  check(pass_.thresholds.size() == size(shape_.num_layers), "give one threshold for each layer");
  check(pass_.mean_groups.empty() || pass_.mean_groups.size() == rows, "one mean group for each row");
  check(pass_.minimum_groups.empty() || pass_.minimum_groups.size() == rows,
        "one minimum group for each row");
  for (const auto* groups : {&pass_.mean_groups, &pass_.minimum_groups})
    for (const int group : *groups) check(group >= 0 && group < rows_, "a group is out of range");
  check(pass_.logit_rows.size() <= rows, "there are more rows of logits than rows");
  for (const int row : pass_.logit_rows) check(row >= 0 && row < rows_, "no such row for logits");

  std::vector<int> lengths(size(cache_.sequences()));
  for (int s = 0; s < cache_.sequences(); ++s) lengths[size(s)] = cache_.length(s);
  buffers_.positions.resize(rows);
  for (size_t row = 0; row < rows; ++row) {
    const int sequence = pass_.sequences[row];
    check(sequence >= 0 && sequence < cache_.sequences(), "there is no such sequence");
    check(pass_.tokens[row] >= 0 && pass_.tokens[row] < shape_.vocab_size, "there is no such token");
    buffers_.positions[row] = lengths[size(sequence)]++;
    one_row_each_ = one_row_each_ && buffers_.positions[row] == cache_.length(sequence);
  }
  int longest = 0;
  for (const int length : lengths) longest = std::max(longest, length);
  check(model_.rotary.empty() || longest <= model_.positions(), "the rotary table is too short");
  check(model_.query_scales.empty() || size(longest) <= model_.query_scales.size(),
        "there are too few query scales");
  for (int s = 0; s < cache_.sequences(); ++s) cache_.reserve(s, lengths[size(s)]);

  const size_t chunk = std::min<size_t>(rows, kChunkRows);
  const size_t hidden_size = size(shape_.hidden_size), dims = size(shape_.head_dim);
  const size_t heads = size(shape_.num_heads), kv_heads = size(shape_.num_kv_heads);
  size_t input[2] = {input_bytes(model_.head), 0};
  for (int p = 0; p < 4; ++p)
    for (const Side side : {kBackbone, kRiver})
      input[side] = std::max(input[side], input_bytes(model_.layers[0].projections[p][side]));
  const size_t queries = size(queries_per_kv_) * kQueryRows;
  buffers_.panels->reset(threads_);
  if (buffers_.threads.size() < size(threads_)) buffers_.threads.resize(size(threads_));
  for (Private& own : buffers_.threads) {
    if (private_) {
      own.hidden.fit(kPrivateRows * hidden_size);
      own.before.fit(kPrivateRows * hidden_size);
      own.attended.fit(kPrivateRows * heads * dims);
      for (const Side side : {kBackbone, kRiver}) own.inputs[side].fit(kPrivateRows * input[side]);
    }
    own.turn = 0;
    // a thread that can't have memory would end the process: it takes none
    own.order.reserve(chunk);
    own.in_backbone.reserve(rows);
    own.similarity.reserve(rows);
    own.joined.reserve(rows);
    own.group_values.reserve(rows);
    own.group_members.reserve(rows);
    own.best.reserve(pass_.logit_rows.size());
    own.normed.fit(hidden_size);
    own.gate_up.fit(kGateUpBytes / sizeof(float));
    own.query.fit(size(queries_per_kv_) * kernels_.query_bytes(shape_.head_dim));
    own.heads.fit(2 * dims);
    own.running.fit(queries * (dims + 2));
    own.partial.fit(queries * (dims + 2));
  }
  if (!private_) {
    buffers_.hidden.fit(rows * hidden_size);
    buffers_.before.fit(rows * hidden_size);
    for (const Side side : {kBackbone, kRiver}) buffers_.inputs[side].fit(chunk * input[side]);
  }
  buffers_.qkv.fit(chunk * (heads + 2 * kv_heads) * dims);
  buffers_.queries.fit(chunk * heads * kernels_.query_bytes(shape_.head_dim));
  buffers_.attended.fit(chunk * heads * dims);
  buffers_.projected.fit(chunk * hidden_size);
  buffers_.inner.fit(chunk * size(shape_.intermediate_size));
  const size_t pages = size(longest) / kPagePositions + 1;
  const size_t few_rows = std::min<size_t>(rows, size(few_rows_limit()));
  buffers_.partials.fit(few_rows * heads * pages * (dims + 2));
  buffers_.similarity.assign(rows, 0.0f);

  pass_.best_tokens.assign(pass_.logit_rows.size(), 0);
  pass_.exit_layers.assign(rows, shape_.num_layers);
  pass_.similarities.clear();
  if (pass_.record_similarities)
    pass_.similarities.assign(size(shape_.num_layers) * rows, std::nanf(""));
  pass_.logit_stride = size(model_.head.panels()) * kLanes;
  pass_.logits.resize(pass_.logit_rows.size() * pass_.logit_stride);
}

void Decoder::Run::commit() {
  for (const int sequence : pass_.sequences)
    cache_.set_length(sequence, cache_.length(sequence) + 1);
  for (size_t i = 0; i < pass_.logit_rows.size(); ++i) {
    Best best;
    for (int t = 0; t < threads_; ++t) best.take(buffers_.threads[size(t)].best[i]);
    pass_.best_tokens[i] = best.token;
  }
}

Decoder::Decoder(const Model& model, const KernelSet& kernels, Team& team)
    : cache(model.shape.num_layers, model.shape.num_kv_heads, model.shape.head_dim),
      model_(model),
      kernels_(kernels),
      team_(team),
      crew_(team.size()),
      buffers_(std::make_unique<Buffers>()) {
  buffers_->panels = std::make_unique<WorkShare>(team.size());
}

Decoder::~Decoder() = default;

void Decoder::forward(Pass& pass) {
  const bool is_small = pass.tokens.size() <= kSmallRows;
  const int threads = is_small ? crew_.threads() : team_.size();
  Run run(*this, pass, threads);
  try {
    run.prepare();
  } catch (...) {
    for (int s = 0; s < cache.sequences(); ++s) cache.truncate(s, cache.length(s));  // unused pages
    throw;
  }
  const auto start = std::chrono::steady_clock::now();
  team_.run(threads, run);
  if (is_small) crew_.passed(std::chrono::steady_clock::now() - start, team_.stalled());
  run.commit();
}

}  // namespace river
