// Passes that can't be done: the cache holds what it held before.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>

#include "tiny_decoder.h"

namespace {

// What operator new does while a test watches it.
std::atomic<bool> watching{false};
std::atomic<int> left{0};       // allocations of the watching thread until one fails
std::atomic<int> elsewhere{0};  // allocations of other threads
thread_local bool is_watcher = false;

class Watch {
 public:
  explicit Watch(int allocations) {
    is_watcher = true;
    left = allocations;
    elsewhere = 0;
    watching = true;
  }
  ~Watch() { watching = is_watcher = false; }
};

}  // namespace

void* operator new(size_t size) {
  if (watching) {
    if (!is_watcher)
      ++elsewhere;
    else if (--left < 0)
      throw std::bad_alloc();
  }
  void* memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace river::test {
namespace {

constexpr int kMany = std::numeric_limits<int>::max();

Pass good_pass(int rows) {
  Pass pass;
  pass.tokens = random_tokens(rows, 90);
  pass.sequences.assign(static_cast<size_t>(rows), 0);
  pass.thresholds.assign(kLayers, 0.5f);
  pass.mean_groups.assign(static_cast<size_t>(rows), 0);
  pass.minimum_groups.assign(static_cast<size_t>(rows), 0);
  pass.logit_rows = {rows - 1};
  pass.record_similarities = true;
  return pass;
}

const KernelSet& best_kernels() {
  const KernelSet* sets[kMaxKernelSets];
  available_kernel_sets(sets);
  return *sets[0];
}

// Tokens whose states are no numbers leave no trace when they are cut off.
void check_forgotten(const KernelSet& kernels, const std::vector<float>& thresholds, int kv_bits) {
  constexpr int kBroken = kVocabulary - 1;
  const Kind kind{.has_everything = true, .kv_bits = kv_bits};
  Subject subject(kernels, 2, kind), untouched(kernels, 2, kind);
  std::vector<bf16> embedding(subject.model.embedding,
                              subject.model.embedding + kVocabulary * subject.model.shape.hidden_size);
  embedding[static_cast<size_t>(kBroken * subject.model.shape.hidden_size)] = 0x7fc0;  // NaN
  subject.model.embedding = embedding.data();
  for (Subject* each : {&subject, &untouched}) each->begin(2);
  for (Subject* each : {&subject, &untouched}) each->run({1, 2, 3}, {0, 0, 1}, thresholds);
  // beside another sequence, and before more of its own
  const Result beside = subject.run({kBroken, 4, 5, 6, 7}, {0, 1, 0, 0, 0}, thresholds);
  CHECK(beside.row(0).logits[0] != beside.row(0).logits[0]);
  CHECK(beside.row(0).best_tokens[0] == -1);
  CHECK(beside.row(1) == untouched.run({4}, {1}, thresholds));
  subject.decoder.cache.truncate(0, 2);
  CHECK(subject.run({8}, thresholds) == untouched.run({8}, thresholds));
  // and in a page that another sequence had
  subject.run({kBroken, kBroken}, thresholds);
  for (Subject* each : {&subject, &untouched}) each->begin(2);
  const std::vector<int> tokens = random_tokens(3, 91);
  CHECK(subject.run(tokens, {0, 1, 1}, thresholds) == untouched.run(tokens, {0, 1, 1}, thresholds));
}

}  // namespace

TEST(wrong_passes_change_nothing) {
  const std::function<void(Pass&)> spoilers[] = {
      [](Pass& pass) { pass.tokens.clear(); },
      [](Pass& pass) { pass.tokens[1] = kVocabulary; },
      [](Pass& pass) { pass.tokens[1] = -1; },
      [](Pass& pass) { pass.sequences[1] = 1; },
      [](Pass& pass) { pass.sequences[1] = -1; },
      [](Pass& pass) { pass.sequences.pop_back(); },
      [](Pass& pass) { pass.thresholds.pop_back(); },
      [](Pass& pass) { pass.thresholds.push_back(0.0f); },
      [](Pass& pass) { pass.thresholds.resize(3 * kLayers); },  // of two rows
      [](Pass& pass) { pass.mean_groups[1] = 2; },
      [](Pass& pass) { pass.minimum_groups[1] = -1; },
      [](Pass& pass) { pass.mean_groups.push_back(0); },
      [](Pass& pass) { pass.minimum_groups.pop_back(); },
      [](Pass& pass) { pass.logit_rows = {2}; },
      [](Pass& pass) { pass.logit_rows = {-1}; },
      [](Pass& pass) { pass.logit_rows.assign(3, 0); },  // more than there are rows
      [](Pass& pass) {  // beyond the last position
        pass = good_pass(kPositions);
      },
  };
  Subject subject(best_kernels(), 2), untouched(best_kernels(), 2);
  for (Subject* each : {&subject, &untouched}) each->run({1, 2, 3}, never());
  const size_t bytes = subject.decoder.cache.bytes();
  for (const auto& spoil : spoilers) {
    Pass pass = good_pass(2);
    spoil(pass);
    CHECK_THROWS(subject.decoder.forward(pass), std::invalid_argument);
    CHECK(subject.decoder.cache.length(0) == 3);
    CHECK(subject.decoder.cache.bytes() == bytes);
  }
  for (int step = 0; step < 3; ++step) CHECK(subject.run({5}, never()) == untouched.run({5}, never()));
}

TEST(threads_of_a_pass_take_no_memory) {  // what they can't have would end the process
  Subject subject(best_kernels(), 3);
  subject.begin(1);
  for (const int rows : {1, 4, 5, 70, 300}) {
    Pass pass = good_pass(rows);
    subject.begin(1);
    const Watch watch(kMany);
    subject.decoder.forward(pass);
    CHECK(elsewhere == 0);
  }
}

TEST(passes_without_memory_change_nothing) {
  Subject subject(best_kernels(), 3);
  {
    Pass pass = good_pass(70);
    const Watch watch(kMany);
    subject.decoder.forward(pass);
    CHECK(elsewhere == 0);
    if (elsewhere > 0) return;  // the process would end
  }
  for (const int rows : {2, 70}) {
    Subject expecting(best_kernels(), 3);
    expecting.run({1, 2, 3}, never());
    Pass expected = good_pass(rows);
    expecting.decoder.forward(expected);
    bool succeeded = false;
    for (int allocations = 0; !succeeded; ++allocations) {
      Subject fresh(best_kernels(), 3);
      fresh.run({1, 2, 3}, never());
      Pass pass = good_pass(rows);
      try {
        const Watch watch(allocations);
        fresh.decoder.forward(pass);
        succeeded = true;
      } catch (const std::bad_alloc&) {
        CHECK(fresh.decoder.cache.length(0) == 3);
        pass = good_pass(rows);
        fresh.decoder.forward(pass);
      }
      CHECK(take(pass) == take(expected));
      CHECK(fresh.decoder.cache.length(0) == 3 + rows);
    }
  }
}

TEST(nan_is_forgotten_with_its_tokens) {
  with_each_kernel_set([](const KernelSet& kernels) {
    for (const bool river : {false, true})
      for (const int kv_bits : {16, 8}) check_forgotten(kernels, river ? always() : never(), kv_bits);
  });
}

}  // namespace river::test
