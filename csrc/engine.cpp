#include "engine.h"

#include <algorithm>
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

void check(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
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
          whole("rope_kinds"), whole("rope_boundary"), real("norm_epsilon"), real("attention_scale"),
          real("embedding_scale"), real("logit_cap"), flag("gelu"), flag("tied_head")};
}

SourceMatrix read_codes(const Codes& given, int columns, int bits, int group_size) {
  const auto& [codes, scales, zeros] = given;
  check(bits < 16 && group_size > 0, "codes have 8, 6 or 4 bits, in groups of one or more");
  const size_t rows = codes.shape(0), groups = static_cast<size_t>(columns / group_size);
  check(codes.shape(1) == static_cast<size_t>(columns) * static_cast<size_t>(bits) / 8 &&
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
    check(nb::try_cast(given, codes, false), "these weights are codes, scales and zeros");
    return read_codes(codes, columns, packed.bits, packed.group_size);
  }
  check(nb::try_cast(given, weights, false) && weights.shape(1) == static_cast<size_t>(columns),
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
    check(nb::try_cast(part, values, false) && (fits(size) || fits(or_size)),
          std::string(name) + " is no float32 vector of the right size without gaps");
    out = to_vector(values);
  }
  void take(const char* name, int& out) {
    if (left_.erase(name) > 0) out = whole_number(parts_, name);
  }
  void check_all_taken() const { check(left_.empty(), "an unknown part: " + (left_.empty() ? "" : *left_.begin())); }

 private:
  const nb::dict& parts_;
  std::set<std::string> left_;
};

}  // namespace

// Keeps a second thread out, and a forked child, whose copy of the engine has no threads.
class Engine::Lock {
 public:
  explicit Lock(Engine& engine) : engine_(engine) {
    if (engine.process_ != process_id())
      throw std::runtime_error(
          "this engine belongs to the process that made it; make another one after a fork");
    if (engine.busy_.exchange(true))
      throw std::runtime_error("another thread is using this engine; give each thread its own");
  }
  ~Lock() { engine_.busy_ = false; }

 private:
  Engine& engine_;
};

Engine::Engine(const nb::dict& shape, std::pair<int, int> backbone, std::pair<int, int> river,
               std::pair<int, int> head, int threads, const std::string& kernels, int resident_layers,
               int kv_bits)
    : kernels_(choose_kernels(kernels)),
      pool_(std::make_unique<ThreadPool>(checked_threads(threads))),
      model_(read_shape(shape), {backbone.first, backbone.second}, {river.first, river.second},
             {head.first, head.second}, resident_layers),
      decoder_(model_, resident_layers, kernels_, *pool_, kv_bits),
      process_(process_id()) {}

// A forked child has no threads to end.
Engine::~Engine() {
  if (process_ != process_id()) static_cast<void>(pool_.release());
}

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
  check(changed.window >= 0, "a negative window");
  check(changed.rope >= -1 && changed.rope < s.rope_kinds, "there are no such rotary angles");

  std::vector<std::vector<nb::object>> matrices[2];  // [Side][Projection]
  std::vector<SourceMatrix> sources[2][4];
  for (const Side side : {kBackbone, kRiver}) {
    nb::object part;
    if (!parts.take(side == kBackbone ? "backbone" : "river", part)) continue;
    check(nb::try_cast(part, matrices[side], false) && matrices[side].size() == 4,
          "a side of a layer is a list of matrices for each of four projections");
    for (size_t p = 0; p < 4; ++p)
      for (const nb::object& matrix : matrices[side][p])
        sources[side][p].push_back(
            read_matrix(matrix, columns(static_cast<int>(p)), layer.projections[p][side]));
  }
  parts.check_all_taken();
  {
    nb::gil_scoped_release release;
    for (const Side side : {kBackbone, kRiver})
      for (int p = 0; p < 4 && !matrices[side].empty(); ++p)
        model_.set_projection(index, static_cast<Projection>(p), side, sources[side][p], *pool_);
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
    check(nb::try_cast(embedding, rows, false) && rows.shape(0) == static_cast<size_t>(s.vocab_size) &&
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
  check(first >= 0 && angles.size() == model_.rotary.size(), "give the angles of each rotary table");
  const auto replace = [](std::vector<float>& values, size_t start, const float* given, size_t count) {
    check(start <= values.size(), "positions leave a gap");
    values.resize(start);
    values.insert(values.end(), given, given + count);
  };
  for (size_t table = 0; table < angles.size(); ++table) {
    const auto& [cosines, sines] = angles[table];
    check(cosines.shape(1) == half && sines.shape(1) == half && cosines.shape(0) == sines.shape(0),
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
  check(model_.head.bits == 16, "the LM head is in codes");
  check(first >= 0 && count >= 0 && first <= model_.head.rows - count, "the LM head has no such rows");
  const auto width = static_cast<size_t>(model_.shape.hidden_size);
  std::vector<uint16_t> rows(static_cast<size_t>(count) * width);
  std::vector<float> row(width);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    unpack_row(model_.head, first + static_cast<int>(i), model_.shape.hidden_size, row.data());
    std::transform(row.begin(), row.end(), rows.begin() + static_cast<ptrdiff_t>(i * width), to_bf16);
  }
  return numpy_array(std::move(rows), {static_cast<size_t>(count), width});
}

nb::tuple Engine::forward(std::vector<int> tokens, std::vector<int> sequences,
                          const Floats& thresholds, std::vector<int> logit_rows,
                          std::vector<int> mean_groups, std::vector<int> minimum_groups,
                          bool record_similarities, bool draft_head, int head_tokens,
                          int depth_limit) {
  const Lock lock(*this);
  check_complete();
  const size_t rows = tokens.size(), layers = static_cast<size_t>(model_.shape.num_layers);
  check(thresholds.ndim() == 1 || (thresholds.ndim() == 2 && thresholds.shape(0) == rows),
        "thresholds are [layers] or [rows, layers]");
  check(thresholds.shape(thresholds.ndim() - 1) == layers, "give one threshold for each layer");
  ++passes_;  // a pass that is refused takes the last one's logits with it, too
  pass_.tokens = std::move(tokens);
  pass_.sequences = std::move(sequences);
  pass_.thresholds.assign(thresholds.data(), thresholds.data() + thresholds.size());
  pass_.logit_rows = std::move(logit_rows);
  pass_.mean_groups = std::move(mean_groups);
  pass_.minimum_groups = std::move(minimum_groups);
  pass_.record_similarities = record_similarities;
  pass_.draft_head = draft_head;
  pass_.head_tokens = head_tokens;
  pass_.depth_limit = depth_limit;
  {
    nb::gil_scoped_release release;
    decoder_.forward(pass_);
  }
  if (PyErr_CheckSignals() != 0) {
    decoder_.undo(pass_);
    throw nb::python_error();
  }
  depth_capped_ += pass_.depth_capped;
  nb::object similarities = nb::none();
  if (record_similarities) similarities = numpy_array(std::move(pass_.similarities), {layers, rows});
  return nb::make_tuple(whole_numbers(pass_.best_tokens), whole_numbers(pass_.exit_layers),
                        similarities, passes_);
}

nb::object Engine::logits(int64_t pass) {
  const Lock lock(*this);
  if (pass != passes_)
    throw std::runtime_error("these logits are gone; look at them before the engine's next pass");
  const size_t rows = pass_.logit_rows.size();
  const auto tokens =
      static_cast<size_t>(pass_.head_tokens > 0 ? pass_.head_tokens : model_.shape.vocab_size);
  std::vector<float> copy(rows * tokens);
  for (size_t i = 0; i < rows; ++i)
    std::copy_n(pass_.logits.data() + i * pass_.logit_stride, tokens, copy.data() + i * tokens);
  return numpy_array(std::move(copy), {rows, tokens});
}

nb::tuple Engine::draft(std::vector<int> sequences, std::vector<int> tokens, std::vector<int> most,
                        int exit_layer, float least_margin, std::vector<int> stop_tokens,
                        bool draft_head, int head_tokens) {
  const Lock lock(*this);
  check_complete();
  Drafts drafts;
  drafts.sequences = std::move(sequences);
  drafts.tokens = std::move(tokens);
  drafts.most = std::move(most);
  drafts.exit_layer = exit_layer;
  drafts.least_margin = least_margin;
  drafts.stop_tokens = std::move(stop_tokens);
  drafts.draft_head = draft_head;
  drafts.head_tokens = head_tokens;
  {
    nb::gil_scoped_release release;
    decoder_.draft(drafts);
  }
  return nb::make_tuple(drafts.drafted, drafts.margins);
}

int Engine::add_sequence(int prompt_length) {
  const Lock lock(*this);
  return decoder_.cache.add(prompt_length);
}

void Engine::drop_sequence(int sequence) {
  const Lock lock(*this);
  check_sequence(sequence);
  decoder_.cache.drop(sequence);
}

void Engine::truncate(int sequence, int length) {
  const Lock lock(*this);
  check_sequence(sequence);
  check(length >= 0, "a negative length");
  decoder_.cache.truncate(sequence, length);
}

int Engine::length(int sequence) const {
  check_sequence(sequence);
  return decoder_.cache.length(sequence);
}

std::vector<int> Engine::sequences() const {
  std::vector<int> numbers;
  for (int s = 0; s < cache().limit(); ++s)
    if (cache().has(s)) numbers.push_back(s);
  return numbers;
}

int Engine::longest_after(const std::vector<int>& sequences) {
  const Lock lock(*this);
  std::vector<int> lengths(static_cast<size_t>(cache().limit()));
  int longest = 0;
  for (const int s : sequences) {
    check_sequence(s);
    longest = std::max(longest, cache().length(s) + ++lengths[static_cast<size_t>(s)]);
  }
  return longest;
}

void Engine::lengthen(int sequence, int length) {
  const Lock lock(*this);
  check_sequence(sequence);
  check(length >= decoder_.cache.length(sequence), "that is no longer");
  decoder_.cache.lengthen(sequence, length);
}

nb::list Engine::read_pages(int sequence, int length) {
  const Lock lock(*this);
  check_sequence(sequence);
  check(length >= 0 && length <= cache().length(sequence), "the sequence has no such positions");
  const size_t bytes = cache().page_bytes();
  nb::list pages;
  for (int page = 0; page < length / kPagePositions; ++page)
    pages.append(bytes_of(cache().page(sequence, page), bytes));
  if (length % kPagePositions > 0) {
    std::vector<uint8_t> last(bytes);
    cache().copy_page(sequence, length / kPagePositions, length, last.data());
    pages.append(numpy_array(std::move(last), {bytes}));
  }
  return pages;
}

void Engine::write_pages(int sequence, const std::vector<Bytes>& pages, int length) {
  const Lock lock(*this);
  check_sequence(sequence);
  check(length >= 0 && pages.size() == (static_cast<size_t>(length) + kPagePositions - 1) / kPagePositions,
        "so many positions don't stand in so many pages");
  std::vector<const uint8_t*> places;
  for (const Bytes& page : pages) {
    check(page.size() == cache().page_bytes(), "a page has the wrong size");
    places.push_back(page.data());
  }
  nb::gil_scoped_release release;
  decoder_.cache.restore(sequence, places, length);
}

nb::list Engine::packed_weights() {
  const Lock lock(*this);
  nb::list parts;
  for (int l = 0; l <= model_.shape.num_layers; ++l) {
    const Model::Part part = l < model_.shape.num_layers ? model_.packed_layer(l) : model_.packed_rest();
    parts.append(part.data == nullptr ? nb::object(nb::none()) : bytes_of(part.data, part.bytes));
  }
  return parts;
}

size_t Engine::layer_bytes(int layer, int side) const {
  check_layer(layer);
  return model_.layer_bytes(layer, side == kRiver ? kRiver : kBackbone);
}

void Engine::open_weights(const std::string& path) {
  const Lock lock(*this);
  decoder_.residency.open(path);
}

void Engine::keep_layers(int layers) {
  const Lock lock(*this);
  nb::gil_scoped_release release;
  decoder_.residency.keep(layers);
}

nb::object Engine::stored_weights(size_t begin, size_t end) {
  const Lock lock(*this);
  check(begin <= end && end <= model_.packed_bytes(), "there are no such weights");
  std::vector<uint8_t> bytes(end - begin);
  decoder_.residency.copy(begin, end, bytes.data());
  return numpy_array(std::move(bytes), {end - begin});
}

nb::tuple Engine::offload_counts() const {
  const Residency& residency = decoder_.residency;
  return nb::make_tuple(residency.misses(), residency.bytes_read(),
                        std::chrono::duration<double>(residency.waited()).count(), depth_capped_);
}

nb::object Engine::bytes_of(uint8_t* data, size_t count) {
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(data, {count}, nb::find(*this)));
}

int Engine::columns(int projection) const {
  const Shape& s = model_.shape;
  return projection == kOutput ? s.num_heads * s.head_dim
         : projection == kDown ? s.intermediate_size
                               : s.hidden_size;
}

void Engine::check_layer(int layer) const {
  check(layer >= 0 && layer < model_.shape.num_layers, "there is no such layer");
}

void Engine::check_sequence(int sequence) const {
  check(cache().has(sequence), "there is no such sequence");
}

// What Python loads after the constructor.
void Engine::check_complete() const {
  for (const Layer& layer : model_.layers)
    check(layer.rope < model_.shape.rope_kinds, "a layer has no rotary angles");
  check(model_.embedding != nullptr || (model_.shape.tied_head && model_.head.bits == 16),
        "no embedding is loaded");
}

}  // namespace river
