"""Lossless decoding: the river drafts, the backbone verifies.

In each round the river guesses how every sequence goes on, one pass of the backbone over all
guesses overwrites their keys and values in the KV cache with its own and says what it would have
chosen at each place, the longest agreeing beginning and one token more are kept, and the rest of
the cache is cut off. Greedy or sampled, the tokens are those that the backbone gives alone
(`Sampler`). Speculative decoding after Leviathan et al. 2023 and Chen et al. 2023, with the exit
layers for a draft model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from river_llm.answer import Answer
from river_llm.config import DraftConfig
from river_llm.engines import Draft, DraftRule, Engine, StepResult
from river_llm.errors import ConfigError
from river_llm.lossless.draft_control import (
    MOST_DRAFTED,
    NgramSource,
    PassCost,
    Rate,
    RiverSource,
    number_within,
)
from river_llm.lossless.ngram_drafts import LONGEST_MATCH, NgramIndex
from river_llm.lossless.statistics import Counter, LosslessStatistics

Origin = Literal["backbone", "river", "ngram"]

_log = logging.getLogger(__name__)

_TRIALS = 8  # drafts of each exit layer before the best one is chosen
_TRIED_AGAIN = 48  # drafts after which another one has a turn


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token of the backbone, and what had guessed it: ``"backbone"`` if nothing had."""

    token: int
    origin: Origin


@dataclass(slots=True)
class _Guess:
    """What one sequence has to be verified."""

    tokens: list[int]
    match: int = 0  # n-gram drafts: length of the match
    river: RiverSource | None = None  # that drafted it, and the margins of its tokens
    margins: Sequence[float] = ()


def check_drafts(engine: Engine, config: DraftConfig) -> None:
    """See that an engine can draft so.

    Raises:
        ConfigError: the model has fewer layers, or the engine no LM head of that width.
    """
    config.check_layers(engine.num_layers)
    widths = engine.draft_head_bits
    if config.lm_head_bits is not None and config.lm_head_bits not in widths:
        raise ConfigError(
            f"the {engine.name} engine has no LM head of {config.lm_head_bits} bits for drafts; "
            f"choose {' or '.join(map(str, widths))}"
        )


class LosslessDecoder:
    """Runs the rounds, and keeps what it learns about drafts from one answer to the next."""

    def __init__(self, engine: Engine, config: DraftConfig) -> None:
        """Raises ConfigError where the engine can't draft so."""
        self.config = config
        self._engine = engine
        self._cost = PassCost()
        self._rate = Rate()
        self._ngrams = NgramSource(LONGEST_MATCH)
        check_drafts(engine, config)
        self._head_bits = config.lm_head_bits or engine.draft_head_bits[0]
        engine.prepare_drafts(self._head_bits)
        layers = (
            sorted({0, round(engine.num_layers / 10)})
            if config.exit_layer is None
            else [config.exit_layer]
        )
        self._rivers = [RiverSource(layer) for layer in layers]
        self._drafts = 0
        self.begin([])

    def begin(self, answers: Sequence[Answer], stop_tokens: frozenset[int] = frozenset()) -> None:
        """New answers, in the order of the engine's sequences; their prompts are in its cache.
        `stop_tokens` end an answer."""
        self._stop_tokens = stop_tokens
        self._answers = list(answers)
        self._counters = [Counter() for _ in answers]
        self._indexes = [NgramIndex() for _ in answers]
        self._cached = [len(answer.token_ids) for answer in answers]  # tokens in the engine's cache
        self._draft_seconds = self._verify_seconds = 0.0

    @property
    def key(self) -> str:
        """Of what is learnt: it holds for this engine and these drafts only."""
        config, engine = self.config, self._engine
        how = getattr(engine, "kernels", str(engine.device))
        return (
            f"{engine.name} {how} head {self._head_bits} exit {config.exit_layer} {config.tokens}"
        )

    def statistics(self) -> list[LosslessStatistics]:
        """So far, of each answer."""
        return [
            counter.statistics(self._draft_seconds, self._verify_seconds)
            for counter in self._counters
        ]

    def round(self) -> list[list[VerifiedToken]]:
        """The next tokens of each answer, one or more; none of those that have ended.

        The last token of every answer isn't in the engine's cache yet, before and after the round.
        """
        engine, answers = self._engine, self._answers
        growing = [answer.finish_reason is None for answer in answers]
        self._forget_ended(growing)
        start = time.perf_counter()
        guesses = self._guess(growing)
        drafted_at = time.perf_counter()
        width = 1 + max(len(guess.tokens) for guess in guesses)
        token_ids = torch.zeros(len(answers), width, dtype=torch.long)
        counts = [
            1 + len(g.tokens) if grows else 0 for g, grows in zip(guesses, growing, strict=True)
        ]
        for i, guess in enumerate(guesses):
            row = [answers[i].token_ids[-1], *guess.tokens]
            token_ids[i, : len(row)] = torch.tensor(row)
        is_ragged = any(count != width for count in counts)
        result = engine.verify(token_ids, counts if is_ragged else None)
        verified = [
            self._accept(i, result, guesses[i].tokens) if growing[i] else []
            for i in range(len(answers))
        ]
        kept = [self._up_to_stop(tokens) for tokens in verified]
        rejected = [count - len(tokens) for count, tokens in zip(counts, kept, strict=True)]
        if any(rejected):
            engine.rewind(rejected)
        for i, tokens in enumerate(kept):
            self._cached[i] += len(tokens)
        end = time.perf_counter()
        self._draft_seconds += drafted_at - start
        self._verify_seconds += end - drafted_at
        agreed = [max(0, len(tokens) - 1) for tokens in verified]  # drafted tokens that are right
        self._learn(guesses, counts, agreed, drafted_at - start, end - drafted_at)
        new = []
        for i, (guess, tokens) in enumerate(zip(guesses, kept, strict=True)):
            if tokens:
                accepted = min(agreed[i], len(tokens))
                self._counters[i].note(len(guess.tokens), accepted, len(tokens), guess.match > 0)
            origins = [_origin(guess)] * agreed[i] + ["backbone"]
            new.append([VerifiedToken(*pair) for pair in zip(tokens, origins, strict=False)])
        return new

    def _forget_ended(self, growing: Sequence[bool]) -> None:
        """Leave one token of each answer that has ended: its length would bind the others."""
        ended = [
            0 if grows else cached - 1 for grows, cached in zip(growing, self._cached, strict=True)
        ]
        if any(ended):
            self._engine.rewind(ended)
            self._cached = [a - b for a, b in zip(self._cached, ended, strict=True)]

    # ---- guessing ----

    def _guess(self, growing: Sequence[bool]) -> list[_Guess]:
        """A draft for every answer that grows, as far as drafts are worth their time."""
        engine, fixed = self._engine, self.config.tokens
        most = [
            min(fixed or MOST_DRAFTED, answer.tokens_left - 1) if grows else 0
            for answer, grows in zip(self._answers, growing, strict=True)
        ]
        if engine.context_length is not None:
            free = engine.context_length - engine.length - 1
            most = [min(count, free) for count in most]
        exact = engine.most_verified()
        if exact is not None:
            most = [min(count, exact - 1) for count in most]
        river = self._choose_river()
        guesses = []
        for i, answer in enumerate(self._answers):
            guess = _Guess([])
            if self.config.ngram and most[i] > 0:
                match, tokens = self._indexes[i].continuation(answer.token_ids, most[i])
                if match:
                    count, value = self._ngrams.best_length(
                        match, len(tokens), self._rate.value, self._cost, sum(growing)
                    )
                    if value > (river.worth if river else 0):
                        guess = _Guess(tokens if fixed else tokens[:count], match)
            guesses.append(guess)
        wanted = [0 if guess.tokens else count for guess, count in zip(guesses, most, strict=True)]
        if river and any(count > 0 for count in wanted):
            drafts = self._draft(river, wanted, sum(growing))
            for guess, draft in zip(guesses, drafts, strict=True):
                if draft.tokens:
                    guess.tokens, guess.margins, guess.river = draft.tokens, draft.margins, river
        return guesses

    def _draft(self, river: RiverSource, most: list[int], growing: int) -> list[Draft]:
        if self.config.tokens is None:
            rule = river.rule(self._head_bits, self._rate.value, self._cost, growing)
        else:
            rule = DraftRule(river.exit_layer, self._head_bits)
        choose = None
        if not self._answers[0].takes_best:

            def choose(i: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
                return self._answers[i].choose_with_margin(logits, drafted)

        start = time.perf_counter()
        last = [answer.token_ids[-1] for answer in self._answers]
        drafts = self._engine.draft(last, most, rule, choose)
        tokens = sum(len(draft.tokens) for draft in drafts)
        river.note_time(tokens, time.perf_counter() - start)
        self._drafts += 1
        return drafts

    def _choose_river(self) -> RiverSource | None:
        """The exit layer whose drafts bring most; each has its trials, and others a turn. None
        while none pays."""
        due = [river for river in self._rivers if river.is_due()]
        if self.config.tokens is not None:
            due = self._rivers
        if not due:
            return None
        fewest = min(due, key=lambda river: river.drafts)
        if self._rivers[0].drafts < _TRIALS and self._rivers[0] in due:
            return self._rivers[0]  # others are tried where the first one pays
        if fewest.drafts < _TRIALS or self._drafts % _TRIED_AGAIN == _TRIED_AGAIN - 1:
            return fewest
        return max(due, key=lambda river: river.worth)

    # ---- verifying ----

    def _accept(self, i: int, result: StepResult, drafted: list[int]) -> list[int]:
        """The backbone's choices up to the first that wasn't drafted."""
        answer = self._answers[i]
        if answer.takes_best:
            best: list[int] = result.best_tokens[i].tolist()
            agreeing = 0
            while agreeing < len(drafted) and drafted[agreeing] == best[agreeing]:
                agreeing += 1
            return best[: agreeing + 1]
        tokens: list[int] = []
        for place in range(len(drafted) + 1):
            tokens.append(answer.choose(result.logits[i, place], drafted[:place]))
            if place < len(drafted) and tokens[place] != drafted[place]:
                break
        return tokens

    def _up_to_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the answer."""
        for place, token in enumerate(tokens):
            if token in self._stop_tokens:
                return tokens[: place + 1]
        return tokens

    # ---- learning ----

    def _learn(
        self,
        guesses: Sequence[_Guess],
        counts: Sequence[int],
        agreed: Sequence[int],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        self._cost.note(sum(counts), verify_seconds)
        growing = sum(map(bool, counts))
        self._rate.note(sum(agreed) + growing, draft_seconds + verify_seconds)
        for guess, accepted in zip(guesses, agreed, strict=True):
            drafted = len(guess.tokens)
            if guess.match:
                self._ngrams.note(guess.match, drafted, accepted)
            elif guess.river is not None:
                guess.river.note_margins(guess.margins, accepted)
                rows = self._cost.more_rows(drafted, growing)
                seconds = drafted * guess.river.token_seconds + rows
                guess.river.note(accepted - self._rate.value * seconds)

    def learnt(self) -> dict[str, Any]:
        """What was learnt about drafts, as plain JSON values, for `restore` in another run."""
        return {
            "rate": round(self._rate.value, 3),
            "verification": self._cost.to_dict(),
            "ngrams": self._ngrams.chances.to_dict(),
            "rivers": {str(river.exit_layer): river.to_dict() for river in self._rivers},
        }

    def restore(self, learnt: dict[str, Any]) -> None:
        """Begin with what another run has learnt; what can't be read is left out."""
        ngrams, cost = NgramSource(LONGEST_MATCH), PassCost()
        rivers = [RiverSource(river.exit_layer) for river in self._rivers]
        try:
            ngrams.chances.restore(learnt["ngrams"])
            cost.restore(learnt["verification"])
            rate = Rate(number_within(learnt["rate"], 0, 1e9))
            for river in rivers:
                if str(river.exit_layer) in learnt["rivers"]:
                    river.restore(learnt["rivers"][str(river.exit_layer)])
        except (KeyError, TypeError, ValueError) as error:
            _log.info("what was learnt about drafts is damaged and is learnt anew: %s", error)
            return
        self._ngrams, self._cost, self._rivers, self._rate = ngrams, cost, rivers, rate


def _origin(guess: _Guess) -> Origin:
    """What the drafted tokens came from."""
    return "ngram" if guess.match else "river"
