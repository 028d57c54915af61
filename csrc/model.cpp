#include "model.h"

#include <algorithm>
#include <utility>

#include "require.h"

namespace river {
namespace {

constexpr int kLargestSize = 1 << 24;  // so that no product of a size and a few overflows an int

void check_format(Format format, int columns) {
  const bool coded = ((format.bits >= 3 && format.bits <= 6) || format.bits == 8) &&
                     (format.group_size == 32 || format.group_size == 64 || format.group_size == 128);
  require(format.bits == 16 || coded, "weights have 16, 8 or 3 to 6 bits and groups of 32, 64 or 128");
  require(!coded || columns % format.group_size == 0, "a width is no multiple of the group");
}

PackedMatrix plan(int rows, int columns, Format format) {
  PackedMatrix matrix;
  matrix.rows = rows;
  matrix.columns = format.bits == 16 ? (columns + kInputBlock - 1) / kInputBlock * kInputBlock
                                     : columns;
  matrix.bits = format.bits;
  matrix.group_size = format.group_size;
  matrix.panel_bytes = panel_bytes(columns, format.bits, format.group_size);
  return matrix;
}

// Puts a layer's matrices one after the other, and returns where the next one goes.
const uint8_t* place_side(Layer& layer, Side side, const uint8_t* data) {
  for (auto& sides : layer.projections) {
    sides[side].data = data;
    if (data != nullptr) data += sides[side].bytes();
  }
  return data;
}

void pack(const PackedMatrix& matrix, int columns, const std::vector<SourceMatrix>& sources,
          bool interleaved, ThreadPool& pool) {
  auto* out = const_cast<uint8_t*>(matrix.data);
  const int panels = matrix.panels();
  pool.run([&](int t) {
    pack_panels(sources, interleaved, columns, matrix.bits, matrix.group_size,
                panels * t / pool.size(), panels * (t + 1) / pool.size(), out);
  });
}

}  // namespace

Model::Model(const Shape& s, Format backbone, const RiverFormat& river, Format head_format,
             int in_memory)
    : shape(s), layers(static_cast<size_t>(std::clamp(s.num_layers, 0, kLargestSize))),
      rotary(static_cast<size_t>(std::clamp(s.rope_kinds, 0, 16)) * (s.rope_boundary > 0 ? 2 : 1)) {
  for (const int size : {s.num_layers, s.hidden_size, s.num_heads, s.num_kv_heads, s.head_dim,
                         s.intermediate_size, s.vocab_size}) {
    require(size > 0, "a size of the model is zero or negative");
    require(size <= kLargestSize, "a size of the model is too large");
  }
  require(s.num_heads <= kLargestSize / s.head_dim, "the heads together are too large");
  require(s.num_heads % s.num_kv_heads == 0,
        "the heads are no multiple of the key-value heads");
  require(s.num_heads / s.num_kv_heads <= kMaxGroupedQueries, "more than 64 heads share keys");
  require(s.hidden_size % kLanes == 0 && s.intermediate_size % kLanes == 0 && s.head_dim % kLanes == 0,
        "hidden size, intermediate size and head dim have to be multiples of 16");
  require(in_memory >= 0 && in_memory <= s.num_layers, "the model hasn't so many layers to keep");
  require(s.rope_kinds >= 0 && s.rope_kinds <= 16, "there are 0 to 16 kinds of rotary angles");
  require(s.rope_boundary >= 0, "the boundary of rotary angles is negative");
  require(s.rotary_dim >= 0 && s.rotary_dim % 2 == 0 && s.rotary_dim <= s.head_dim, "the rotary dim is odd, negative or too large");
  const int columns[4] = {inputs(kQkv), inputs(kOutput), inputs(kGateUp), inputs(kDown)};
  const int rows[4] = {(s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.hidden_size,
                       2 * s.intermediate_size, s.hidden_size};
  require(river.bits.size() == layers.size(), "the river has bits for each projection of each layer");
  check_format(head_format, s.hidden_size);
  for (size_t l = 0; l < layers.size(); ++l)
    for (size_t p = 0; p < 4; ++p) {
      const Format in_river{river.bits[l][p], river.group_size};
      require(in_river.bits < 16, "a river's weights are codes");
      for (const Format& format : {backbone, in_river}) check_format(format, columns[p]);
      layers[l].projections[p][kBackbone] = plan(rows[p], columns[p], backbone);
      layers[l].projections[p][kRiver] = plan(rows[p], columns[p], in_river);
    }
  head = plan(s.vocab_size, s.hidden_size, head_format);

  layer_bytes_ = layer_bytes(0, kBackbone);
  rest_bytes_ = head_bytes();
  for (int l = 0; l < s.num_layers; ++l) rest_bytes_ += layer_bytes(l, kRiver);
  rest_ = Buffer(rest_bytes_ + kSlack);
  const uint8_t* next = rest_.data();
  for (Layer& layer : layers) next = place_side(layer, kRiver, next);
  head.data = next;
  backbone_.resize(layers.size());
  for (int l = 0; l < in_memory; ++l) take_layer(l);
}

void Model::take_layer(int layer) {
  Buffer& buffer = backbone_.at(static_cast<size_t>(layer));
  if (buffer.size() == 0) buffer = Buffer(layer_bytes_ + kSlack);
  place_layer(layer, buffer.data());
}

void Model::drop_layer(int layer) {
  place_layer(layer, nullptr);
  backbone_.at(static_cast<size_t>(layer)) = Buffer();
}

void Model::place_layer(int layer, const uint8_t* data) {
  place_side(layers.at(static_cast<size_t>(layer)), kBackbone, data);
}

Model::Part Model::packed_layer(int layer) const {
  return {backbone_.at(static_cast<size_t>(layer)).data(), layer_bytes_};
}

size_t Model::weight_bytes() const {
  size_t bytes = rest_.size() + draft_weights_.size();
  for (const Buffer& buffer : backbone_) bytes += buffer.size();
  return bytes;
}

void Model::set_layer(int layer, const Sources (&sources)[2], ThreadPool& pool) {
  const auto is_given = [&](Side side) {
    return std::any_of(sources[side].begin(), sources[side].end(), [](auto& s) { return !s.empty(); });
  };
  auto& projections = layers.at(static_cast<size_t>(layer)).projections;
  for (const Side side : {kBackbone, kRiver})
    for (int p = 0; p < 4 && is_given(side); ++p) {
      const std::vector<SourceMatrix>& parts = sources[side][static_cast<size_t>(p)];
      int rows = 0;
      for (const SourceMatrix& part : parts) rows += part.rows;
      require(projections[p][side].data != nullptr, "the layer is not in memory");
      require(rows == projections[p][side].rows, "a projection has the wrong number of outputs");
      require(p != kGateUp || (parts.size() == 2 && parts[0].rows == parts[1].rows),
              "gate and up are two matrices of one size");
    }
  for (const Side side : {kBackbone, kRiver})
    for (int p = 0; p < 4 && is_given(side); ++p)
      pack(projections[p][side], inputs(p), sources[side][static_cast<size_t>(p)], p == kGateUp, pool);
}

int Model::inputs(int projection) const {
  return projection == kOutput ? shape.num_heads * shape.head_dim
         : projection == kDown ? shape.intermediate_size
                               : shape.hidden_size;
}

void Model::set_head(const SourceMatrix& source, ThreadPool& pool) {
  require(source.rows == head.rows, "the LM head has the wrong number of outputs");
  pack(head, shape.hidden_size, {source}, false, pool);
}

void Model::set_draft_head(const SourceMatrix& source, Format format, ThreadPool& pool) {
  require(source.rows == head.rows, "the drafts' LM head has the wrong number of outputs");
  check_format(format, shape.hidden_size);
  PackedMatrix matrix = plan(head.rows, shape.hidden_size, format);
  Buffer weights(matrix.bytes() + kSlack);
  matrix.data = weights.data();
  pack(matrix, shape.hidden_size, {source}, false, pool);
  draft_head = matrix;
  draft_weights_ = std::move(weights);
}

int Model::positions(bool is_long) const {
  if (shape.rotary_dim == 0) return INT32_MAX;
  size_t positions = INT32_MAX;
  for (int kind = 0; kind < shape.rope_kinds; ++kind)
    positions = std::min(positions,
                         angles(kind, is_long).cosines.size() * 2 / static_cast<size_t>(shape.rotary_dim));
  return static_cast<int>(positions);
}

void Model::embed(int token, float* out) const {
  if (embedding == nullptr) {
    unpack_row(head, token, shape.hidden_size, out);
  } else {
    const bf16* row = embedding + static_cast<size_t>(token) * shape.hidden_size;
    for (int i = 0; i < shape.hidden_size; ++i) out[i] = to_float(row[i]);
  }
  if (shape.embedding_scale != 1.0f)
    for (int i = 0; i < shape.hidden_size; ++i) out[i] *= shape.embedding_scale;
}

size_t Model::layer_bytes(int layer, Side side) const {
  size_t bytes = 0;
  for (const auto& sides : layers.at(static_cast<size_t>(layer)).projections)
    bytes += sides[side].bytes();
  return bytes;
}

}  // namespace river
