// Passes of a tiny model: what must not depend on threads, batches and how tokens are cut up.
#include <algorithm>
#include <limits>
#include <set>

#include "tests.h"
#include "tiny_decoder.h"

namespace river::test {
namespace {

const std::vector<Kind> kKinds = {{},
                                  {16, 16, true},
                                  {8, 8, false},
                                  {8, 16, true, 1, 2, 6},
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

void any_number_of_threads_gives_the_same_bits() {
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

void a_sequence_of_a_batch_is_that_sequence_alone() {
  constexpr int kSequences = 6, kSteps = 4;
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject together(kernels, 2, kind), alone(kernels, 1, kind);
      const std::vector<float> thresholds = sometimes(alone);
      together.begin(kSequences);
      std::vector<int> rows, exit_layers;
      std::vector<Result> steps;
      for (int s = 0; s < kSequences; ++s) {  // prompts of different length
        together.run(random_tokens(1 + 23 * s, 30), std::vector<int>(1 + 23 * s, s), thresholds);
        rows.push_back(s);
      }
      for (int step = 0; step < kSteps; ++step) {
        steps.push_back(together.run(random_tokens(kSequences, 40 + step), rows, thresholds));
        const std::vector<int>& exits = steps.back().exit_layers;
        exit_layers.insert(exit_layers.end(), exits.begin(), exits.end());
      }
      CHECK(is_mixed(exit_layers));
      for (int s = 0; s < kSequences; ++s) {
        alone.begin(1);
        alone.run(random_tokens(1 + 23 * s, 30), thresholds);
        for (int step = 0; step < kSteps; ++step) {
          const int token = random_tokens(kSequences, 40 + step)[static_cast<size_t>(s)];
          CHECK(alone.run({token}, thresholds) == steps[static_cast<size_t>(step)].row(s));
        }
      }
    }
  });
}

void several_tokens_at_once_are_single_steps() {
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

void long_passes_are_short_ones_after_each_other() {
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

void always_leaving_takes_the_river_alone() {
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

void rows_of_a_group_leave_together() {
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

void truncation_undoes_passes() {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const Kind& kind : kKinds) {
      Subject subject(kernels, 2, kind);
      const std::vector<float> thresholds = sometimes(subject);
      subject.run(random_tokens(100, 80), thresholds);
      const Result first = subject.run({5}, thresholds), second = subject.run({6}, thresholds);
      for (const int beyond : {1, 30, 100}) {
        subject.run(random_tokens(beyond, 81), thresholds);
        subject.decoder.cache.truncate(0, 100);
        CHECK(subject.run({5}, thresholds) == first);
        CHECK(subject.run({6}, thresholds) == second);
      }
    }
  });
}

}  // namespace river::test
