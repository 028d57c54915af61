// Drafts: step after step through the layers that draft, and then as if nothing had been.
#include "decoder.h"

#include <algorithm>
#include <stdexcept>

namespace river {
namespace {

// Cuts the sequences back to the lengths that they had.
class Undo {
 public:
  explicit Undo(KvCache& cache) : cache_(cache) {
    for (int s = 0; s < cache.sequences(); ++s) lengths_.push_back(cache.length(s));
  }
  ~Undo() {
    for (int s = 0; s < cache_.sequences(); ++s)
      if (cache_.length(s) > lengths_[static_cast<size_t>(s)])
        cache_.truncate(s, lengths_[static_cast<size_t>(s)]);
  }

 private:
  KvCache& cache_;
  std::vector<int> lengths_;
};

float chance(const std::vector<float>& chances, float margin) {
  const auto parts = static_cast<float>(chances.size());
  const float part = std::clamp(margin * parts, 0.0f, parts - 1);  // NaN stays NaN
  return chances[part >= 0 ? static_cast<size_t>(part) : 0];
}

}  // namespace

void Decoder::draft(Drafts& drafts) {
  const size_t count = drafts.sequences.size();
  if (drafts.tokens.size() != count || drafts.most.size() != count)
    throw std::invalid_argument("give a token and a length for each sequence");
  if (drafts.chances.empty() || drafts.least_chances.empty())
    throw std::invalid_argument("there are no chances");
  for (const int most : drafts.most)
    if (most < 1) throw std::invalid_argument("a draft has a token or more");
  drafts.drafted.assign(count, {});
  drafts.margins.assign(count, {});
  const Undo undo(cache);
  std::vector<float> product(count, 1.0f);
  std::vector<size_t> going;
  for (size_t i = 0; i < count; ++i) going.push_back(i);
  Pass& pass = draft_pass_;
  pass.thresholds = drafts.thresholds;
  pass.draft_head = drafts.draft_head;
  pass.head_tokens = drafts.head_tokens;
  pass.rank_second = true;
  const auto ends_answer = [&](int token) {
    return std::find(drafts.stop_tokens.begin(), drafts.stop_tokens.end(), token) !=
           drafts.stop_tokens.end();
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
      product[i] *= chance(drafts.chances, pass.margins[row]);
    }
    const float least =
        drafts.least_chances[std::min(going.size(), drafts.least_chances.size()) - 1];
    std::erase_if(going, [&](size_t i) {
      return drafts.drafted[i].size() >= static_cast<size_t>(drafts.most[i]) ||
             product[i] < least || ends_answer(drafts.drafted[i].back());
    });
  }
}

}  // namespace river
