#include "engine.h"

#include <algorithm>
#include <stdexcept>

#include "require.h"

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
          whole("rope_kinds"), whole("rope_boundary"), real("norm_epsilon"), real("attention_scale"),
          real("embedding_scale"), real("logit_cap"), flag("gelu"), flag("tied_head")};
}

}  // namespace

Engine::Lock::Lock(Engine& engine) : engine_(engine) {
  if (engine.process_ != process_id())
    throw std::runtime_error(
        "this engine belongs to the process that made it; make another one after a fork");
  if (engine.busy_.exchange(true))
    throw std::runtime_error("another thread is using this engine; give each thread its own");
}

Engine::Engine(const nb::dict& shape, std::pair<int, int> backbone,
               const std::pair<std::vector<std::array<int, 4>>, int>& river, std::pair<int, int> head,
               int threads, const std::string& kernels, int resident_layers, int kv_bits)
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

nb::tuple Engine::forward(std::vector<int> tokens, std::vector<int> sequences,
                          const Floats& thresholds, std::vector<int> logit_rows,
                          std::vector<int> mean_groups, std::vector<int> minimum_groups,
                          bool record_similarities, bool record_margins, bool draft_head,
                          int depth_limit) {
  const Lock lock(*this);
  check_complete();
  const size_t rows = tokens.size(), layers = static_cast<size_t>(model_.shape.num_layers);
  require(thresholds.ndim() == 1 || (thresholds.ndim() == 2 && thresholds.shape(0) == rows),
        "thresholds are [layers] or [rows, layers]");
  require(thresholds.shape(thresholds.ndim() - 1) == layers, "give one threshold for each layer");
  logits_of_ = 0;  // a pass that is refused takes the last one's logits with it, too
  pass_.tokens = std::move(tokens);
  pass_.sequences = std::move(sequences);
  pass_.thresholds.assign(thresholds.data(), thresholds.data() + thresholds.size());
  pass_.logit_rows = std::move(logit_rows);
  pass_.mean_groups = std::move(mean_groups);
  pass_.minimum_groups = std::move(minimum_groups);
  pass_.record_similarities = record_similarities;
  pass_.rank_second = record_margins;
  pass_.draft_head = draft_head;
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
  logits_of_ = ++passes_;
  nb::object similarities = nb::none(), margins = nb::none();
  if (record_similarities) similarities = numpy_array(std::move(pass_.similarities), {layers, rows});
  if (record_margins) margins = numpy_array(std::move(pass_.margins), {pass_.logit_rows.size()});
  return nb::make_tuple(whole_numbers(pass_.best_tokens), whole_numbers(pass_.exit_layers),
                        similarities, margins, passes_);
}

nb::object Engine::logits(int64_t pass) {
  const Lock lock(*this);
  if (pass != logits_of_ || pass == 0)
    throw std::runtime_error("these logits are gone; look at them before the engine's next pass");
  const size_t rows = pass_.logit_rows.size(), tokens = static_cast<size_t>(model_.shape.vocab_size);
  std::vector<float> copy(rows * tokens);
  for (size_t i = 0; i < rows; ++i)
    std::copy_n(pass_.logits.data() + i * pass_.logit_stride, tokens, copy.data() + i * tokens);
  return numpy_array(std::move(copy), {rows, tokens});
}

nb::tuple Engine::draft(std::vector<int> sequences, std::vector<int> tokens, std::vector<int> most,
                        int exit_layer, float least_margin, std::vector<int> stop_tokens,
                        bool draft_head) {
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
  require(length >= 0, "a negative length");
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

nb::list Engine::read_pages(int sequence, int length) {
  const Lock lock(*this);
  check_sequence(sequence);
  require(length >= 0 && length <= cache().length(sequence), "the sequence has no such positions");
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
  require(length >= 0 && pages.size() == (static_cast<size_t>(length) + kPagePositions - 1) / kPagePositions,
        "so many positions don't stand in so many pages");
  std::vector<const uint8_t*> places;
  for (const Bytes& page : pages) {
    require(page.size() == cache().page_bytes(), "a page has the wrong size");
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
  require(begin <= end && end <= model_.packed_bytes(), "there are no such weights");
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

void Engine::check_layer(int layer) const {
  require(layer >= 0 && layer < model_.shape.num_layers, "there is no such layer");
}

void Engine::check_sequence(int sequence) const {
  require(cache().has(sequence), "there is no such sequence");
}

// What Python loads after the constructor.
void Engine::check_complete() const {
  for (const Layer& layer : model_.layers)
    require(layer.rope < model_.shape.rope_kinds, "a layer has no rotary angles");
  require(model_.embedding != nullptr || (model_.shape.tied_head && model_.head.bits == 16),
        "no embedding is loaded");
}

}  // namespace river
