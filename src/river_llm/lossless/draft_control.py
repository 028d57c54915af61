"""What to draft with, and for how long, learnt from what was accepted and what it cost.

A round of drafts is worth its time if it brings more tokens than the run gives in that time
otherwise. The time is counted in tokens: one is what plain decoding takes for it. So in a run that
is S times as fast as plain decoding a draft goes on while

    (chance that all its tokens so far are accepted) * (chance of the next) >= S * (its cost)

where one more drafted token costs its own step and one more row in the verification. Chances are
counted by a token's margin (`DraftRule`), or by the length of the match for n-gram drafts; costs
are measured (`StepCosts`), and what drafts may lose is bounded (`Account`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from river_llm.engines.drafting import DraftRule
from river_llm.lossless.ngram_drafts import LONGEST_MATCH
from river_llm.lossless.sources import (
    MOST_DRAFTED,
    Account,
    NgramSource,
    RiverSource,
    number_within,
)
from river_llm.lossless.step_costs import StepCosts

_GUESSED_DRAFT = 0.4  # steps of a token of the river alone
_TRIALS = 8  # drafts of each way before the best one is chosen
_TRIED_AGAIN = 48  # drafts after which another one has a turn
_USUAL = 3  # tokens of a draft, over which the price of a row is taken
_ROUNDS = 200  # over which the speed-up is taken
_RESTORED_TOKENS = 30.0  # that a speed-up of another run counts for
_CERTAIN = 0.05  # as far as costs have to be known, or a plain round measures them
_SHORTEST, _LONGEST = 4, 64  # rounds from one plain round to the next
_MEASURED = 4  # one in so many rounds, once costs are known
_FIRST_PLAIN = 3  # rounds before anything is known: the first one's caches are cold


@dataclass(slots=True)
class Guess:
    """What one sequence has to be verified.

    Attributes:
        match: of n-gram drafts, the length of the match.
        margins: of the river's tokens, each one's.
    """

    tokens: Sequence[int] = ()
    match: int = 0
    margins: Sequence[float] = ()


class DraftControl:
    """Of answers of one kind: greedy or sampled, alone or in batches."""

    def __init__(
        self, ways: Sequence[tuple[int, int]], num_layers: int, fixed_length: int | None = None
    ) -> None:
        """`ways` to draft with the river, (exit layer, vocabulary), the likely best first. With a
        fixed length there is always a draft, the best way's."""
        self._ways = [RiverSource(way, *of) for way, of in enumerate(ways)]
        # a token after all layers of the backbone takes a whole step
        shares = [_GUESSED_DRAFT + (1 - _GUESSED_DRAFT) * layer / num_layers for layer, _ in ways]
        self._costs = StepCosts(shares)
        self._ngrams = NgramSource(LONGEST_MATCH)
        self._river_account, self._ngram_account = Account(), Account()
        self._fixed_length = fixed_length
        self._drafts = self._rounds = 0
        self._tokens = self._plain_tokens = 0.0  # of the last rounds, and plain ones in their time
        self._growing = 1
        self._since_plain = 0  # rounds
        self._plain_wanted = _FIRST_PLAIN
        self._is_sure = False
        self._measures = True
        self._way: RiverSource | None = None
        self._is_plain = False
        self._draft_steps = 0.0  # of this round

    @property
    def speed_up(self) -> float:
        """Of the last rounds over plain decoding, 1 at least."""
        return max(1.0, self._tokens / self._plain_tokens) if self._plain_tokens else 1.0

    # ---- before a round ----

    def begin_round(self, growing: int) -> None:
        """So many sequences go on."""
        self._growing = growing
        self._since_plain += 1
        self._draft_steps = 0.0
        self._way = self._choose_way()
        self._is_plain = self._fixed_length is None and self._wants_plain_round()
        if self._is_plain:
            self._since_plain = 0
        self._measures = self._is_plain or not self._is_sure or self._rounds % _MEASURED == 0

    @property
    def way(self) -> RiverSource | None:
        """What drafts in this round; None where the river doesn't."""
        return None if self._is_plain else self._way

    def ngram_length(self, match: int, most: int) -> int:
        """How many tokens to draft out of the text after a match of this length; 0 where that isn't
        worth its time, or less than the river's draft is."""
        if self._is_plain or not (self._ngram_account.allows or self._fixed_length):
            return 0
        if self._fixed_length is None:
            most = min(most, self._ngram_account.affords(self._cost_of_row()))
        count, value = self._ngrams.best_length(match, most, self._cost_of_rows, self.speed_up)
        if value <= (self._way.worth(self.speed_up) if self._way else 0):
            return 0
        return most if self._fixed_length else count

    @property
    def most_drafted(self) -> int:
        """How many tokens a draft of the river may have in this round, by what it may lose."""
        if self._fixed_length is not None or self._way is None:
            return MOST_DRAFTED
        step = self._in_tokens(self._costs.drafted(self._way.way, self._growing)) / self._growing
        return self._river_account.affords(step + self._cost_of_row())

    def rule(self, lm_head_bits: int, stop_tokens: frozenset[int]) -> DraftRule:
        """When a draft of this round's way ends."""
        way = self._way
        assert way is not None
        least: tuple[float, ...] = (0.0,)
        if self._fixed_length is None:
            row = self._cost_of_row()
            chance = max(way.chances.mean(), 1e-3)
            prices = (
                self.speed_up * (self._in_tokens(self._costs.drafted(way.way, count)) / count + row)
                for count in range(1, self._growing + 1)
            )
            least = tuple(min(0.999, price / chance) for price in prices)
        return DraftRule(
            exit_layer=way.exit_layer,
            vocabulary=way.vocabulary,
            lm_head_bits=lm_head_bits,
            least_chances=least,
            chances=way.chances.all(),
            stop_tokens=stop_tokens,
        )

    def _choose_way(self) -> RiverSource | None:
        """The way whose drafts bring most; each has its trials, and others a turn. None while none
        pays."""
        first = self._ways[0]
        if self._fixed_length is None and not self._river_account.allows:
            return None
        if first.drafts < _TRIALS:  # others are tried where the first one pays
            return first
        fewest = min(self._ways, key=lambda way: way.drafts)
        if fewest.drafts < _TRIALS or self._drafts % _TRIED_AGAIN == _TRIED_AGAIN - 1:
            return fewest
        return max(self._ways, key=lambda way: way.speed_up)

    def _wants_plain_round(self) -> bool:
        if self._plain_wanted > 0:
            self._plain_wanted -= 1
            return True
        if self._since_plain < _SHORTEST:
            return False
        return not self._is_sure or self._since_plain >= _LONGEST

    # ---- after a round ----

    def note_draft_time(self, lengths: Sequence[int], seconds: float) -> None:
        """This round's way took so long for drafts of these lengths, made together."""
        assert self._way is not None
        self._drafts += 1
        longest = max(lengths)
        together = [sum(length > place for length in lengths) for place in range(longest)]
        if self._measures:
            self._costs.note_draft(self._way.way, together, seconds)
        self._draft_steps = sum(self._costs.drafted(self._way.way, count) for count in together)

    def note_round(self, guesses: Sequence[Guess], accepted: Sequence[int], seconds: float) -> None:
        """The verification of these guesses, one for each sequence that goes on, took so long and
        accepted so many tokens of each."""
        drafted = sum(len(guess.tokens) for guess in guesses)
        rows = self._growing + drafted
        self._rounds += 1
        if self._measures:
            self._costs.note_verification(rows, seconds)
            if drafted > 0:
                self._is_sure = self._costs.uncertainty(rows, self._growing) < _CERTAIN
        kept = 1 - 1 / _ROUNDS
        tokens = self._growing + sum(accepted)
        for account in (self._river_account, self._ngram_account):
            account.note_tokens(tokens / self._growing)
        self._tokens = kept * self._tokens + tokens
        self._plain_tokens = kept * self._plain_tokens + self._growing
        if drafted == 0:
            self._since_plain = 0
            return
        cost_of_rows = self._cost_of_rows(drafted)
        cost_of_draft = self._in_tokens(self._draft_steps)
        self._plain_tokens += cost_of_rows + cost_of_draft
        for guess, count in zip(guesses, accepted, strict=True):
            if guess.match:
                self._ngrams.note(guess.match, len(guess.tokens), count)
            elif guess.tokens and self._way is not None:
                self._way.note_margins(guess.margins, count)
        for is_ngram in (False, True):
            of_source = [
                (len(guess.tokens), count)
                for guess, count in zip(guesses, accepted, strict=True)
                if guess.tokens and (guess.match > 0) == is_ngram
            ]
            if not of_source:
                continue
            cost = cost_of_rows * sum(length for length, _ in of_source) / drafted
            gained = sum(count for _, count in of_source)
            if is_ngram:
                self._ngram_account.note_draft((gained - cost) / self._growing)
            elif self._way is not None:
                cost += cost_of_draft
                self._river_account.note_draft((gained - cost) / self._growing)
                self._way.note_draft(gained / len(of_source), cost / len(of_source))

    def _cost_of_rows(self, drafted: int) -> float:
        """Of verifying so many drafted tokens, in tokens."""
        plain = self._costs.rows(self._growing)
        return self._in_tokens(max(0.0, self._costs.rows(self._growing + drafted) - plain))

    def _cost_of_row(self) -> float:
        """Of one drafted token in a verification of usual size."""
        drafted = _USUAL * self._growing
        return self._cost_of_rows(drafted) / drafted

    def _in_tokens(self, steps: float) -> float:
        """How many tokens plain decoding gives in this time."""
        return steps * self._growing / self._costs.rows(self._growing)

    # ---- from run to run ----

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        return {
            "speed_up": round(self.speed_up, 3),
            "credit": {
                "river": self._river_account.kept(),
                "ngrams": self._ngram_account.kept(),
            },
            "costs": self._costs.to_dict(),
            "ngrams": self._ngrams.chances.to_dict(),
            "river": {way.name: way.to_dict() for way in self._ways},
        }

    def restore(self, learnt: Any) -> None:
        """Begin with what another run has learnt. After an error this is good for nothing.

        Raises:
            KeyError, TypeError, ValueError: it can't be read.
        """
        self._plain_wanted = 1
        speed_up = number_within(learnt["speed_up"], 1, 1 + MOST_DRAFTED)
        self._tokens, self._plain_tokens = _RESTORED_TOKENS * speed_up, _RESTORED_TOKENS
        self._costs.restore(learnt["costs"])
        self._ngrams.chances.restore(learnt["ngrams"])
        for way in self._ways:
            if way.name in learnt["river"]:
                way.restore(learnt["river"][way.name])
        self._river_account.restore(learnt["credit"]["river"])
        self._ngram_account.restore(learnt["credit"]["ngrams"])
