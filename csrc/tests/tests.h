// The core's tests, by file.
#pragma once

namespace river::test {

// packing_test.cpp
void weights_come_back_from_their_panels();
void codes_lie_in_their_panels_as_documented();

// matmul_test.cpp
void products_with_weights_are_right();
void products_with_codes_are_right();
void the_largest_codes_and_activations_overflow_nothing();
void a_row_of_a_batch_has_the_bits_of_that_row_alone();
void some_panels_have_the_bits_of_all();
void a_value_that_is_no_number_stays_none();

// attention_test.cpp
void attention_by_pages_is_attention();
void sums_over_codes_are_exact_in_the_widest_heads();
void what_a_query_does_not_see_changes_no_bit();
void a_query_that_sees_nothing_of_a_page_takes_nothing();

// layer_test.cpp
void norms_are_right();
void sums_and_gates_are_right();
void cosines_are_right();
void rotations_are_right();
void the_largest_is_the_first_of_equals();

// kv_cache_test.cpp
void what_was_written_is_read();
void pages_stay_where_they_are();
void sequences_that_are_kept_move_up();
void freed_pages_are_used_again();
void codes_are_the_nearest();
void codes_take_half_the_memory();
void a_state_that_is_no_number_becomes_none();
void wrong_widths_are_refused();
void pages_are_put_back();
void copies_of_a_page_hold_nothing_else();
void what_is_lengthened_is_zero();

// decoder_test.cpp
void any_number_of_threads_gives_the_same_bits();
void a_sequence_of_a_batch_is_that_sequence_alone();
void several_tokens_at_once_are_single_steps();
void long_passes_are_short_ones_after_each_other();
void always_leaving_takes_the_river_alone();
void rows_of_a_group_leave_together();
void truncation_undoes_passes();

// decoder_errors_test.cpp
void wrong_passes_change_nothing();
void threads_of_a_pass_take_no_memory();
void passes_without_memory_change_nothing();
void numbers_that_are_none_are_forgotten_with_their_tokens();

// residency_test.cpp
void evicted_layers_come_back_with_the_same_bits();
void misses_are_counted();
void layers_need_a_file_to_come_back_from();
void a_file_that_was_changed_gives_no_weights();
void a_file_that_was_removed_still_gives_weights();
void rows_leave_at_the_depth_limit();

// draft_test.cpp
void drafts_are_single_steps();
void drafts_leave_the_cache_as_it_was();
void drafts_end_where_their_chance_falls();
void the_chance_that_counts_is_that_of_the_sequences_still_drafting();
void drafts_end_with_a_stop_token();
void drafts_keep_to_the_tokens_they_are_given();
void wrong_drafts_are_refused();

// thread_pool_test.cpp
void what_is_written_before_a_barrier_is_seen_after();
void runs_take_as_many_threads_as_they_are_told();
void teams_end_at_any_time();
void two_teams_work_at_once();
void shared_work_is_done_once();
void a_crew_shrinks_beside_a_busy_core_and_grows_again();

}  // namespace river::test
