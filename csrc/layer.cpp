// A decoder layer: its products and residuals, in order.
#include "pass_run.h"

#include <algorithm>

namespace river {
namespace {

constexpr size_t kFetchBytes = 8u << 10;   // of the next product, fetched before a barrier
constexpr size_t kGrainBytes = 32u << 10;  // of weights that a thread takes at a time, few rows
constexpr int kGrainsEach = 8;             // that a thread takes of a product, many rows

}  // namespace

// A decoder layer: h += attention(norm(h)), h += mlp(norm(h)). Backbone and exit layer share norms,
// biases, positions and the slot in the KV cache; each row's products take its side's weights.
void Decoder::Run::run_layer(const Layer& layer, int index, Chunk chunk, Private& own,
                             int thread) {
  const auto& projections = layer.projections;
  const int hidden_size = shape_.hidden_size;
  const Range rows = rows_of(chunk.count, thread);
  const bool similarity = needs_similarity(index + 1, own);

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
  barrier_unless_private(thread);

  // query, key, value
  const int qkv_rows = projections[kQkv][kBackbone].rows;
  project(projections[kQkv], chunk, own, thread, buffers_.qkv.data(), size(qkv_rows));
  fetch_next(projections[kOutput], chunk, thread);
  pool_.barrier(thread);

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
    pool_.barrier(thread);

  // output projection
  const int attended_size = shape_.num_heads * shape_.head_dim;
  for (int slot = rows.begin; slot < rows.end; ++slot)
    set_input(projections[kOutput], chunk, slot,
              attended + chunk.order[slot] * size(attended_size), attended_size, own);
  barrier_unless_private(thread);
  project(projections[kOutput], chunk, own, thread, buffers_.projected.data(), size(hidden_size));
  fetch_next(projections[kGateUp], chunk, thread);
  pool_.barrier(thread);

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
  barrier_unless_private(thread);

  // gated MLP
  gate_up(layer, chunk, own, thread);
  fetch_next(projections[kDown], chunk, thread);
  pool_.barrier(thread);
  for (int slot = rows.begin; slot < rows.end; ++slot)
    set_input(projections[kDown], chunk, slot,
              buffers_.inner.data() + slot * size(shape_.intermediate_size),
              shape_.intermediate_size, own);
  barrier_unless_private(thread);
  project(projections[kDown], chunk, own, thread, buffers_.projected.data(), size(hidden_size));
  if (index + 1 < shape_.num_layers)
    fetch_next(model_.layers[size(index + 1)].projections[kQkv], chunk, thread);
  pool_.barrier(thread);

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
  barrier_unless_private(thread);
}

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

void Decoder::Run::project(const PackedMatrix (&matrix)[2], const Chunk& chunk, Private& own,
                           int thread, float* out, size_t out_stride) {
  const PackedMatrix& larger = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  buffers_.panels->parallel_for(
      larger.panels(), grain(larger, chunk.count), thread, own.loops++,
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

// Panels that a thread takes at a time.
int Decoder::Run::grain(const PackedMatrix& matrix, int rows) const {
  const int each = (matrix.panels() + threads_ - 1) / threads_;
  if (rows > kPrivateRows) return std::max(2, each / kGrainsEach & ~1);  // kernels take them in twos
  return std::max({1, each / 128, static_cast<int>(kGrainBytes / matrix.panel_bytes)});
}

// Starts to bring this thread's part of the next product into the cache, before it waits.
void Decoder::Run::fetch_next(const PackedMatrix (&matrix)[2], const Chunk& chunk, int thread) {
  if (!private_) return;
  const PackedMatrix& next = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  if (next.data == nullptr) return;  // it isn't in memory yet
  kernels_.fetch(next.panel(share(next.panels(), thread, threads_).begin), kFetchBytes);
}

void Decoder::Run::gate_up(const Layer& layer, const Chunk& chunk, Private& own, int thread) {
  const PackedMatrix(&matrix)[2] = layer.projections[kGateUp];
  const std::vector<float>& bias = layer.biases[kGateUp];
  const PackedMatrix& larger = matrix[chunk.in_backbone > 0 ? kBackbone : kRiver];
  const int fitting =
      static_cast<int>(kGateUpBytes / (size(chunk.count) * 2 * kLanes * sizeof(float)));
  const int pairs = std::max(1, std::min(fitting, grain(larger, chunk.count) / 2));
  float* temporary = own.gate_up.data();
  buffers_.panels->parallel_for(larger.panels() / 2, pairs, thread, own.loops++, [&](Range range) {
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

}  // namespace river
