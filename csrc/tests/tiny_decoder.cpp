#include "tiny_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace river::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kHidden = 64, kHeads = 4, kKvHeads = 2, kDims = 16, kInner = 96, kGroup = 32;

Shape shape_of(const Kind& kind) {
  Shape shape{};
  shape.num_layers = kLayers;
  shape.hidden_size = kHidden;
  shape.num_heads = kHeads;
  shape.num_kv_heads = kKvHeads;
  shape.head_dim = kDims;
  shape.intermediate_size = kInner;
  shape.vocab_size = kVocabulary;
  shape.rotary_dim = kind.has_everything ? 8 : kDims;
  shape.rope_kinds = kind.has_everything ? 2 : 1;
  shape.rope_boundary = kind.rope_boundary;
  shape.norm_epsilon = 1e-5f;
  shape.attention_scale = 0.03f;
  shape.embedding_scale = kind.has_everything ? 8.0f : 1.0f;
  shape.logit_cap = kind.has_everything ? 20.0f : 0.0f;
  shape.gelu = kind.has_everything;
  shape.tied_head = !kind.has_everything && kind.head_bits == 16;
  return shape;
}

Format format(int bits) { return {bits, bits == 16 ? 0 : kGroup}; }

RiverFormat river_format(std::array<int, 4> bits) {
  RiverFormat format{{}, kGroup};
  for (int l = 0; l < kLayers; ++l) {
    format.bits.push_back(bits);
    std::rotate(bits.begin(), bits.begin() + 1, bits.end());
  }
  return format;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace

bool Result::operator==(const Result& other) const {
  return exit_layers == other.exit_layers && best_tokens == other.best_tokens &&
         same(similarities, other.similarities) && same(logits, other.logits);
}

Result Result::row(int index) const {
  Result result;
  const auto i = static_cast<size_t>(index), rows = exit_layers.size();
  result.exit_layers = {exit_layers[i]};
  result.best_tokens = {best_tokens[i]};
  for (size_t l = 0; l < kLayers; ++l) result.similarities.push_back(similarities[l * rows + i]);
  const auto begin = logits.begin() + index * kVocabulary;
  result.logits.assign(begin, begin + kVocabulary);
  return result;
}

Result take(const Pass& pass) {
  Result result{pass.exit_layers, pass.best_tokens, pass.similarities, {}};
  for (size_t i = 0; i < pass.logit_rows.size(); ++i) {
    const auto row = pass.logits.begin() + static_cast<ptrdiff_t>(i * pass.logit_stride);
    result.logits.insert(result.logits.end(), row, row + kVocabulary);
  }
  return result;
}

Subject::Subject(const KernelSet& kernels, int threads, const Kind& kind)
    : pool(threads),
      model(shape_of(kind), format(kind.backbone_bits), river_format(kind.river_bits),
            format(kind.head_bits), kLayers),
      decoder(model, kLayers, kernels, pool, kind.kv_bits) {
  set_weights(kind);
  if (kind.has_everything) set_everything();
  begin(1);
}

void Subject::set_weights(const Kind& kind) {
  const std::vector<std::vector<int>> outputs = {
      {kHeads * kDims, kKvHeads * kDims, kKvHeads * kDims}, {kHidden}, {kInner, kInner}, {kHidden}};
  const int inputs[4] = {kHidden, kHeads * kDims, kHidden, kInner};
  Random seeds[2] = {Random(kind.backbone_seed), Random(kind.river_seed)};
  for (int l = 0; l < kLayers; ++l) {
    std::vector<Source> kept;
    kept.reserve(16);
    Model::Sources sources[2];
    for (size_t p = 0; p < 4; ++p)
      for (const Side side : {kBackbone, kRiver})
        for (const int rows : outputs[p]) {
          const PackedMatrix& matrix = model.layers[static_cast<size_t>(l)].projections[p][side];
          kept.emplace_back(rows, inputs[p], matrix.bits, matrix.group_size, seeds[side]);
          sources[side][p].push_back(kept.back().matrix());
        }
    model.set_layer(l, sources, pool);
  }
  Random random(3);
  for (Layer& layer : model.layers) {
    layer.attention_norm = random.reals(kHidden, 0.2f, 0.5f);
    layer.mlp_norm = random.reals(kHidden, 0.2f, 0.5f);
  }
  model.final_norm = random.reals(kHidden, 0.5f, 1.5f);
  const Source head(kVocabulary, kHidden, kind.head_bits, kGroup, random);
  model.set_head(head.matrix(), pool);
  if (!model.shape.tied_head) {
    for (int i = 0; i < kVocabulary * kHidden; ++i) embedding_.push_back(to_bf16(random.real(-1, 1)));
    model.embedding = embedding_.data();
  }
  for (RotaryTable& table : model.rotary)
    for (int i = 0; i < kPositions * model.shape.rotary_dim / 2; ++i) {
      const float angle = random.real(-3, 3);
      table.cosines.push_back(std::cos(angle));
      table.sines.push_back(std::sin(angle));
    }
}

void Subject::set_everything() {
  Random random(4);
  constexpr int kQkvRows = (kHeads + 2 * kKvHeads) * kDims;
  for (Layer& layer : model.layers) {
    layer.biases[kQkv] = random.reals(kQkvRows);
    layer.biases[kOutput] = random.reals(kHidden);
    layer.biases[kGateUp] = random.reals(2 * kInner);
    layer.biases[kDown] = random.reals(kHidden);
    layer.post_attention_norm = random.reals(kHidden, 0.5f, 1.5f);
    layer.post_mlp_norm = random.reals(kHidden, 0.5f, 1.5f);
    layer.query_norm = random.reals(kDims, 0.5f, 1.5f);
    layer.key_norm = random.reals(kDims, 0.5f, 1.5f);
  }
  model.layers[0].window = 9;
  model.layers[1].query_norm = random.reals(kHeads * kDims, 0.5f, 1.5f);
  model.layers[1].key_norm = random.reals(kKvHeads * kDims, 0.5f, 1.5f);
  model.layers[1].window = 70;
  model.layers[1].rope = 1;
  model.layers[2].rope = -1;
  model.layers[2].attention_norm.clear();
  model.query_scales = random.reals(kPositions, 0.5f, 2.0f);
}

void Subject::begin(int sequences) {
  for (int s = 0; s < decoder.cache.limit(); ++s)
    if (decoder.cache.has(s)) decoder.cache.drop(s);
  for (int s = 0; s < sequences; ++s) decoder.cache.add();
}

Result Subject::run(const std::vector<int>& tokens, const std::vector<int>& sequences,
                    const std::vector<float>& thresholds) {
  Pass pass;
  pass.tokens = tokens;
  pass.sequences = sequences;
  pass.thresholds = thresholds;
  for (int row = 0; row < static_cast<int>(tokens.size()); ++row) pass.logit_rows.push_back(row);
  pass.record_similarities = true;
  decoder.forward(pass);
  return take(pass);
}

std::vector<float> never() { return std::vector<float>(kLayers, kInfinity); }

std::vector<float> always() { return std::vector<float>(kLayers, -kInfinity); }

std::vector<float> sometimes(Subject& subject) {
  const std::vector<int> tokens = random_tokens(41, 99);
  subject.begin(1);
  const Result result = subject.run(tokens, never());
  subject.begin(1);
  std::vector<float> thresholds = {kInfinity};
  for (size_t l = 1; l < kLayers; ++l) {
    const auto row = result.similarities.begin() + static_cast<ptrdiff_t>((l - 1) * tokens.size());
    std::vector<float> similarities(row, row + static_cast<ptrdiff_t>(tokens.size()));
    std::sort(similarities.begin(), similarities.end());
    thresholds.push_back(similarities[tokens.size() / 2]);
  }
  return thresholds;
}

std::vector<int> random_tokens(int count, uint32_t seed) {
  Random random(seed);
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(random.whole(0, kVocabulary - 2));
  return tokens;
}

}  // namespace river::test
