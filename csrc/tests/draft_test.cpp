// Drafts: what single steps give, and nothing left of them.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "check.h"
#include "tiny_decoder.h"

namespace river::test {
namespace {

constexpr int kSequences = 3;
const std::vector<Kind> kKinds = {{}, {16, 16, true}, {8, 8, false}};

// Three sequences of different length.
void fill(Subject& subject) {
  subject.begin(kSequences);
  for (int s = 0; s < kSequences; ++s) {
    const std::vector<int> tokens = random_tokens(5 + 31 * s, 70 + static_cast<uint32_t>(s));
    subject.run(tokens, std::vector<int>(tokens.size(), s), never());
  }
}

Drafts drafts_of(std::vector<int> most) {
  Drafts drafts;
  drafts.sequences = {2, 0, 1};
  drafts.tokens = {7, 8, 9};
  drafts.most = std::move(most);
  return drafts;
}

// 1 - p2 / p1 of the two largest logits.
float margin(const std::vector<float>& logits, int best) {
  float second = -INFINITY;
  for (int i = 0; i < kVocabulary; ++i)
    if (i != best) second = std::max(second, logits[static_cast<size_t>(i)]);
  return 1 - std::exp(second - logits[static_cast<size_t>(best)]);
}

}  // namespace

TEST(drafts_are_single_steps) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject subject(kernels, 2, kind), steps(kernels, 1, kind);
      fill(subject);
      for (const int exit_layer : {0, 2, kLayers}) {
        Drafts drafts = drafts_of({4, 1, 6});
        drafts.exit_layer = exit_layer;
        std::vector<float> thresholds = never();
        std::fill(thresholds.begin() + exit_layer, thresholds.end(), -INFINITY);
        subject.decoder.draft(drafts);
        for (size_t i = 0; i < 3; ++i) {
          fill(steps);
          int token = drafts.tokens[i];
          CHECK(drafts.drafted[i].size() == static_cast<size_t>(drafts.most[i]));
          for (size_t place = 0; place < drafts.drafted[i].size(); ++place) {
            const Result step = steps.run({token}, {drafts.sequences[i]}, thresholds);
            token = step.best_tokens[0];
            CHECK(drafts.drafted[i][place] == token);
            CHECK(std::abs(drafts.margins[i][place] - margin(step.logits, token)) < 1e-4f);
          }
        }
      }
    }
  });
}

TEST(drafts_leave_the_cache_as_it_was) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 2, {16, 16, true}), other(kernels, 2, {16, 16, true});
    fill(subject);
    fill(other);
    Drafts drafts = drafts_of({70, 3, 9});
    subject.decoder.draft(drafts);
    CHECK(subject.run({1, 2, 3}, {0, 1, 2}, never()) == other.run({1, 2, 3}, {0, 1, 2}, never()));
  });
}

TEST(drafts_end_with_a_small_margin) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 2);
    fill(subject);
    Drafts free = drafts_of({9, 9, 9});
    subject.decoder.draft(free);
    std::vector<float> bounds = {0.0f, 2.0f, NAN};
    for (const auto& margins : free.margins) bounds.push_back(margins[4]);
    for (const float bound : bounds) {
      Drafts drafts = drafts_of({9, 9, 9});
      drafts.least_margin = bound;
      subject.decoder.draft(drafts);
      for (size_t i = 0; i < 3; ++i) {  // the uncertain token still belongs to it
        const auto small = std::find_if(free.margins[i].begin(), free.margins[i].end(),
                                        [&](float margin) { return !(margin >= bound); });
        std::vector<int> expected = free.drafted[i];
        if (small != free.margins[i].end())
          expected.resize(static_cast<size_t>(small - free.margins[i].begin()) + 1);
        CHECK(drafts.drafted[i] == expected);
      }
    }
  });
}

TEST(drafts_end_with_a_stop_token) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 2);
    fill(subject);
    Drafts free = drafts_of({6, 6, 6});
    subject.decoder.draft(free);
    Drafts drafts = drafts_of({6, 6, 6});
    drafts.stop_tokens = {free.drafted[1][2], kVocabulary + 1};
    subject.decoder.draft(drafts);
    for (size_t i = 0; i < 3; ++i) {
      std::vector<int> expected = free.drafted[i];
      const auto stop = std::find(expected.begin(), expected.end(), drafts.stop_tokens[0]);
      if (stop != expected.end()) expected.erase(stop + 1, expected.end());
      CHECK(drafts.drafted[i] == expected);
    }
  });
}

TEST(wrong_drafts_are_refused) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 1);
    fill(subject);
    const auto refused = [&](auto change) {
      Drafts drafts = drafts_of({2, 2, 2});
      change(drafts);
      try {
        subject.decoder.draft(drafts);
      } catch (const std::invalid_argument&) {
        return true;
      }
      return false;
    };
    CHECK(refused([](Drafts& d) { d.most = {2, 2}; }));
    CHECK(refused([](Drafts& d) { d.most[1] = 0; }));
    CHECK(refused([](Drafts& d) { d.exit_layer = -1; }));
    CHECK(refused([](Drafts& d) { d.exit_layer = kLayers + 1; }));
    CHECK(refused([](Drafts& d) { d.tokens[0] = kVocabulary; }));
    CHECK(refused([](Drafts& d) { d.sequences[0] = kSequences; }));
    CHECK(refused([](Drafts& d) { d.draft_head = true; }));
    CHECK(!refused([](Drafts&) {}));
  });
}

}  // namespace river::test
