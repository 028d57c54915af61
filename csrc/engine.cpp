#include "engine.h"

#include <algorithm>
#include <functional>
#include <set>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace river {
namespace {

int process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<int>(getpid());
#else
  return 0;
#endif
}

const KernelSet& choose_kernels(const std::string& name) {
  const KernelSet* sets[kMaxKernelSets];
  const int count = available_kernel_sets(sets);
  if (name.empty()) return *sets[0];
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (name == sets[i]->name) return *sets[i];
    known += std::string(i > 0 ? ", " : "") + sets[i]->name;
  }
  throw std::invalid_argument("this processor has no kernels named '" + name + "'; it has " + known);
}

Shape read_shape(const nb::dict& d) {
  const auto whole = [&](const char* name) { return whole_number(d, name); };
  const auto real = [&](const char* name) { return nb::cast<float>(d[name]); };
  const auto flag = [&](const char* name) { return nb::cast<bool>(d[name]); };
  return {whole("num_layers"), whole("hidden_size"), whole("num_heads"), whole("num_kv_heads"),
          whole("head_dim"), whole("intermediate_size"), whole("vocab_size"), whole("rotary_dim"),
          real("norm_epsilon"), real("attention_scale"), real("embedding_scale"),
          real("logit_cap"), flag("gelu"), flag("tied_head")};
}

SourceMatrix read_codes(const Codes& codes, size_t columns, int bits, int group_size) {
  const auto& [packed_codes, scales, zeros] = codes;
  if (bits == 16) throw std::invalid_argument("these weights are bfloat16, not codes");
  if (group_size < 1) throw std::invalid_argument("a group has one weight or more");
  const size_t rows = packed_codes.shape(0), groups = columns / static_cast<size_t>(group_size);
  if (packed_codes.shape(1) != columns * static_cast<size_t>(bits) / 8 ||
      scales.shape(0) != rows || zeros.shape(0) != rows || scales.shape(1) != groups ||
      zeros.shape(1) != groups)
    throw std::invalid_argument("codes, scales and zeros don't fit together");
  return {static_cast<int>(rows), nullptr, packed_codes.data(), scales.data(), zeros.data()};
}

}  // namespace

// Keeps a second thread out, and a forked child, whose copy of the engine has no threads.
class Engine::Turn {
 public:
  explicit Turn(Engine& engine) : engine_(engine) {
    if (engine.process_ != process_id())
      throw std::runtime_error(
          "this engine belongs to the process that made it; make another one after a fork");
    if (engine.busy_.exchange(true))
      throw std::runtime_error("another thread is using this engine; give each thread its own");
  }
  ~Turn() { engine_.busy_ = false; }

 private:
  Engine& engine_;
};

Engine::Engine(const nb::dict& shape, std::pair<int, int> backbone, std::pair<int, int> river,
               std::pair<int, int> head, int rotary_tables, int threads, const std::string& kernels,
               int resident_layers, int kv_bits)
    : kernels_(choose_kernels(kernels)),
      team_(std::make_unique<Team>(checked_threads(threads))),
      model_(read_shape(shape), {backbone.first, backbone.second}, {river.first, river.second},
             {head.first, head.second}, rotary_tables, resident_layers),
      decoder_(model_, resident_layers, kernels_, *team_, kv_bits),
      process_(process_id()) {}

// A forked child has no threads to end.
Engine::~Engine() {
  if (process_ != process_id()) static_cast<void>(team_.release());
}

void Engine::set_layer(int layer, const nb::dict& parts) {
  Turn turn(*this);
  Layer changed = layer_at(layer);
  std::set<std::string> unknown;
  for (const auto& item : parts) unknown.insert(nb::cast<std::string>(item.first));
  const size_t hidden = static_cast<size_t>(model_.shape.hidden_size);
  const size_t dims = static_cast<size_t>(model_.shape.head_dim);
  const size_t heads = static_cast<size_t>(model_.shape.num_heads) * dims;
  const size_t kv_heads = static_cast<size_t>(model_.shape.num_kv_heads) * dims;
  const auto read = [&](const char* name, std::vector<float>& out, size_t size, size_t other) {
    if (unknown.erase(name) == 0) return;
    const nb::object given = parts[name];
    FloatVector values;
    if (!nb::try_cast<FloatVector>(given, values, false) ||
        (values.size() != size && values.size() != other))
      throw std::invalid_argument(std::string(name) +
                                  " is no float32 vector of the right size without gaps");
    out = to_vector(values);
  };
  const auto read_whole = [&](const char* name, int& out) {
    if (unknown.erase(name) > 0) out = whole_number(parts, name);
  };
  read("attention_norm", changed.attention_norm, hidden, hidden);
  read("post_attention_norm", changed.post_attention_norm, hidden, hidden);
  read("mlp_norm", changed.mlp_norm, hidden, hidden);
  read("post_mlp_norm", changed.post_mlp_norm, hidden, hidden);
  read("query_norm", changed.query_norm, dims, heads);
  read("key_norm", changed.key_norm, dims, kv_heads);
  read("qkv_bias", changed.biases[kQkv], heads + 2 * kv_heads, heads + 2 * kv_heads);
  read("output_bias", changed.biases[kOutput], hidden, hidden);
  const size_t inner = 2 * static_cast<size_t>(model_.shape.intermediate_size);
  read("gate_up_bias", changed.biases[kGateUp], inner, inner);
  read("down_bias", changed.biases[kDown], hidden, hidden);
  read_whole("window", changed.window);
  read_whole("rope", changed.rope);
  if (changed.window < 0) throw std::invalid_argument("a negative window");
  if (changed.rope < -1 || changed.rope >= static_cast<int>(model_.rotary.size()))
    throw std::invalid_argument("there is no such rotary table");
  if (!unknown.empty()) throw std::invalid_argument("an unknown part of a layer: " + *unknown.begin());
  layer_at(layer) = std::move(changed);
}

void Engine::set_weights(int layer, int projection, const std::vector<Matrix16>& matrices) {
  Turn turn(*this);
  std::vector<SourceMatrix> sources;
  const PackedMatrix& packed = projection_at(layer, projection, kBackbone);
  if (packed.bits != 16) throw std::invalid_argument("the backbone takes codes");
  for (const Matrix16& matrix : matrices) {
    if (matrix.shape(1) != columns(projection)) throw std::invalid_argument("a matrix has the wrong width");
    sources.push_back({static_cast<int>(matrix.shape(0)), matrix.data(), nullptr, nullptr, nullptr});
  }
  nb::gil_scoped_release release;
  model_.set_projection(layer, static_cast<Projection>(projection), kBackbone, sources, *team_);
}

void Engine::set_codes(int layer, int projection, int side, const std::vector<Codes>& matrices) {
  Turn turn(*this);
  if (side != kBackbone && side != kRiver) throw std::invalid_argument("no such side");
  const PackedMatrix& packed = projection_at(layer, projection, static_cast<Side>(side));
  std::vector<SourceMatrix> sources;
  for (const Codes& codes : matrices)
    sources.push_back(read_codes(codes, columns(projection), packed.bits, packed.group_size));
  nb::gil_scoped_release release;
  model_.set_projection(layer, static_cast<Projection>(projection), static_cast<Side>(side),
                        sources, *team_);
}

void Engine::set_head_weights(const Matrix16& matrix) {
  Turn turn(*this);
  if (model_.head.bits != 16) throw std::invalid_argument("the LM head takes codes");
  if (matrix.shape(1) != hidden_size()) throw std::invalid_argument("the LM head has the wrong width");
  nb::gil_scoped_release release;
  model_.set_head({static_cast<int>(matrix.shape(0)), matrix.data(), nullptr, nullptr, nullptr}, *team_);
}

void Engine::set_head_codes(const Codes& codes) {
  Turn turn(*this);
  const SourceMatrix source =
      read_codes(codes, hidden_size(), model_.head.bits, model_.head.group_size);
  nb::gil_scoped_release release;
  model_.set_head(source, *team_);
}

void Engine::set_draft_head(const Codes& codes, int bits, int group_size) {
  Turn turn(*this);
  const SourceMatrix source = read_codes(codes, hidden_size(), bits, group_size);
  nb::gil_scoped_release release;
  model_.set_draft_head(source, {bits, group_size}, *team_);
}

nb::object Engine::head_rows(int first, int count) {
  Turn turn(*this);
  if (model_.head.bits != 16) throw std::invalid_argument("the LM head is in codes");
  if (first < 0 || count < 0 || first > model_.head.rows - count)
    throw std::invalid_argument("the LM head has no such rows");
  const size_t width = hidden_size();
  std::vector<uint16_t> rows(static_cast<size_t>(count) * width);
  std::vector<float> row(width);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    unpack_row(model_.head, first + static_cast<int>(i), row.data());
    std::transform(row.begin(), row.end(), rows.begin() + static_cast<std::ptrdiff_t>(i * width),
                   to_bf16);
  }
  return numpy_array(std::move(rows), {static_cast<size_t>(count), width});
}

void Engine::set_final_norm(const FloatVector& weight) {
  Turn turn(*this);
  if (weight.size() != hidden_size()) throw std::invalid_argument("the final norm has the wrong size");
  model_.final_norm = to_vector(weight);
}

void Engine::set_embedding(const Matrix16& rows) {
  Turn turn(*this);
  if (rows.shape(0) != static_cast<size_t>(model_.shape.vocab_size) || rows.shape(1) != hidden_size())
    throw std::invalid_argument("the embedding has the wrong shape");
  embedding_ = rows;
  model_.embedding = rows.data();
}

void Engine::set_rotary(int table, int first, const FloatMatrix& cosines, const FloatMatrix& sines) {
  Turn turn(*this);
  const size_t half = static_cast<size_t>(model_.shape.rotary_dim) / 2;
  if (table < 0 || table >= static_cast<int>(model_.rotary.size()) || cosines.shape(1) != half ||
      sines.shape(1) != half || cosines.shape(0) != sines.shape(0))
    throw std::invalid_argument("rotary angles of the wrong shape");
  RotaryTable& angles = model_.rotary[static_cast<size_t>(table)];
  const size_t start = static_cast<size_t>(first) * half;
  if (first < 0 || start > angles.cosines.size()) throw std::invalid_argument("rotary angles leave a gap");
  angles.cosines.resize(start);
  angles.sines.resize(start);
  angles.cosines.insert(angles.cosines.end(), cosines.data(), cosines.data() + cosines.size());
  angles.sines.insert(angles.sines.end(), sines.data(), sines.data() + sines.size());
}

void Engine::set_query_scales(const FloatVector& scales) {
  Turn turn(*this);
  model_.query_scales = to_vector(scales);
}

nb::tuple Engine::forward(std::vector<int> tokens, std::vector<int> sequences,
                          std::vector<float> thresholds, std::vector<int> logit_rows,
                          std::vector<int> mean_groups, std::vector<int> minimum_groups,
                          bool record_similarities, bool draft_head, int head_tokens,
                          int depth_limit) {
  Turn turn(*this);
  check_complete();
  Pass pass;
  pass.tokens = std::move(tokens);
  pass.sequences = std::move(sequences);
  pass.thresholds = std::move(thresholds);
  pass.logit_rows = std::move(logit_rows);
  pass.mean_groups = std::move(mean_groups);
  pass.minimum_groups = std::move(minimum_groups);
  pass.record_similarities = record_similarities;
  pass.draft_head = draft_head;
  pass.head_tokens = head_tokens;
  pass.depth_limit = depth_limit;
  logit_count_ = 0;
  logits_.swap(pass.logits);  // use the memory of the last pass again
  {
    nb::gil_scoped_release release;
    decoder_.forward(pass);
  }
  logits_.swap(pass.logits);
  logit_stride_ = pass.logit_stride;
  logit_count_ = pass.logit_rows.size();
  logit_tokens_ = static_cast<size_t>(head_tokens > 0 ? head_tokens : model_.shape.vocab_size);
  const size_t rows = pass.tokens.size(), layers = static_cast<size_t>(model_.shape.num_layers);
  nb::object similarities = nb::none();
  if (record_similarities) similarities = numpy_array(std::move(pass.similarities), {layers, rows});
  return nb::make_tuple(whole_numbers(pass.best_tokens), whole_numbers(pass.exit_layers),
                        similarities, pass.held_back);
}

nb::tuple Engine::draft(std::vector<int> sequences, std::vector<int> tokens, std::vector<int> most,
                        std::vector<float> thresholds, std::vector<float> chances,
                        std::vector<float> least_chances, std::vector<int> stop_tokens,
                        bool draft_head, int head_tokens) {
  Turn turn(*this);
  check_complete();
  Drafts drafts;
  drafts.sequences = std::move(sequences);
  drafts.tokens = std::move(tokens);
  drafts.most = std::move(most);
  drafts.thresholds = std::move(thresholds);
  drafts.chances = std::move(chances);
  drafts.least_chances = std::move(least_chances);
  drafts.stop_tokens = std::move(stop_tokens);
  drafts.draft_head = draft_head;
  drafts.head_tokens = head_tokens;
  {
    nb::gil_scoped_release release;
    decoder_.draft(drafts);
  }
  return nb::make_tuple(drafts.drafted, drafts.margins);
}

nb::object Engine::logits() {
  Turn turn(*this);
  std::vector<float> copy(logit_count_ * logit_tokens_);
  for (size_t i = 0; i < logit_count_; ++i)
    std::copy_n(logits_.data() + i * logit_stride_, logit_tokens_, copy.data() + i * logit_tokens_);
  return numpy_array(std::move(copy), {logit_count_, logit_tokens_});
}

nb::list Engine::packed_weights(nb::handle self) {
  Turn turn(*this);
  nb::list parts;
  const auto append = [&](Model::Part part) {
    if (part.data == nullptr)
      parts.append(nb::none());
    else
      parts.append(nb::cast(nb::ndarray<nb::numpy, uint8_t>(part.data, {part.bytes}, self)));
  };
  for (int l = 0; l < model_.shape.num_layers; ++l) append(model_.packed_layer(l));
  append(model_.packed_rest());
  return parts;
}

void Engine::open_weights(const std::string& path) {
  Turn turn(*this);
  decoder_.residency.open(path);
}

void Engine::keep_layers(int layers) {
  Turn turn(*this);
  nb::gil_scoped_release release;
  decoder_.residency.keep(layers);
}

nb::object Engine::stored_weights(size_t begin, size_t end) {
  Turn turn(*this);
  if (begin > end || end > model_.packed_bytes()) throw std::invalid_argument("there are no such weights");
  std::vector<uint8_t> bytes(end - begin);
  decoder_.residency.copy(begin, end, bytes.data());
  return numpy_array(std::move(bytes), {end - begin});
}

nb::tuple Engine::offload_counts() const {
  const Residency& residency = decoder_.residency;
  return nb::make_tuple(residency.misses(), residency.bytes_read(),
                        std::chrono::duration<double>(residency.waited()).count());
}

void Engine::resize(int sequences) {
  Turn turn(*this);
  if (sequences < 0) throw std::invalid_argument("a negative number of sequences");
  decoder_.cache.resize(sequences);
}

void Engine::keep_sequences(const std::vector<int>& sequences) {
  Turn turn(*this);
  for (const int sequence : sequences) check_sequence(sequence);
  if (std::adjacent_find(sequences.begin(), sequences.end(), std::greater_equal()) != sequences.end())
    throw std::invalid_argument("the sequences don't ascend");
  decoder_.cache.keep(sequences);
}

void Engine::truncate(int sequence, int length) {
  Turn turn(*this);
  check_sequence(sequence);
  if (length < 0) throw std::invalid_argument("a negative length");
  decoder_.cache.truncate(sequence, length);
}

void Engine::lengthen(int sequence, int length) {
  Turn turn(*this);
  check_sequence(sequence);
  if (length < decoder_.cache.length(sequence)) throw std::invalid_argument("that is no longer");
  decoder_.cache.lengthen(sequence, length);
}

int Engine::length(int sequence) const {
  check_sequence(sequence);
  return decoder_.cache.length(sequence);
}

nb::object Engine::read_cache(int sequence) {
  Turn turn(*this);
  check_sequence(sequence);
  const Shape& s = model_.shape;
  const auto length = static_cast<size_t>(decoder_.cache.length(sequence));
  const auto layers = static_cast<size_t>(s.num_layers), heads = static_cast<size_t>(s.num_kv_heads),
             dims = static_cast<size_t>(s.head_dim);
  const size_t half = layers * heads * length * dims;
  std::vector<uint16_t> out(2 * half);
  for (size_t l = 0; l < layers; ++l)
    for (size_t h = 0; h < heads; ++h)
      for (size_t p = 0; p < length; ++p) {
        uint16_t* key = out.data() + ((l * heads + h) * length + p) * dims;
        decoder_.cache.read(sequence, static_cast<int>(p), static_cast<int>(l), static_cast<int>(h),
                            key, key + half);
      }
  return numpy_array(std::move(out), {2, layers, heads, length, dims});
}

nb::list Engine::read_pages(int sequence, int length, nb::handle self) {
  Turn turn(*this);
  check_sequence(sequence);
  const KvCache& cache = decoder_.cache;
  if (length < 0 || length > cache.length(sequence))
    throw std::invalid_argument("the sequence has no such positions");
  const size_t bytes = cache.page_bytes();
  nb::list pages;
  for (int page = 0; page < length / kPagePositions; ++page)
    pages.append(
        nb::cast(nb::ndarray<nb::numpy, uint8_t>(cache.page(sequence, page), {bytes}, self)));
  if (length % kPagePositions > 0) {
    std::vector<uint8_t> last(bytes);
    cache.copy_page(sequence, length / kPagePositions, length, last.data());
    pages.append(numpy_array(std::move(last), {bytes}));
  }
  return pages;
}

void Engine::write_pages(int sequence, const std::vector<Bytes>& pages, int length) {
  Turn turn(*this);
  check_sequence(sequence);
  if (length < 0 || pages.size() != (static_cast<size_t>(length) + kPagePositions - 1) / kPagePositions)
    throw std::invalid_argument("so many positions don't stand in so many pages");
  std::vector<const uint8_t*> places;
  for (const Bytes& page : pages) {
    if (page.size() != decoder_.cache.page_bytes())
      throw std::invalid_argument("a page has the wrong size");
    places.push_back(page.data());
  }
  nb::gil_scoped_release release;
  decoder_.cache.restore(sequence, places, length);
}

size_t Engine::layer_bytes(int layer, int side) {
  layer_at(layer);
  return model_.layer_bytes(layer, side == kRiver ? kRiver : kBackbone);
}

Layer& Engine::layer_at(int layer) {
  if (layer < 0 || layer >= model_.shape.num_layers) throw std::invalid_argument("there is no such layer");
  return model_.layers[static_cast<size_t>(layer)];
}

const PackedMatrix& Engine::projection_at(int layer, int projection, Side side) {
  if (projection < 0 || projection > kDown) throw std::invalid_argument("there is no such projection");
  return layer_at(layer).projections[projection][side];
}

size_t Engine::columns(int projection) const {
  const Shape& s = model_.shape;
  return static_cast<size_t>(projection == kOutput ? s.num_heads * s.head_dim
                             : projection == kDown ? s.intermediate_size
                                                   : s.hidden_size);
}

// What Python sets after the constructor.
void Engine::check_complete() const {
  for (const Layer& layer : model_.layers)
    if (layer.rope >= 0 && model_.rotary.empty()) throw std::invalid_argument("no rotary table is set");
  if (model_.embedding == nullptr && !(model_.shape.tied_head && model_.head.bits == 16))
    throw std::invalid_argument("no embedding is set");
}

void Engine::check_sequence(int sequence) const {
  if (sequence < 0 || sequence >= decoder_.cache.sequences())
    throw std::invalid_argument("there is no such sequence");
}

}  // namespace river
