// A model's weights and positions, as Python hands them over.
#include <algorithm>
#include <set>

#include "engine.h"
#include "require.h"

namespace river {
namespace {

SourceMatrix read_codes(const Codes& given, int columns, int bits, int group_size) {
  const auto& [codes, scales, zeros] = given;
  require(bits < 16 && group_size > 0, "codes have 8 or 3 to 6 bits, in groups of one or more");
  const size_t rows = codes.shape(0), groups = static_cast<size_t>(columns / group_size);
  require(codes.shape(1) == static_cast<size_t>(columns) * static_cast<size_t>(bits) / 8 &&
            scales.shape(0) == rows && zeros.shape(0) == rows && scales.shape(1) == groups &&
            zeros.shape(1) == groups,
        "codes, scales and zeros don't fit together, or not the model");
  return {static_cast<int>(rows), nullptr, codes.data(), scales.data(), zeros.data()};
}

// bfloat16 in uint16, or codes with scales and zeros, whichever the format has. The arrays have to
// outlive the result.
SourceMatrix read_matrix(nb::handle given, int columns, const PackedMatrix& packed) {
  Codes codes;
  Matrix16 weights;
  if (packed.bits < 16) {
    require(nb::try_cast(given, codes, false), "these weights are codes, scales and zeros");
    return read_codes(codes, columns, packed.bits, packed.group_size);
  }
  require(nb::try_cast(given, weights, false) && weights.shape(1) == static_cast<size_t>(columns),
        "these weights are bfloat16 in uint16, without gaps and of the model's width");
  return {static_cast<int>(weights.shape(0)), weights.data(), nullptr, nullptr, nullptr};
}

// The parts that a dictionary gives, each of them taken once.
class Parts {
 public:
  explicit Parts(const nb::dict& parts) : parts_(parts) {
    for (const auto& item : parts) left_.insert(nb::cast<std::string>(item.first));
  }
  bool take(const char* name, nb::object& part) {
    if (left_.erase(name) == 0) return false;
    part = parts_[name];
    return true;
  }
  void take(const char* name, std::vector<float>& out, int size, int or_size = -1) {
    nb::object part;
    if (!take(name, part)) return;
    FloatVector values;
    const auto fits = [&](int n) { return values.size() == static_cast<size_t>(n); };
    if (!nb::try_cast(part, values, false) || (!fits(size) && !fits(or_size)))
      throw std::invalid_argument(std::string(name) +
                                  " is no float32 vector of the right size without gaps");
    out = to_vector(values);
  }
  void take(const char* name, int& out) {
    if (left_.erase(name) > 0) out = whole_number(parts_, name);
  }
  void check_all_taken() const {
    if (!left_.empty()) throw std::invalid_argument("an unknown part: " + *left_.begin());
  }

 private:
  const nb::dict& parts_;
  std::set<std::string> left_;
};

}  // namespace

void Engine::load_layer(int index, const nb::dict& given) {
  const Lock lock(*this);
  check_layer(index);
  const Shape& s = model_.shape;
  Layer& layer = model_.layers[static_cast<size_t>(index)];
  Layer changed = layer;
  Parts parts(given);
  const int heads = s.num_heads * s.head_dim, kv_heads = s.num_kv_heads * s.head_dim;
  parts.take("attention_norm", changed.attention_norm, s.hidden_size);
  parts.take("post_attention_norm", changed.post_attention_norm, s.hidden_size);
  parts.take("mlp_norm", changed.mlp_norm, s.hidden_size);
  parts.take("post_mlp_norm", changed.post_mlp_norm, s.hidden_size);
  parts.take("query_norm", changed.query_norm, s.head_dim, heads);
  parts.take("key_norm", changed.key_norm, s.head_dim, kv_heads);
  parts.take("qkv_bias", changed.biases[kQkv], heads + 2 * kv_heads);
  parts.take("output_bias", changed.biases[kOutput], s.hidden_size);
  parts.take("gate_up_bias", changed.biases[kGateUp], 2 * s.intermediate_size);
  parts.take("down_bias", changed.biases[kDown], s.hidden_size);
  parts.take("window", changed.window);
  parts.take("rope", changed.rope);
  require(changed.window >= 0, "a negative window");
  require(changed.rope >= -1 && changed.rope < s.rope_kinds, "there are no such rotary angles");

  std::vector<std::vector<nb::object>> matrices[2];  // [Side][Projection], kept while they are read
  Model::Sources sources[2];
  for (const Side side : {kBackbone, kRiver}) {
    nb::object part;
    if (!parts.take(side == kBackbone ? "backbone" : "river", part)) continue;
    require(nb::try_cast(part, matrices[side], false) && matrices[side].size() == 4,
            "a side of a layer is a list of matrices for each of four projections");
    for (size_t p = 0; p < 4; ++p)
      for (const nb::object& matrix : matrices[side][p])
        sources[side][p].push_back(
            read_matrix(matrix, model_.inputs(static_cast<int>(p)), layer.projections[p][side]));
  }
  parts.check_all_taken();
  {
    nb::gil_scoped_release release;
    model_.set_layer(index, sources, *pool_);
  }
  layer = std::move(changed);
}

void Engine::load_head(const nb::dict& given) {
  const Lock lock(*this);
  const Shape& s = model_.shape;
  Parts parts(given);
  nb::object embedding, weights;
  Matrix16 rows = embedding_;
  std::vector<float> final_norm = model_.final_norm;
  parts.take("final_norm", final_norm, s.hidden_size);
  if (parts.take("embedding", embedding))
    require(nb::try_cast(embedding, rows, false) && rows.shape(0) == static_cast<size_t>(s.vocab_size) &&
              rows.shape(1) == static_cast<size_t>(s.hidden_size),
          "the embedding is bfloat16 in uint16, a row for each token, without gaps");
  const bool has_weights = parts.take("weights", weights);
  parts.check_all_taken();
  if (has_weights) {
    const SourceMatrix source = read_matrix(weights, s.hidden_size, model_.head);
    nb::gil_scoped_release release;
    model_.set_head(source, *pool_);
  }
  model_.final_norm = std::move(final_norm);
  embedding_ = rows;
  if (rows.is_valid()) model_.embedding = rows.data();
}

void Engine::load_draft_head(const Codes& codes, int bits, int group_size) {
  const Lock lock(*this);
  const SourceMatrix source = read_codes(codes, model_.shape.hidden_size, bits, group_size);
  nb::gil_scoped_release release;
  model_.set_draft_head(source, {bits, group_size}, *pool_);
}

void Engine::load_positions(int first, const std::vector<std::pair<FloatMatrix, FloatMatrix>>& angles,
                            const FloatVector& query_scales) {
  const Lock lock(*this);
  const Shape& s = model_.shape;
  const auto half = static_cast<size_t>(s.rotary_dim / 2);
  require(first >= 0 && angles.size() == model_.rotary.size(), "give the angles of each rotary table");
  const auto replace = [](std::vector<float>& values, size_t start, const float* given, size_t count) {
    require(start <= values.size(), "positions leave a gap");
    values.resize(start);
    values.insert(values.end(), given, given + count);
  };
  for (size_t table = 0; table < angles.size(); ++table) {
    const auto& [cosines, sines] = angles[table];
    require(cosines.shape(1) == half && sines.shape(1) == half && cosines.shape(0) == sines.shape(0),
          "rotary angles of the wrong shape");
    const bool is_short = s.rope_boundary > 0 && table < static_cast<size_t>(s.rope_kinds);
    const size_t start = half * static_cast<size_t>(is_short ? std::min(first, s.rope_boundary) : first);
    replace(model_.rotary[table].cosines, start, cosines.data(), cosines.size());
    replace(model_.rotary[table].sines, start, sines.data(), sines.size());
  }
  if (query_scales.size() > 0)
    replace(model_.query_scales, static_cast<size_t>(first), query_scales.data(), query_scales.size());
}

nb::object Engine::head_rows(int first, int count) {
  const Lock lock(*this);
  require(model_.head.bits == 16, "the LM head is in codes");
  require(first >= 0 && count >= 0 && first <= model_.head.rows - count, "the LM head has no such rows");
  const auto width = static_cast<size_t>(model_.shape.hidden_size);
  std::vector<uint16_t> rows(static_cast<size_t>(count) * width);
  std::vector<float> row(width);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    unpack_row(model_.head, first + static_cast<int>(i), model_.shape.hidden_size, row.data());
    std::transform(row.begin(), row.end(), rows.begin() + static_cast<ptrdiff_t>(i * width), to_bf16);
  }
  return numpy_array(std::move(rows), {static_cast<size_t>(count), width});
}

}  // namespace river
