"""Rounds of lossless mode without a model: `DraftControl` under a clock whose times, and drafts
whose chances, are known beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass

from river_llm.lossless.draft_control import DraftControl, Guess
from river_llm.lossless.sources import MOST_DRAFTED

PLAIN_SECONDS = 0.007  # of a plain step


@dataclass(frozen=True)
class Machine:
    """What takes how long, in plain steps over one sequence.

    Attributes:
        row: one more row of a verification.
        token: a drafted token of one sequence; more sequences together cost as more rows do.
        noise: standard deviation of every time, as a share of it.
        held_up: share of verifications that something else makes four times as long.
    """

    row: float = 0.1
    token: float = 0.4
    noise: float = 0.04
    held_up: float = 0.01

    def rows(self, count: int) -> float:
        return 1 + self.row * (count - 1)


@dataclass(frozen=True)
class Text:
    """How the answers go.

    Attributes:
        chance: that a token of the river is accepted, over all margins; those of larger margins are
            likelier.
        ngram_match: how long the match of n-gram drafts is; 0: there are none.
        ngram_chance: that one of their tokens is accepted.
        least_margin: of the river's tokens; near 1 it is sure of itself.
    """

    chance: float = 0.6
    ngram_match: int = 0
    ngram_chance: float = 0.0
    least_margin: float = 0.0


def new_control(fixed_length: int | None = None) -> DraftControl:
    """Of a model of 30 layers: two exit layers, and one of them with a larger vocabulary."""
    return DraftControl([(0, 100), (3, 100), (0, 300)], 30, fixed_length)


class Run:
    """Answers that one control drafts for.

    Attributes:
        drafted, accepted: tokens, of all sequences.
        lengths: of the river's drafts, in their order; of rounds without one, 0.
    """

    def __init__(self, control: DraftControl, machine: Machine, seed: int) -> None:
        self.control, self.machine = control, machine
        self.drafted = self.accepted = 0
        self.lengths: list[int] = []
        self._random = random.Random(seed)

    def speed_up(self, text: Text, tokens: int, sequences: int = 1) -> float:
        """Over plain decoding, while each sequence grows by so many tokens on the mean."""
        steps, given = 0.0, 0
        while given < tokens * sequences:
            round_steps, round_tokens = self._round(text, sequences)
            steps += round_steps
            given += round_tokens
        plain_step = self.machine.rows(sequences) * (1 + 3 * self.machine.held_up)
        return given / sequences * plain_step / steps

    def _round(self, text: Text, sequences: int) -> tuple[float, int]:
        """The steps that it takes, and the tokens that it gives."""
        machine, control = self.machine, self.control
        control.begin_round(sequences)
        guesses, accepted = [Guess()] * sequences, [0] * sequences
        wanted = list(range(sequences))
        if text.ngram_match:
            length = control.ngram_length(text.ngram_match, MOST_DRAFTED)
            if length:
                wanted = []
                guesses = [Guess([1] * length, text.ngram_match) for _ in range(sequences)]
                for i in range(sequences):
                    accepted[i] = self._agreeing([text.ngram_chance] * length)
        draft_steps = 0.0
        if control.way is not None and wanted:
            draft_steps, margins = self._draft(text, sequences)
            control.note_draft_time([len(row) for row in margins], PLAIN_SECONDS * draft_steps)
            for i, row in enumerate(margins):
                guesses[i] = Guess([1] * len(row), margins=row)
                accepted[i] = self._agreeing([_chance(text.chance, margin) for margin in row])
            self.lengths.append(max(map(len, margins)))
        else:
            self.lengths.append(0)
        drafted = sum(len(guess.tokens) for guess in guesses)
        verify_steps = self._measured(machine.rows(sequences + drafted))
        if self._random.random() < machine.held_up:
            verify_steps *= 4
        control.note_round(guesses, accepted, PLAIN_SECONDS * verify_steps)
        self.drafted += drafted
        self.accepted += sum(accepted)
        return draft_steps + verify_steps, sequences + sum(accepted)

    def _draft(self, text: Text, sequences: int) -> tuple[float, list[list[float]]]:
        """The steps that the river takes, and the margins of each sequence's tokens."""
        way = self.control.way
        assert way is not None
        rule = self.control.rule(8, frozenset())
        margins: list[list[float]] = [[] for _ in range(sequences)]
        products = [1.0] * sequences
        going, steps = list(range(sequences)), 0.0
        most = min(MOST_DRAFTED, self.control.most_drafted)
        while going:
            of_token = self.machine.token * (1 + way.exit_layer / 15)
            steps += self._measured(of_token * self.machine.rows(len(going)))
            for i in going:
                margin = self._random.uniform(text.least_margin, 1)
                margins[i].append(margin)
                products[i] *= rule.chance(margin)
            least = rule.least_chances[min(len(going), len(rule.least_chances)) - 1]
            going = [i for i in going if len(margins[i]) < most and products[i] >= least]
        return steps, margins

    def _agreeing(self, chances: list[float]) -> int:
        """How many tokens are accepted before the first that isn't."""
        for place, chance in enumerate(chances):
            if self._random.random() >= chance:
                return place
        return len(chances)

    def _measured(self, steps: float) -> float:
        return steps * max(0.5, self._random.gauss(1, self.machine.noise))


def _chance(mean: float, margin: float) -> float:
    return mean + (2 * margin - 1) * min(mean, 1 - mean)
