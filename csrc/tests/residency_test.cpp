// Backbone layers that are evicted and come back.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiny_decoder.h"

namespace river::test {
namespace {

// The packed weights of a model in a file of its own.
class WeightsOnDisk {
 public:
  explicit WeightsOnDisk(const Model& model) {
    const int descriptor = mkstemp(name_.data());
    CHECK(descriptor >= 0);
    std::vector<Model::Part> parts;
    for (int l = 0; l < kLayers; ++l) parts.push_back(model.packed_layer(l));
    parts.push_back(model.packed_rest());
    for (const Model::Part& part : parts)
      CHECK(write(descriptor, part.data, part.bytes) == static_cast<ssize_t>(part.bytes));
    close(descriptor);
  }
  ~WeightsOnDisk() { unlink(name_.c_str()); }
  WeightsOnDisk(const WeightsOnDisk&) = delete;
  WeightsOnDisk& operator=(const WeightsOnDisk&) = delete;

  const std::string& name() const { return name_; }

 private:
  std::string name_ = "/tmp/river-weights-XXXXXX";
};

const KernelSet& best_kernels() {
  const KernelSet* sets[kMaxKernelSets];
  available_kernel_sets(sets);
  return *sets[0];
}

// A prompt of two sequences and some steps, at the thresholds given.
std::vector<Result> passes(Subject& subject, const std::vector<float>& thresholds) {
  subject.begin(2);
  std::vector<Result> results;
  results.push_back(subject.run(random_tokens(9, 1), {0, 0, 0, 0, 1, 1, 1, 1, 1}, thresholds));
  for (uint32_t step = 0; step < 4; ++step)
    results.push_back(subject.run(random_tokens(2, 2 + step), {0, 1}, thresholds));
  return results;
}

}  // namespace

TEST(evicted_layers_come_back_with_the_same_bits) {
  for (const int bits : {16, 8})
    for (const int threads : {1, 2, 3}) {
      Subject subject(best_kernels(), threads, {bits});
      const WeightsOnDisk file(subject.model);
      subject.decoder.residency.open(file.name());
      const std::vector<float> mixed = sometimes(subject);
      for (const std::vector<float>& thresholds : {never(), always(), mixed}) {
        const std::vector<Result> expected = passes(subject, thresholds);
        for (const int kept : {2, 0, 1, kLayers, 1, kLayers}) {
          subject.decoder.residency.keep(kept);
          CHECK(subject.decoder.residency.resident() == kept);
          for (int l = 0; l < kLayers; ++l)
            CHECK((subject.model.packed_layer(l).data == nullptr) == (l >= kept));
          CHECK(passes(subject, thresholds) == expected);
        }
      }
    }
}

TEST(misses_are_counted) {
  Subject subject(best_kernels(), 2);
  const WeightsOnDisk file(subject.model);
  Residency& residency = subject.decoder.residency;
  residency.open(file.name());
  residency.keep(1);
  subject.run({1, 2, 3}, always());
  CHECK(residency.misses() == 0);
  subject.run({4}, never());
  CHECK(residency.misses() == kLayers - 1);
  std::vector<float> fixed = never();
  fixed[2] = always()[0];  // after two layers
  subject.run({5}, fixed);
  CHECK(residency.misses() == kLayers);
  CHECK(residency.bytes_read() == kLayers * subject.model.layer_bytes(0, kBackbone));
  CHECK(residency.waited().count() > 0);
}

TEST(layers_need_a_file_to_come_back_from) {
  Subject subject(best_kernels(), 2);
  Residency& residency = subject.decoder.residency;
  CHECK_THROWS(residency.keep(1), std::runtime_error);
  CHECK(residency.resident() == kLayers);
  for (const int wrong : {-1, kLayers + 1}) CHECK_THROWS(residency.keep(wrong), std::invalid_argument);
  CHECK_THROWS(residency.open("/tmp/no such file"), std::runtime_error);
  const WeightsOnDisk file(subject.model);
  CHECK(truncate(file.name().c_str(), 100) == 0);
  CHECK_THROWS(residency.open(file.name()), std::runtime_error);
}

TEST(a_file_that_was_changed_gives_no_weights) {
  const auto spoil = [](const WeightsOnDisk& file, int how) {
    if (how == 0) CHECK(truncate(file.name().c_str(), 100) == 0);
    if (how == 1) {  // other bytes, as many
      std::FILE* opened = std::fopen(file.name().c_str(), "r+b");
      std::fputc(77, opened);
      std::fclose(opened);
    }
  };
  for (const int how : {0, 1}) {
    Subject subject(best_kernels(), 2);
    const WeightsOnDisk file(subject.model);
    Residency& residency = subject.decoder.residency;
    residency.open(file.name());
    residency.keep(1);
    std::vector<float> fixed = never();
    fixed[1] = always()[0];  // after one layer
    const Result before = subject.run({1, 2, 3}, fixed);
    usleep(20000);  // a file's time has steps of some milliseconds
    spoil(file, how);
    for (const int rows : {1, 5}) {
      CHECK_THROWS(subject.run(random_tokens(rows, 7), never()), std::runtime_error);
      CHECK(subject.decoder.cache.length(0) == 3);
    }
    CHECK_THROWS(residency.keep(kLayers), std::runtime_error);
    CHECK(residency.resident() == 1);
    subject.begin(1);
    CHECK(subject.run({1, 2, 3}, fixed) == before);  // what is in memory goes on
  }
}

TEST(a_file_that_was_removed_still_gives_weights) {
  Subject subject(best_kernels(), 2);
  const std::vector<Result> expected = passes(subject, never());
  {
    const WeightsOnDisk file(subject.model);
    subject.decoder.residency.open(file.name());
  }
  subject.decoder.residency.keep(0);
  CHECK(passes(subject, never()) == expected);
}

TEST(rows_leave_at_the_depth_limit) {
  Subject subject(best_kernels(), 2);
  const std::vector<float> mixed = sometimes(subject);
  const std::vector<int> tokens = random_tokens(41, 99);
  for (const std::vector<float>& thresholds : {never(), always(), mixed})
    for (int limit = 0; limit <= kLayers; ++limit) {
      Pass free, limited;
      for (Pass* pass : {&free, &limited}) {
        subject.begin(1);
        pass->tokens = tokens;
        pass->sequences.assign(tokens.size(), 0);
        pass->thresholds = thresholds;
        pass->record_similarities = true;
        pass->logit_rows = {40};
        if (pass == &limited) pass->depth_limit = limit;
        subject.decoder.forward(*pass);
      }
      if (limit == kLayers) {
        CHECK(take(limited) == take(free));
        CHECK(limited.depth_capped == 0);
        continue;
      }
      const float threshold = thresholds[static_cast<size_t>(limit)];
      int depth_capped = 0;
      for (size_t row = 0; row < tokens.size(); ++row) {
        CHECK(limited.exit_layers[row] <= limit);
        if (limited.exit_layers[row] < limit) continue;
        const float similarity =
            limit > 0 ? limited.similarities[static_cast<size_t>(limit - 1) * tokens.size() + row] : -1;
        depth_capped += !(similarity > threshold);
      }
      CHECK(limited.depth_capped == (threshold == always()[0] ? 0 : depth_capped));
    }
}

}  // namespace river::test
