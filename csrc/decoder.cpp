#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "pass_run.h"
#include "require.h"

namespace river {
namespace {

constexpr size_t kSmallRows = 16;  // so few rows wait for memory, and a busy core matters most

}  // namespace

Decoder::Decoder(Model& model, int resident, const KernelSet& kernels, ThreadPool& pool, int kv_bits)
    : cache(model.shape.num_layers, model.shape.num_kv_heads, model.shape.head_dim, kv_bits),
      residency(model, resident),
      model_(model),
      kernels_(kernels),
      pool_(pool),
      adaptive_threads_(pool.size()),
      buffers_(std::make_unique<Buffers>()) {
  buffers_->panels = std::make_unique<WorkStealing>(pool.size());
}

Decoder::~Decoder() = default;

void Decoder::forward(Pass& pass) {
  const bool is_small = pass.tokens.size() <= kSmallRows;
  const int threads = is_small ? adaptive_threads_.threads() : pool_.size();
  Run run(*this, pass, threads);
  try {
    residency.begin();
    run.prepare();
    const auto start = std::chrono::steady_clock::now();
    pool_.run(threads, run);
    if (is_small) adaptive_threads_.passed(std::chrono::steady_clock::now() - start, pool_.stalled());
    residency.end();
  } catch (...) {
    for (const int s : pass.sequences)  // pages that it reserved
      if (cache.has(s)) cache.truncate(s, cache.length(s));
    throw;
  }
  run.commit();
}

void Decoder::undo(const Pass& pass) {
  for (const int s : pass.sequences) cache.truncate(s, cache.length(s) - 1);
}

void Decoder::Run::prepare() {
  const size_t rows = pass_.tokens.size();
  require(rows > 0, "a pass has no rows");
  require(pass_.sequences.size() == rows, "tokens and sequences differ in number");
  require(pass_.thresholds.size() == size(shape_.num_layers) || own_thresholds_,
        "give one threshold for each layer, or for each row and layer");
  require(pass_.mean_groups.empty() || pass_.mean_groups.size() == rows, "one mean group for each row");
  require(pass_.minimum_groups.empty() || pass_.minimum_groups.size() == rows,
        "one minimum group for each row");
  for (const auto* groups : {&pass_.mean_groups, &pass_.minimum_groups})
    for (const int group : *groups) require(group >= 0 && group < rows_, "a group is out of range");
  require(head_.rows > 0, "there is no LM head for drafts");
  require(pass_.logit_rows.size() <= rows, "there are more rows of logits than rows");
  for (const int row : pass_.logit_rows) require(row >= 0 && row < rows_, "no such row for logits");

  std::vector<int> lengths(size(cache_.limit()));
  for (int s = 0; s < cache_.limit(); ++s) lengths[size(s)] = cache_.length(s);
  buffers_.positions.resize(rows);
  buffers_.long_angles.resize(rows);
  int longest = 0;
  for (size_t row = 0; row < rows; ++row) {
    const int sequence = pass_.sequences[row], token = pass_.tokens[row];
    require(cache_.has(sequence), "there is no such sequence");
    require(token >= 0 && token < shape_.vocab_size, "there is no such token");
    const int position = lengths[size(sequence)]++;
    const bool is_long = model_.is_long(std::max(position + 1, cache_.prompt_length(sequence)));
    require(position < model_.positions(is_long), "the rotary table is too short");
    buffers_.positions[row] = position;
    buffers_.long_angles[row] = is_long;
    one_row_each_ = one_row_each_ && position == cache_.length(sequence);
    longest = std::max(longest, position + 1);
  }
  require(model_.query_scales.empty() || size(longest) <= model_.query_scales.size(),
        "there are too few query scales");
  for (const int sequence : pass_.sequences) cache_.reserve(sequence, lengths[size(sequence)]);

  const size_t chunk = std::min<size_t>(rows, kChunkRows);
  const size_t hidden_size = size(shape_.hidden_size), dims = size(shape_.head_dim);
  const size_t heads = size(shape_.num_heads), kv_heads = size(shape_.num_kv_heads);
  size_t input[2] = {input_bytes(head_), 0};
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
    own.loops = 0;
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
    own.query.fit(size(queries_per_kv_) * query_bytes());
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
  buffers_.queries.fit(chunk * heads * query_bytes());
  buffers_.attended.fit(chunk * heads * dims);
  buffers_.projected.fit(chunk * hidden_size);
  buffers_.inner.fit(chunk * size(shape_.intermediate_size));
  const size_t pages = size(longest) / kPagePositions + 1;
  const size_t few_rows = std::min<size_t>(rows, size(few_rows_limit()));
  buffers_.partials.fit(few_rows * heads * pages * (dims + 2));
  buffers_.similarity.assign(rows, 0.0f);

  pass_.best_tokens.assign(pass_.logit_rows.size(), 0);
  pass_.margins.assign(pass_.rank_second ? pass_.logit_rows.size() : 0, 0.0f);
  pass_.exit_layers.assign(rows, shape_.num_layers);
  pass_.depth_capped = 0;
  pass_.similarities.clear();
  if (pass_.record_similarities)
    pass_.similarities.assign(size(shape_.num_layers) * rows, std::nanf(""));
  pass_.logit_stride = size(head_.panels()) * kLanes;
  pass_.logits.resize(pass_.logit_rows.size() * pass_.logit_stride);
}

void Decoder::Run::operator()(int thread) {
  Private& own = buffers_.threads[size(thread)];
  own.in_backbone.assign(size(rows_), 1);
  if (private_) own.similarity.assign(size(rows_), 0.0f);
  embed(own, thread);
  decide(0, own, thread);
  for (int l = 0; l < shape_.num_layers; ++l) {
    if (!bring_layer(l, own, thread)) return;
    for (int first = 0; first < rows_; first += kChunkRows)
      run_layer(model_.layers[size(l)], l, chunk(first, own), own, thread);
    decide(l + 1, own, thread);
  }
  head(own, thread);
}

// Brings a layer's backbone weights into memory, where a row needs them; false where they can't be
// had.
bool Decoder::Run::bring_layer(int index, Private& own, int thread) {
  if (index < residency_.resident()) return true;
  if (std::find(own.in_backbone.begin(), own.in_backbone.end(), 1) == own.in_backbone.end())
    return true;
  const auto start = std::chrono::steady_clock::now();
  if (thread == 0) residency_.stage(index);
  pool_.barrier(thread);
  residency_.read(thread, threads_);
  pool_.barrier(thread);
  if (thread == 0) residency_.add_wait(std::chrono::steady_clock::now() - start);
  return !residency_.has_failed();
}

void Decoder::Run::embed(Private& own, int thread) {
  const Range range = rows_of(rows_, thread);
  for (int row = range.begin; row < range.end; ++row)
    model_.embed(pass_.tokens[size(row)], hidden(own, row));
  barrier_unless_private(thread);
}

void Decoder::Run::commit() {
  for (const int sequence : pass_.sequences)
    cache_.set_length(sequence, cache_.length(sequence) + 1);
  for (size_t i = 0; i < pass_.logit_rows.size(); ++i) {
    Best best;
    for (int t = 0; t < threads_; ++t) best.take(buffers_.threads[size(t)].best[i]);
    pass_.best_tokens[i] = std::isfinite(best.value) ? best.token : -1;
    if (pass_.rank_second) pass_.margins[i] = std::isfinite(best.value) ? margin(best) : NAN;
  }
}

}  // namespace river
