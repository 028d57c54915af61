// Passes of a tiny model: what must not depend on threads, batches and how tokens are cut up.
#include <algorithm>
#include <limits>
#include <set>

#include "tiny_decoder.h"

namespace river::test {
namespace {

const std::vector<Kind> kKinds = {{},
                                  {16, 16, true},
                                  {8, 8, false},
                                  {8, 16, true, 1, 2, {5, 6, 8, 3}},
                                  {.kv_bits = 8},
                                  {.has_everything = true, .kv_bits = 8}};

// Whether thresholds parted the tokens, so that a test says something about exits.
bool is_mixed(const std::vector<int>& exit_layers) {
  return std::set<int>(exit_layers.begin(), exit_layers.end()).size() > 1;
}

// Passes of every size, some of them over two sequences.
std::vector<Result> run_some(Subject& subject, const std::vector<float>& thresholds) {
  subject.begin(2);
  std::vector<Result> results;
  uint32_t seed = 20;
  for (const int rows : {1, 40, 4, 5, 30, 1, 2, 270, 3}) {
    const std::vector<int> tokens = random_tokens(rows, ++seed);
    std::vector<int> sequences;
    for (int row = 0; row < rows; ++row) sequences.push_back(rows < 5 ? row % 2 : row * 2 / rows);
    results.push_back(subject.run(tokens, sequences, thresholds));
  }
  return results;
}

}  // namespace

TEST(any_number_of_threads_gives_the_same_bits) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject one(kernels, 1, kind);
      const std::vector<float> thresholds = sometimes(one);
      const std::vector<Result> expected = run_some(one, thresholds);
      CHECK(is_mixed(expected[1].exit_layers));
      for (const int threads : {2, 3}) {
        Subject subject(kernels, threads, kind);
        CHECK(run_some(subject, thresholds) == expected);
        CHECK(run_some(subject, thresholds) == expected);  // and with buffers that are there
      }
    }
  });
}

// Whatever stands beside it, a row has the bits that it has alone: sequences of their own lengths,
// which join and leave, and rows with their own thresholds.
TEST(batch_invariance) {
  constexpr int kSequences = 6, kSteps = 5;
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject together(kernels, 2, kind), alone(kernels, 1, kind);
      const std::vector<float> mixed = sometimes(alone);
      const std::vector<float> choices[] = {mixed, never(), always()};
      const auto of = [&](int s, int step) { return choices[(s + step) % 3]; };
      const auto goes_on = [](int s, int step) { return (s + 2 * step) % 4 != 0; };
      together.begin(kSequences);
      std::vector<std::vector<Result>> steps(kSequences);
      std::set<int> exit_layers;
      for (int s = 0; s < kSequences; ++s)  // prompts of different length
        together.run(random_tokens(1 + 23 * s, 30), std::vector<int>(1 + 23 * s, s), mixed);
      for (int step = 0; step < kSteps; ++step) {
        std::vector<int> rows, tokens;
        std::vector<float> thresholds;
        for (int s = 0; s < kSequences; ++s) {
          if (!goes_on(s, step)) continue;
          rows.push_back(s);
          tokens.push_back(random_tokens(kSequences, 40 + step)[static_cast<size_t>(s)]);
          for (const float threshold : of(s, step)) thresholds.push_back(threshold);
        }
        const Result result = together.run(tokens, rows, thresholds);
        for (size_t i = 0; i < rows.size(); ++i) {
          steps[static_cast<size_t>(rows[i])].push_back(result.row(static_cast<int>(i)));
          exit_layers.insert(result.exit_layers[i]);
        }
      }
      CHECK(exit_layers.size() > 2);
      for (int s = 0; s < kSequences; ++s) {
        alone.begin(1);
        alone.run(random_tokens(1 + 23 * s, 30), mixed);
        auto expected = steps[static_cast<size_t>(s)].begin();
        for (int step = 0; step < kSteps; ++step) {
          if (!goes_on(s, step)) continue;
          const int token = random_tokens(kSequences, 40 + step)[static_cast<size_t>(s)];
          CHECK(alone.run({token}, of(s, step)) == *expected++);
        }
      }
    }
  });
}

// Long texts take the long rotary angles, whatever stands beside them, and a prompt's first tokens
// those of the whole prompt.
TEST(each_row_has_the_rotary_angles_of_its_text) {
  constexpr int kBoundary = 8;
  with_each_kernel_set([](const KernelSet& kernels) {
    const Kind changing{.has_everything = true, .rope_boundary = kBoundary};
    Subject subject(kernels, 2, changing), plain[] = {{kernels, 2, {.has_everything = true}},
                                                      {kernels, 2, {.has_everything = true}}};
    for (size_t is_long : {0, 1})  // short and long ones, at every position
      for (size_t kind : {0, 1}) plain[is_long].model.rotary[kind] = subject.model.rotary[2 * is_long + kind];
    const std::vector<int> tokens = random_tokens(20, 77);
    const std::vector<int> first(tokens.begin(), tokens.begin() + kBoundary);
    subject.begin(1);
    plain[0].begin(1);
    CHECK(subject.run(first, never()) == plain[0].run(first, never()));
    CHECK(!(subject.run({5}, never()) == plain[0].run({5}, never())));
    subject.decoder.cache.truncate(0, kBoundary - 1);
    plain[0].decoder.cache.truncate(0, kBoundary - 1);
    const int of_prompt = subject.decoder.cache.add(kBoundary + 1);
    CHECK(subject.run({6, 6}, {0, of_prompt}, never()).row(0) == plain[0].run({6}, never()));
    subject.decoder.cache.truncate(of_prompt, 0);
    plain[1].begin(1);
    for (const int token : tokens)
      CHECK(subject.run({token}, {of_prompt}, never()) == plain[1].run({token}, never()));
  });
}

TEST(several_tokens_at_once_are_single_steps) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject at_once(kernels, 2, kind), single(kernels, 2, kind);
      for (const std::vector<float>& thresholds : {never(), always(), sometimes(single)}) {
        single.begin(1);
        at_once.begin(1);
        for (const int count : {1, 2, 3, 5, 8, 17, 33}) {
          const std::vector<int> tokens = random_tokens(count, 50);
          const Result result = at_once.run(tokens, thresholds);
          for (int i = 0; i < count; ++i)
            CHECK(single.run({tokens[static_cast<size_t>(i)]}, thresholds) == result.row(i));
        }
      }
    }
  });
}

TEST(long_passes_are_short_ones_after_each_other) {
  constexpr int kCount = 300;
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject whole(kernels, 2, kind), pieces(kernels, 3, kind);
      const std::vector<float> thresholds = sometimes(whole);
      const std::vector<int> tokens = random_tokens(kCount, 60);
      const Result result = whole.run(tokens, thresholds);
      CHECK(is_mixed(result.exit_layers));
      for (int first = 0, size = 1; first < kCount; first += size, size = size * 3 % 97) {
        const int end = first + size < kCount ? first + size : kCount;
        const Result piece =
            pieces.run(std::vector<int>(tokens.begin() + first, tokens.begin() + end), thresholds);
        for (int i = 0; i < static_cast<int>(piece.exit_layers.size()); ++i)
          CHECK(piece.row(i) == result.row(first + i));
      }
    }
  });
}

TEST(always_leaving_takes_the_river_alone) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const bool has_everything : {false, true}) {
      const auto kind = [&](uint32_t backbone_seed, uint32_t river_seed) {
        return Kind{16, 16, has_everything, backbone_seed, river_seed};
      };
      Subject subject(kernels, 2, kind(1, 2)), other_backbone(kernels, 2, kind(5, 2)),
          other_river(kernels, 2, kind(1, 6));
      const std::vector<int> tokens = random_tokens(30, 70);
      const Result river = subject.run(tokens, always());
      CHECK(river.exit_layers == std::vector<int>(30, 0));
      CHECK(other_backbone.run(tokens, always()) == river);
      subject.begin(1);
      const Result backbone = subject.run(tokens, never());
      CHECK(backbone.exit_layers == std::vector<int>(30, kLayers));
      CHECK(other_river.run(tokens, never()) == backbone);
      CHECK(river.logits != backbone.logits);
    }
  });
}

TEST(rows_of_a_group_leave_together) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 2);
    const std::vector<float> thresholds = sometimes(subject);
    Pass pass;
    pass.tokens = random_tokens(12, 75);
    for (int row = 0; row < 12; ++row) pass.sequences.push_back(row);
    subject.begin(12);
    const Result free = subject.run(pass.tokens, pass.sequences, thresholds);
    CHECK(is_mixed(free.exit_layers));
    for (const bool by_mean : {true, false}) {
      pass.thresholds = thresholds;
      std::vector<int>& groups = by_mean ? pass.mean_groups : pass.minimum_groups;
      groups = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
      subject.begin(12);
      subject.decoder.forward(pass);
      for (int group = 0; group < 2; ++group) {
        double mean = 0, least = 2;
        for (int row = group; row < 12; row += 2) {
          mean += free.similarities[static_cast<size_t>(row)] / 6.0;
          least = std::min<double>(least, free.similarities[static_cast<size_t>(row)]);
        }
        const int exit = pass.exit_layers[static_cast<size_t>(group)];
        CHECK((exit == 1) == ((by_mean ? mean : least) > thresholds[1]));
        for (int row = group; row < 12; row += 2)
          CHECK(pass.exit_layers[static_cast<size_t>(row)] == exit);
      }
      groups.clear();
    }
  });
}

TEST(rows_of_a_group_have_their_own_thresholds) {
  with_each_kernel_set([](const KernelSet& kernels) {
    Subject subject(kernels, 2);
    const Result free = subject.run(random_tokens(3, 75), never());
    subject.begin(1);
    const auto sum = free.similarities[0] + free.similarities[1] + free.similarities[2];
    const auto least = *std::min_element(free.similarities.begin(), free.similarities.begin() + 3);
    for (const bool by_mean : {true, false}) {
      const float value = by_mean ? static_cast<float>(sum / 3.0) : least;
      Pass pass;
      pass.tokens = random_tokens(3, 75);
      pass.sequences = {0, 0, 0};
      (by_mean ? pass.mean_groups : pass.minimum_groups) = {0, 0, 0};
      pass.thresholds.assign(3 * kLayers, std::numeric_limits<float>::infinity());
      pass.thresholds[1] = value - 1e-3f;
      pass.thresholds[kLayers + 1] = value + 1e-3f;
      subject.begin(1);
      subject.decoder.forward(pass);
      CHECK(pass.exit_layers == std::vector<int>({1, kLayers, kLayers}));
    }
  });
}

TEST(truncation_undoes_passes) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject subject(kernels, 2, kind);
      const std::vector<float> thresholds = sometimes(subject);
      subject.run(random_tokens(100, 80), thresholds);
      const Result first = subject.run({5}, thresholds), second = subject.run({6}, thresholds);
      for (const int beyond : {1, 30, 100}) {
        subject.run(random_tokens(beyond, 81), thresholds);
        subject.decoder.cache.truncate(0, 100);
        Pass pass;  // and so does the decoder
        pass.tokens = random_tokens(beyond, 82);
        pass.sequences.assign(static_cast<size_t>(beyond), 0);
        pass.thresholds = thresholds;
        subject.decoder.forward(pass);
        subject.decoder.undo(pass);
        CHECK(subject.run({5}, thresholds) == first);
        CHECK(subject.run({6}, thresholds) == second);
      }
    }
  });
}

}  // namespace river::test
