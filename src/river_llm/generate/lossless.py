"""Lossless mode: the river drafts, the backbone verifies, the tokens are the backbone's.

    draft    the exit layers, or the text itself, guess how a text goes on
    verify   one step of the backbone over the last token and its draft writes their exact keys and
             values, and says what it would have chosen at each place
    accept   its choices are kept, up to the first that wasn't drafted

Speculative decoding (Leviathan et al. 2023, Chen et al. 2023) with the exit river for a draft model
that shares the backbone's cache. Greedy or sampled, the tokens are those that the backbone gives
alone (`Sampler`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from river_llm.config import DraftConfig
from river_llm.engines.drafting import Draft, DraftRule, argmax_with_margin, draft_step_by_step
from river_llm.engines.step import Drafting, Engine, Step
from river_llm.errors import ConfigError, LogitsError
from river_llm.generate.budget import Budget, StepTimes
from river_llm.generate.events import StepEvent
from river_llm.generate.request import Request
from river_llm.river.policy import ExitPolicy

Source = Literal["river", "ngram"]

MOST_DRAFTED = 6  # tokens of the river
LEAST_MARGIN = 0.5  # below it, drafted tokens aren't worth going on from
MOST_FROM_TEXT = 12
_FROM_TEXT_BY_MATCH = 2  # tokens for each one of the match
_TOKEN_COSTS: dict[Source, float] = {"river": 0.5, "ngram": 0.1}  # guesses, in plain steps


@dataclass(frozen=True, slots=True)
class Guess:
    """What is to be verified of one request."""

    tokens: list[int]
    source: Source


class _Kind(NamedTuple):
    """Of drafts that are counted together."""

    source: Source
    config: DraftConfig
    takes_argmax: bool
    together: int  # requests that step together


def check_drafts(engine: Engine, config: DraftConfig) -> None:
    """Validate that an engine can draft so.

    Raises:
        ConfigError: the model has fewer layers, or the engine no LM head of that width.
    """
    layers = engine.num_layers
    if config.exit_layer > layers:
        raise ConfigError(
            f"the draft's exit layer is {config.exit_layer}, but the model has {layers} layers; "
            f"choose one in [0, {layers}]"
        )
    widths = engine.draft_head_bits if isinstance(engine, Drafting) else (16,)
    if config.lm_head_bits not in (None, *widths):
        raise ConfigError(
            f"the {engine.name} engine has no LM head of {config.lm_head_bits} bits for drafts; "
            f"choose {' or '.join(map(str, widths))}"
        )


def accept(drafted: Sequence[int], choose: Callable[[int], int]) -> list[int]:
    """The text's own tokens at the places of a draft and after it, up to the first that wasn't
    drafted, or to where there is none to be had.

    Args:
        choose: the token at a place, given the draft before it.

    Raises:
        LogitsError: the first one can't be had.
    """
    tokens: list[int] = []
    for place in range(len(drafted) + 1):
        try:
            tokens.append(choose(place))
        except LogitsError:
            if place == 0:
                raise
            break
        if place < len(drafted) and tokens[place] != drafted[place]:
            break
    return tokens


class Speculation:
    """Drafts for an engine's requests in lossless mode, and learns whether that pays."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._times = StepTimes()
        self._budgets: dict[_Kind, Budget] = {}

    def prepare(self, config: DraftConfig) -> None:
        """Make what such drafts need, whose time would be taken for theirs."""
        if isinstance(self._engine, Drafting):
            self._engine.prepare_drafts(config.lm_head_bits or self._engine.draft_head_bits[0])

    # ---- draft ----

    def draft(self, requests: Sequence[Request]) -> dict[Request, Guess]:
        """Guesses at how requests that step together go on, where that is worth its time."""
        is_plain = self._times.wants_plain_step(len(requests))
        guesses: dict[Request, Guess] = {}
        others: dict[_Kind, dict[Request, int]] = defaultdict(dict)
        for request in requests:
            is_adaptive = request.drafts.tokens is None
            if not request.is_lossless or not request.may_draft or (is_adaptive and is_plain):
                continue
            guess = self._from_text(request, len(requests))
            if guess is not None:
                guesses[request] = guess
                continue
            kind = _kind("river", request, len(requests))
            most = self._most(request, kind, MOST_DRAFTED)
            if most > 0:
                others[kind][request] = most
        for kind, of_kind in others.items():
            guesses.update(self._from_river(kind, of_kind))
        return guesses

    def _from_text(self, request: Request, together: int) -> Guess | None:
        if not request.drafts.ngram:
            return None
        most = self._most(request, _kind("ngram", request, together), MOST_FROM_TEXT)
        match, tokens = request.ngrams.continuation(request.tokens, most)
        if request.drafts.tokens is None:
            tokens = tokens[: _FROM_TEXT_BY_MATCH * match]
        return Guess(request.up_to_stop(tokens), "ngram") if tokens else None

    def _from_river(self, kind: _Kind, requests: dict[Request, int]) -> dict[Request, Guess]:
        """Drafts of the exit layers, of so many tokens at most."""
        start = time.perf_counter()
        drafts = _draft(self._engine, kind.config, list(requests), list(requests.values()))
        seconds = time.perf_counter() - start
        self._times.note(kind, seconds / max(len(draft.tokens) for draft in drafts))
        return {
            request: Guess(draft.tokens, "river")
            for request, draft in zip(requests, drafts, strict=True)
        }

    def _most(self, request: Request, kind: _Kind, most: int) -> int:
        """How many tokens to draft for a request."""
        engine = self._engine
        fixed = kind.config.tokens
        most = self._budget(kind).affords(most) if fixed is None else fixed
        length = len(request.tokens) - 1  # in the cache
        if engine.context_length is not None:
            most = min(most, engine.context_length - length - 1)
        if engine.rope_boundary is not None:
            exact = engine.rope_boundary.rows_like_single_steps(length)
            most = most if exact is None else min(most, exact - 1)
        return max(0, min(most, request.tokens_left - 1))

    def _budget(self, kind: _Kind) -> Budget:
        return self._budgets.setdefault(kind, Budget(_TOKEN_COSTS[kind.source]))

    # ---- learn ----

    def learn(self, guesses: dict[Request, Guess], event: StepEvent) -> None:
        """A step after which the guesses were verified."""
        outcomes = event.outcomes
        together = len(outcomes)
        drafted = sum(len(guess.tokens) for guess in guesses.values())
        self._times.note_step(together, together + drafted, event.end - event.drafted_at)
        tokens = sum(len(outcome.tokens) for outcome in outcomes.values())
        for budget in self._budgets.values():
            budget.pay_in(tokens / together)
        plain = self._times.median(together)
        verification = self._times.median(together + drafted)
        if not guesses or plain is None or verification is None:
            return
        of_kinds: dict[_Kind, list[Request]] = defaultdict(list)
        for request, guess in guesses.items():
            of_kinds[_kind(guess.source, request, together)].append(request)
        for kind, requests in of_kinds.items():
            lengths = [len(guesses[request].tokens) for request in requests]
            cost = max(0.0, verification / plain - 1) * sum(lengths) / drafted
            # no more than a step each, whatever held the first ones up
            cost += max(lengths) * min(1.0, (self._times.median(kind) or 0.0) / plain)
            gain = sum(outcomes[request].accepted for request in requests) / together
            self._budget(kind).settle(sum(lengths) / len(lengths), gain, cost)


def _kind(source: Source, request: Request, together: int) -> _Kind:
    return _Kind(source, request.drafts, request.sampler.takes_argmax, together)


def _draft(
    engine: Engine, config: DraftConfig, requests: Sequence[Request], most: Sequence[int]
) -> list[Draft]:
    """What the exit layers guess, of so many tokens at most; the cache stays as it was."""

    def choose(i: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
        text = [*requests[i].tokens, *drafted]
        try:
            return requests[i].sampler.choose_with_margin(text, logits)
        except LogitsError:
            return 0, math.nan  # any guess is one, and this one ends the draft

    takes_argmax = requests[0].sampler.takes_argmax
    tokens = [request.tokens[-1] for request in requests]
    sequences = [request.sequence for request in requests]
    rule = DraftRule(
        exit_layer=config.exit_layer,
        least_margin=LEAST_MARGIN if config.tokens is None else 0.0,
        stop_tokens=frozenset().union(*(request.stop_tokens for request in requests)),
    )
    if isinstance(engine, Drafting):
        rule = replace(rule, lm_head_bits=config.lm_head_bits or engine.draft_head_bits[0])
        return engine.draft(sequences, tokens, most, rule, None if takes_argmax else choose)
    thresholds = torch.tensor(ExitPolicy.fixed(rule.exit_layer).thresholds(engine.num_layers))

    def decode(going: list[int], last: list[int]) -> Tensor:
        of_going = [sequences[i] for i in going]
        step = Step(last, of_going, thresholds, range(len(going)))
        return engine.forward(step).logits

    try:
        by = argmax_with_margin if takes_argmax else choose
        return draft_step_by_step(decode, tokens, most, rule, by)
    finally:
        for request in requests:
            engine.truncate(request.sequence, len(request.tokens) - 1)
