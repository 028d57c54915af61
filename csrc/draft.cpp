// Drafts: step after step through the layers that draft, and then as if nothing had been.
#include "decoder.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "require.h"

namespace river {
namespace {

// Cuts the drafting sequences back to the lengths that they had.
class Undo {
 public:
  Undo(KvCache& cache, const std::vector<int>& sequences) : cache_(cache) {
    for (const int s : sequences)
      if (cache.has(s)) lengths_.emplace_back(s, cache.length(s));
  }
  ~Undo() {
    for (const auto& [sequence, length] : lengths_) cache_.truncate(sequence, length);
  }

 private:
  KvCache& cache_;
  std::vector<std::pair<int, int>> lengths_;
};

}  // namespace

void Decoder::draft(Drafts& drafts) {
  const size_t count = drafts.sequences.size();
  const int layers = model_.shape.num_layers;
  require(drafts.tokens.size() == count && drafts.most.size() == count,
          "give a token and a length for each sequence");
  require(drafts.exit_layer >= 0 && drafts.exit_layer <= layers, "there is no such exit layer");
  for (const int most : drafts.most) require(most > 0, "a draft has a token or more");
  drafts.drafted.assign(count, {});
  drafts.margins.assign(count, {});
  const Undo undo(cache, drafts.sequences);
  std::vector<size_t> going;
  for (size_t i = 0; i < count; ++i) going.push_back(i);
  Pass& pass = draft_pass_;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  pass.thresholds.assign(static_cast<size_t>(layers), kInfinity);
  std::fill(pass.thresholds.begin() + drafts.exit_layer, pass.thresholds.end(), -kInfinity);
  pass.draft_head = drafts.draft_head;
  pass.rank_second = true;
  const auto is_over = [&](size_t i) {
    const std::vector<int>& drafted = drafts.drafted[i];
    const auto& stops = drafts.stop_tokens;
    return drafted.size() >= static_cast<size_t>(drafts.most[i]) ||
           !(drafts.margins[i].back() >= drafts.least_margin) ||
           std::find(stops.begin(), stops.end(), drafted.back()) != stops.end();
  };
  while (!going.empty()) {
    pass.tokens.clear();
    pass.sequences.clear();
    pass.logit_rows.clear();
    for (const size_t i : going) {
      pass.logit_rows.push_back(static_cast<int>(pass.tokens.size()));
      pass.tokens.push_back(drafts.drafted[i].empty() ? drafts.tokens[i] : drafts.drafted[i].back());
      pass.sequences.push_back(drafts.sequences[i]);
    }
    forward(pass);
    for (size_t row = 0; row < going.size(); ++row) {
      const size_t i = going[row];
      drafts.drafted[i].push_back(std::max(pass.best_tokens[row], 0));  // any guess is one
      drafts.margins[i].push_back(pass.margins[row]);
    }
    std::erase_if(going, is_over);
  }
}

}  // namespace river
