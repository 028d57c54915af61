// Attention over the pages of the KV cache, for few rows and for many.
#include "pass_run.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace river {
namespace {

constexpr int kPrivateItems = 16;  // so few pages of key-value heads each thread joins for itself

}  // namespace

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
    const RotaryTable& table = model_.angles(layer.rope, buffers_.long_angles[size(row)]);
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
    kernels_.prepare_query(out, dims, cache_.bits(), queries + size(q) * query_bytes());
  }
  if (!write) return;
  float* value = out + dims;
  head(key_start, out);
  norm(layer.key_norm, shape_.num_heads * dims, shape_.num_kv_heads * dims, key_start, out);
  rotate(out, 1.0f);
  head(value_start, value);
  cache_.write(pass_.sequences[size(row)], position, index, kv_head, out, value);
}

// Few rows: the threads share the pages of a row, and its partial sums are joined afterwards, in
// the order of the pages, as attend_by_rows joins them. Returns whether each thread has joined all
// of them for itself, in place of waiting for the others' parts.
bool Decoder::Run::attend_by_page(const Layer& layer, int index, const Chunk& chunk, Private& own,
                                  int thread) {
  const int dims = shape_.head_dim, kv_heads = shape_.num_kv_heads, threads = threads_;
  const size_t row_bytes = size(queries_per_kv_) * query_bytes();
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
    pool_.barrier(thread);
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
        attend_page(layer, index, pass_.sequences[size(row)], first + i - item,
                    first + std::min(i + 1, end - 1) - item, kv_head, queries, row_bytes, &position,
                    1, buffers_.partials.data() + size(i) * partial_size);
    }
  }
  pool_.barrier(thread);

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
  const size_t head_bytes = size(queries_per_kv_) * query_bytes();
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
  pool_.barrier(thread);

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
        attend_page(layer, index, sequence, page, std::min(page + 1, last_page), kv_head,
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

void Decoder::Run::attend_page(const Layer& layer, int index, int sequence, int page,
                               int next_page, int kv_head, const uint8_t* queries,
                               size_t row_stride, const int* positions, int rows, float* partial) {
  const int dims = shape_.head_dim;
  int begin[kQueryRows * kMaxGroupedQueries], end[kQueryRows * kMaxGroupedQueries];
  PageAttention attention;
  attention.keys = cache_.keys(sequence, page, index, kv_head);
  attention.values = cache_.values(sequence, page, index, kv_head);
  attention.key_scales = cache_.key_scales(sequence, page, index, kv_head);
  attention.value_scales = cache_.value_scales(sequence, page, index, kv_head);
  attention.next = reinterpret_cast<const uint8_t*>(cache_.keys(sequence, next_page, index, kv_head)) -
                   reinterpret_cast<const uint8_t*>(attention.keys);
  attention.head_dim = dims;
  attention.query_stride = query_bytes();
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

}  // namespace river
