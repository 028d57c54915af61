// Tests of the core without Python, for the sanitizers: `core_test [part of a test's name]`.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "check.h"
#include "tests.h"

namespace river::test {
namespace {

constexpr int kShownFailures = 5;  // of a test

int failures = 0;
const char* subject = "";

struct Test {
  const char* name;
  void (*run)();
};

#define RIVER_TEST(name) Test{#name, name}
constexpr Test kTests[] = {
    RIVER_TEST(weights_come_back_from_their_panels),
    RIVER_TEST(codes_lie_in_their_panels_as_documented),
    RIVER_TEST(products_with_weights_are_right),
    RIVER_TEST(products_with_codes_are_right),
    RIVER_TEST(the_largest_codes_and_activations_overflow_nothing),
    RIVER_TEST(a_row_of_a_batch_has_the_bits_of_that_row_alone),
    RIVER_TEST(some_panels_have_the_bits_of_all),
    RIVER_TEST(a_value_that_is_no_number_stays_none),
    RIVER_TEST(attention_by_pages_is_attention),
    RIVER_TEST(sums_over_codes_are_exact_in_the_widest_heads),
    RIVER_TEST(what_a_query_does_not_see_changes_no_bit),
    RIVER_TEST(a_query_that_sees_nothing_of_a_page_takes_nothing),
    RIVER_TEST(norms_are_right),
    RIVER_TEST(sums_and_gates_are_right),
    RIVER_TEST(cosines_are_right),
    RIVER_TEST(rotations_are_right),
    RIVER_TEST(the_largest_is_the_first_of_equals),
    RIVER_TEST(what_was_written_is_read),
    RIVER_TEST(pages_stay_where_they_are),
    RIVER_TEST(sequences_that_are_kept_move_up),
    RIVER_TEST(freed_pages_are_used_again),
    RIVER_TEST(codes_are_the_nearest),
    RIVER_TEST(codes_take_half_the_memory),
    RIVER_TEST(a_state_that_is_no_number_becomes_none),
    RIVER_TEST(wrong_widths_are_refused),
    RIVER_TEST(pages_are_put_back),
    RIVER_TEST(copies_of_a_page_hold_nothing_else),
    RIVER_TEST(what_is_lengthened_is_zero),
    RIVER_TEST(any_number_of_threads_gives_the_same_bits),
    RIVER_TEST(a_sequence_of_a_batch_is_that_sequence_alone),
    RIVER_TEST(several_tokens_at_once_are_single_steps),
    RIVER_TEST(long_passes_are_short_ones_after_each_other),
    RIVER_TEST(always_leaving_takes_the_river_alone),
    RIVER_TEST(rows_of_a_group_leave_together),
    RIVER_TEST(truncation_undoes_passes),
    RIVER_TEST(wrong_passes_change_nothing),
    RIVER_TEST(threads_of_a_pass_take_no_memory),
    RIVER_TEST(passes_without_memory_change_nothing),
    RIVER_TEST(numbers_that_are_none_are_forgotten_with_their_tokens),
    RIVER_TEST(evicted_layers_come_back_with_the_same_bits),
    RIVER_TEST(misses_are_counted),
    RIVER_TEST(layers_need_a_file_to_come_back_from),
    RIVER_TEST(a_file_that_was_changed_gives_no_weights),
    RIVER_TEST(a_file_that_was_removed_still_gives_weights),
    RIVER_TEST(rows_leave_at_the_depth_limit),
    RIVER_TEST(drafts_are_single_steps),
    RIVER_TEST(drafts_leave_the_cache_as_it_was),
    RIVER_TEST(drafts_end_where_their_chance_falls),
    RIVER_TEST(the_chance_that_counts_is_that_of_the_sequences_still_drafting),
    RIVER_TEST(drafts_end_with_a_stop_token),
    RIVER_TEST(drafts_keep_to_the_tokens_they_are_given),
    RIVER_TEST(wrong_drafts_are_refused),
    RIVER_TEST(what_is_written_before_a_barrier_is_seen_after),
    RIVER_TEST(runs_take_as_many_threads_as_they_are_told),
    RIVER_TEST(teams_end_at_any_time),
    RIVER_TEST(two_teams_work_at_once),
    RIVER_TEST(shared_work_is_done_once),
    RIVER_TEST(a_crew_shrinks_beside_a_busy_core_and_grows_again),
};

}  // namespace

void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  if (++failures <= kShownFailures)
    std::printf("  %s:%d: %s does not hold%s%s\n", file, line, what, *subject ? ", kernels " : "",
                subject);
}

void set_subject(const char* name) { subject = name; }

Guarded::Guarded(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t readable = (bytes + page - 1) / page * page;
  mapping_size_ = readable + page;
  mapping_ = mmap(nullptr, mapping_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  auto* start = static_cast<uint8_t*>(mapping_);
  if (mprotect(start + readable, page, PROT_NONE) != 0) throw std::bad_alloc();
  data_ = start + readable - bytes;
}

Guarded::~Guarded() { munmap(mapping_, mapping_size_); }

}  // namespace river::test

int main(int count, char** arguments) {
  using namespace river::test;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash leaves the name of the test before it
  int passed = 0, failed = 0;
  for (const Test& test : kTests) {
    if (count > 1 && std::strstr(test.name, arguments[1]) == nullptr) continue;
    failures = 0;
    test.run();
    set_subject("");
    std::printf("%s %s\n", failures == 0 ? "passed" : "FAILED", test.name);
    ++(failures == 0 ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
