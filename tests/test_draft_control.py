"""What drafts are made, and for how long, under a clock of its own: `draft_simulation`."""

from __future__ import annotations

import math
from statistics import mean

import pytest
from draft_simulation import PLAIN_SECONDS, Machine, Run, Text, new_control

from river_llm.lossless.draft_control import DraftControl, Guess
from river_llm.lossless.sources import MOST_DRAFTED

MACHINES = [
    Machine(0.03, 0.25),
    Machine(0.03, 1.0),
    Machine(0.15, 0.5),
    Machine(0.5, 0.25),
    Machine(0.5, 1.0),
]
FAST = MACHINES[0]
USELESS, GOOD = Text(0), Text(0.9)

on_every_machine = pytest.mark.parametrize("machine", MACHINES, ids=str)


class TestSpeed:
    """Over plain decoding."""

    @pytest.mark.parametrize("sequences", [1, 4, 16])
    @on_every_machine
    @pytest.mark.parametrize("chance", [0, 0.5, 0.8, 0.95])
    def test_is_hardly_less_than_that_of_plain_decoding(
        self, sequences: int, machine: Machine, chance: float
    ) -> None:
        text = Text(chance)
        first = [
            Run(new_control(), machine, seed).speed_up(text, 128, sequences) for seed in range(10)
        ]
        assert mean(first) >= 0.95
        tokens = 1000 if sequences < 16 else 400
        assert Run(new_control(), machine, 99).speed_up(text, tokens, sequences) >= 0.96

    @on_every_machine
    def test_is_hardly_less_where_the_river_is_sure_of_what_is_wrong(
        self, machine: Machine
    ) -> None:
        text = Text(0, least_margin=0.9)
        first = [Run(new_control(), machine, seed).speed_up(text, 128) for seed in range(10)]
        assert mean(first) >= 0.95

    def test_is_much_more_where_drafts_are_good(self) -> None:
        runs = [Run(new_control(), FAST, seed) for seed in range(10)]
        assert mean(run.speed_up(Text(0.95), 128) for run in runs) >= 1.4
        assert mean(run.speed_up(Text(0.95), 400) for run in runs) >= 1.8

    @pytest.mark.parametrize("chance", [0.0, 0.95])
    @on_every_machine
    def test_of_drafts_out_of_the_text_is_no_less(self, machine: Machine, chance: float) -> None:
        """The river is useless; the text's continuations are, or are not."""
        for match in (2, 8):
            text = Text(0, match, chance)
            first = [Run(new_control(), machine, seed).speed_up(text, 128) for seed in range(10)]
            assert mean(first) >= (2 if chance and machine is FAST else 0.9)
            long = [Run(new_control(), machine, seed).speed_up(text, 600) for seed in range(3)]
            assert mean(long) >= (3 if chance and machine is FAST else 0.95)

    def test_falls_little_below_where_good_drafts_turn_bad(self) -> None:
        after = []
        for seed in range(10):
            run = Run(new_control(), FAST, seed)
            assert run.speed_up(GOOD, 400) > 1.4
            after.append(run.speed_up(USELESS, 128))
        assert mean(after) >= 0.93

    def test_rises_within_some_hundred_tokens_where_bad_drafts_turn_good(self) -> None:
        after = []
        for seed in range(10):
            run = Run(new_control(), FAST, seed)
            assert run.speed_up(USELESS, 400) > 0.95
            run.speed_up(GOOD, 300)
            after.append(run.speed_up(GOOD, 200))
        assert mean(after) >= 1.6
        assert min(after) >= 1.1

    @pytest.mark.parametrize("times_as_long", [1.5, 3, 10])
    @pytest.mark.parametrize("chance", [0.5, 0.95])
    def test_is_hardly_less_where_the_first_step_was_held_up(
        self, chance: float, times_as_long: float
    ) -> None:
        """As after a prompt that left the caches cold."""
        speeds = []
        for seed in range(10):
            control = new_control()
            control.begin_round(1)
            control.note_round([Guess()], [0], times_as_long * PLAIN_SECONDS)
            speeds.append(Run(control, Machine(0.15, 1.0), seed).speed_up(Text(chance), 400))
        assert mean(speeds) >= 0.94


class TestDrafts:
    def test_of_noise_are_given_up_soon(self) -> None:
        for seed in range(10):
            run = Run(new_control(), FAST, seed)
            run.speed_up(USELESS, 128)
            assert 2 <= run.drafted <= 16
            run.speed_up(USELESS, 1000)
            assert run.drafted <= 16 + 80

    def test_of_certain_tokens_come_to_be_long(self) -> None:
        run = Run(new_control(), FAST, 0)
        run.speed_up(Text(1), 600)
        assert run.accepted == run.drafted
        assert mean(run.lengths[-20:]) > 0.75 * MOST_DRAFTED

    def test_that_cost_more_are_shorter(self) -> None:
        lengths = []
        for token in (0.1, 0.4, 0.8):
            run = Run(new_control(), Machine(0.03, token), 0)
            run.speed_up(Text(0.8), 1500)
            lengths.append(mean(length for length in run.lengths[50:] if length))
        assert lengths[0] > 1.5 * lengths[1]
        assert lengths[1] > lengths[2]

    @pytest.mark.parametrize("length", [1, 5])
    @pytest.mark.parametrize("text", [USELESS, Text(1)], ids=str)
    def test_of_a_fixed_length_are_made_in_every_round(self, text: Text, length: int) -> None:
        control = new_control(length)
        for _ in range(100):
            control.begin_round(1)
            assert control.way is not None
            rule = control.rule(8, frozenset())
            assert rule.least_chances == (0.0,)
            control.note_draft_time([length], 0.02)
            accepted = length if text.chance else 0
            control.note_round([Guess([1] * length, margins=[0.5] * length)], [accepted], 0.01)

    def test_out_of_the_text_have_the_fixed_length(self) -> None:
        control = new_control(5)
        for _ in range(100):
            control.begin_round(1)
            length = control.ngram_length(8, 5)
            assert length in (0, 5)
            control.note_round([Guess([1] * length, 8)], [length], 0.01)
        assert length == 5

    def test_are_none_in_a_plain_round(self) -> None:
        control = new_control()
        control.begin_round(1)  # the first: it says what a step takes
        assert control.way is None
        assert control.ngram_length(12, 12) == 0

    @pytest.mark.parametrize("sequences", [1, 4])
    def test_end_by_chances_that_rise_with_the_cost_of_a_sequence_alone(
        self, sequences: int
    ) -> None:
        control = new_control()
        Run(control, Machine(0.1, 0.3), 0).speed_up(Text(0.7), 200, sequences)
        while True:
            control.begin_round(sequences)
            if control.way is not None:
                break
            control.note_round([Guess()] * sequences, [0] * sequences, 0.01)
        rule = control.rule(4, frozenset({7}))
        assert rule.lm_head_bits == 4
        assert rule.stop_tokens == {7}
        assert (rule.exit_layer, rule.vocabulary) in [(0, 100), (3, 100), (0, 300)]
        assert len(rule.least_chances) == sequences
        assert all(0 < least < 1 for least in rule.least_chances)
        # a step over one sequence costs as much as it does alone; over more, each pays its part
        assert list(rule.least_chances) == sorted(rule.least_chances, reverse=True)

    def test_come_from_the_way_that_brings_most(self) -> None:
        control = DraftControl([(0, 100), (15, 100)], 30)
        used = []
        for number in range(600):
            control.begin_round(1)
            way = control.way
            if way is None:
                control.note_round([Guess()], [0], 0.01)
                continue
            used.append(way.exit_layer)
            control.note_draft_time([2], 0.001 if way.exit_layer == 0 else 0.002)
            accepted = 2 if way.exit_layer == 15 else number % 2
            control.note_round([Guess([1, 1], margins=[0.9, 0.9])], [accepted], 0.0105)
        assert used.count(15) > 0.8 * len(used)
        assert used.count(0) >= len(used) / 60  # and has its turn now and then


class TestRestored:
    def learnt(self, text: Text, machine: Machine = FAST, tokens: int = 1500) -> DraftControl:
        control = new_control()
        Run(control, machine, 0).speed_up(text, tokens)
        restored = new_control()
        restored.restore(control.to_dict())
        return restored

    def test_control_says_what_was_learnt(self) -> None:
        for text in (USELESS, Text(0.9, 4, 0.5)):
            restored = self.learnt(text)
            again = new_control()
            again.restore(restored.to_dict())
            assert again.to_dict() == restored.to_dict()
            assert again.to_dict() != new_control().to_dict()

    def test_control_drafts_at_length_in_its_first_rounds(self) -> None:
        for seed in range(10):
            run = Run(self.learnt(Text(0.95)), FAST, seed)
            run.speed_up(Text(0.95), 20)
            assert max(run.lengths[:3]) >= 4

    def test_control_is_faster_from_the_start(self) -> None:
        restored = [Run(self.learnt(Text(0.95)), FAST, seed) for seed in range(10)]
        new = [Run(new_control(), FAST, seed) for seed in range(10)]
        speed = mean(run.speed_up(Text(0.95), 64) for run in restored)
        assert speed > 1.15 * mean(run.speed_up(Text(0.95), 64) for run in new)

    def test_control_finds_out_that_all_has_changed(self) -> None:
        machine = Machine(0.15, 0.5)
        speeds = [
            Run(self.learnt(GOOD), machine, seed).speed_up(USELESS, 128) for seed in range(10)
        ]
        assert mean(speeds) >= 0.9
        speeds = []
        for seed in range(10):
            run = Run(self.learnt(USELESS, machine), FAST, seed)
            run.speed_up(GOOD, 300)
            speeds.append(run.speed_up(GOOD, 200))
        assert mean(speeds) >= 1.5

    @pytest.mark.parametrize("name", ["speed_up", "costs", "ngrams", "river"])
    @pytest.mark.parametrize("damage", [None, 0.5, -1, math.nan, math.inf])
    def test_control_refuses_what_is_none(self, name: str, damage: object) -> None:
        learnt = self.learnt(GOOD, tokens=100).to_dict()
        with pytest.raises((KeyError, TypeError, ValueError)):
            new_control().restore({**learnt, name: damage})
        del learnt[name]
        with pytest.raises((KeyError, TypeError, ValueError)):
            new_control().restore(learnt)
        with pytest.raises((KeyError, TypeError, ValueError)):
            new_control().restore(damage)

    def test_control_leaves_out_ways_that_it_hasnt(self) -> None:
        learnt = self.learnt(GOOD, tokens=400).to_dict()
        other = DraftControl([(5, 100), (0, 100)], 30)
        with pytest.raises(ValueError, match="costs"):  # they are of three ways
            other.restore(learnt)
