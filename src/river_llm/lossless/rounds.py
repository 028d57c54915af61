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

from river_llm.answer import Answer, ended_may_leave
from river_llm.config import DraftConfig
from river_llm.engines import Engine, StepResult
from river_llm.engines.engine import NO_TOKEN
from river_llm.errors import ConfigError, LogitsError
from river_llm.lossless.draft_control import DraftControl, Guess
from river_llm.lossless.ngram_drafts import NgramIndex
from river_llm.lossless.sources import MOST_DRAFTED
from river_llm.lossless.statistics import Counter, LosslessStatistics

Origin = Literal["backbone", "river", "ngram"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token of the backbone, and what had guessed it: ``"backbone"`` if nothing had."""

    token: int
    origin: Origin


def check_drafts(engine: Engine, config: DraftConfig) -> None:
    """See that an engine can draft so.

    Raises:
        ConfigError: the model has fewer layers, or the engine no LM head of that width.
    """
    config.check_fits(engine.num_layers, engine.draft_vocabularies[-1])
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
        check_drafts(engine, config)
        self.config = config
        self._engine = engine
        self._head_bits = config.lm_head_bits or engine.draft_head_bits[0]
        engine.prepare_drafts(self._head_bits)
        self._controls: dict[str, DraftControl] = {}
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
        kind = "greedy" if all(answer.takes_best for answer in answers) else "sampled"
        if len(answers) > 1:
            kind += ", together"
        if kind not in self._controls:
            self._controls[kind] = self._new_control()
        self._control = self._controls[kind]
        self._in_step = self._stay_in_step()

    @property
    def key(self) -> str:
        """Of what is learnt: it holds for this engine and these drafts only."""
        return f"{self._engine.setting}; {self.config} of {self._head_bits} bits"

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
        if self._in_step:
            return self._plain_round()
        answers = self._answers
        going = [i for i, answer in enumerate(answers) if not answer.has_ended]
        self._forget_ended()
        self._control.begin_round(len(going))
        start = time.perf_counter()
        guesses = self._guess(going)
        drafted_at = time.perf_counter()
        verified = self._verify(guesses)
        end = time.perf_counter()
        self._draft_seconds += drafted_at - start
        self._verify_seconds += end - drafted_at
        # drafted tokens that are right, whether or not the answer has ended before
        agreed = [max(0, len(tokens) - 1) for tokens in verified]
        self._control.note_round(
            [guesses[i] for i in going], [agreed[i] for i in going], end - drafted_at
        )
        new = []
        for i, guess in enumerate(guesses):
            tokens = self._up_to_stop(verified[i])
            accepted = min(agreed[i], len(tokens))
            if tokens:
                self._counters[i].note(len(guess.tokens), accepted, len(tokens), guess.match > 0)
            origin: Origin = "ngram" if guess.match else "river"
            origins = [origin] * accepted + ["backbone"]
            new.append([VerifiedToken(*pair) for pair in zip(tokens, origins, strict=False)])
        return new

    def drop(self, answer: int, count: int) -> None:
        """An answer has ended before the last `count` tokens of its round, at a stop string."""
        self._counters[answer].drop(count)

    def _forget_ended(self) -> None:
        """Leave one token of each answer that has ended: its length would bind the others."""
        ended = [
            cached - 1 if answer.has_ended else 0
            for answer, cached in zip(self._answers, self._cached, strict=True)
        ]
        if any(ended):
            self._engine.rewind(ended)
            self._cached = [a - b for a, b in zip(self._cached, ended, strict=True)]

    # ---- answers that can't be of different lengths ----

    def _stay_in_step(self) -> bool:
        """Whether all answers have to grow as they do in plain decoding: where angles change for
        the whole batch by the length of its longest sequence."""
        limit = self._engine.angle_limit
        if limit is None or len(self._answers) < 2:
            return False
        lengths = [len(answer.token_ids) for answer in self._answers]
        longest = max(lengths)
        if not all(limit.is_shared_by(length, longest) for length in lengths):
            return True  # where the longest ends, plain decoding may keep its angles
        return limit.is_crossed(longest, longest + max(a.tokens_left for a in self._answers))

    def _plain_round(self) -> list[list[VerifiedToken]]:
        """One token of each answer without a draft. Those that have ended run along where they do
        so in plain decoding."""
        may_leave = ended_may_leave(self._engine, self._answers)
        if may_leave:
            self._forget_ended()
        start = time.perf_counter()
        last = [[answer.token_ids[-1]] for answer in self._answers]
        counts = [0 if answer.has_ended and may_leave else 1 for answer in self._answers]
        result = self._engine.verify(torch.tensor(last), counts)
        self._cached = [cached + count for cached, count in zip(self._cached, counts, strict=True)]
        new: list[list[VerifiedToken]] = []
        for i, answer in enumerate(self._answers):
            if answer.has_ended:
                new.append([])
                continue
            token = int(result.best_tokens[i]) if answer.takes_best else NO_TOKEN
            if token == NO_TOKEN:  # not known, or there is none: this says why
                token = answer.choose(result.logits[i, 0])
            self._counters[i].note(0, 0, 1, False)
            new.append([VerifiedToken(token, "backbone")])
        self._verify_seconds += time.perf_counter() - start
        return new

    # ---- guessing ----

    def _guess(self, going: Sequence[int]) -> list[Guess]:
        """A draft for every answer that goes on, as far as drafts are worth their time."""
        most = self._most_tokens(going)
        guesses = [Guess() for _ in self._answers]
        if self.config.ngram:
            for i in going:
                guesses[i] = self._guess_from_text(i, most[i])
        wanted = [0 if guess.tokens else count for guess, count in zip(guesses, most, strict=True)]
        if self._control.way is not None and any(wanted):
            self._guess_with_river(guesses, wanted)
        return guesses

    def _most_tokens(self, going: Sequence[int]) -> list[int]:
        """How many tokens of each answer there may be to verify, beside its last one."""
        engine = self._engine
        most = self.config.tokens or MOST_DRAFTED
        if engine.context_length is not None:
            most = min(most, engine.context_length - engine.length - 1)
        if engine.angle_limit is not None:
            exact = engine.angle_limit.rows_like_single_steps(engine.length)
            if exact is not None:
                most = min(most, exact - 1)
        lengths = [0] * len(self._answers)
        for i in going:
            lengths[i] = max(0, min(most, self._answers[i].tokens_left - 1))
        return lengths

    def _guess_from_text(self, i: int, most: int) -> Guess:
        match, tokens = self._indexes[i].continuation(self._answers[i].token_ids, most)
        if not match:
            return Guess()
        tokens = self._up_to_stop(tokens)
        count = self._control.ngram_length(match, len(tokens))
        return Guess(tokens[:count], match) if count else Guess()

    def _guess_with_river(self, guesses: list[Guess], most: Sequence[int]) -> None:
        answers = self._answers
        choose = None
        if not answers[0].takes_best:

            def choose(i: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
                return answers[i].choose_with_margin(logits, drafted)

        rule = self._control.rule(self._head_bits, self._stop_tokens)
        last = [answer.token_ids[-1] for answer in answers]
        start = time.perf_counter()
        if self.config.tokens is None:
            most = [min(count, self._control.most_drafted) for count in most]
        drafts = self._engine.draft(last, most, rule, choose)
        seconds = time.perf_counter() - start
        self._control.note_draft_time([len(draft.tokens) for draft in drafts], seconds)
        for i, draft in enumerate(drafts):
            if draft.tokens:
                guesses[i] = Guess(draft.tokens, margins=draft.margins)

    # ---- verifying ----

    def _verify(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """The backbone's tokens of each answer; only those that it keeps, without the last one, are
        in the engine's cache."""
        answers = self._answers
        width = 1 + max(len(guess.tokens) for guess in guesses)
        rows, counts = [], []
        for answer, guess in zip(answers, guesses, strict=True):
            tokens = [answer.token_ids[-1], *guess.tokens]
            counts.append(0 if answer.has_ended else len(tokens))
            rows.append(tokens + [0] * (width - len(tokens)))
        is_ragged = any(count != width for count in counts)
        result = self._engine.verify(torch.tensor(rows), counts if is_ragged else None)
        try:
            verified = self._choices(result, guesses, counts)
        except LogitsError:
            if width == 1:
                raise
            # a drafted token whose states are no numbers reaches those before it in its pass
            self._engine.rewind(counts)
            return self._verify([Guess()] * len(guesses))
        kept = [len(self._up_to_stop(tokens)) for tokens in verified]
        rejected = [count - length for count, length in zip(counts, kept, strict=True)]
        if any(rejected):
            self._engine.rewind(rejected)
        for i, length in enumerate(kept):
            self._cached[i] += length
        return verified

    def _choices(
        self, result: StepResult, guesses: Sequence[Guess], counts: Sequence[int]
    ) -> list[list[int]]:
        """The tokens of each answer of which so many were verified; see `_choose`."""
        best = result.best_tokens.tolist() if self._answers[0].takes_best else []
        verified: list[list[int]] = []
        for i, guess in enumerate(guesses):
            tokens = _agreeing(best[i], guess.tokens) if best and counts[i] else []
            if counts[i] and not tokens:
                tokens = self._choose(i, result, guess.tokens)
            verified.append(tokens)
        return verified

    def _choose(self, i: int, result: StepResult, drafted: Sequence[int] = ()) -> list[int]:
        """The answer's own choices up to the first that wasn't drafted, or to where there is none
        to be had: the next round says why, if the answer hasn't ended before.

        Raises:
            LogitsError: the first one can't be had.
        """
        tokens: list[int] = []
        for place in range(len(drafted) + 1):
            logits = result.logits[i, place]
            try:
                tokens.append(self._answers[i].choose(logits, list(drafted[:place])))
            except LogitsError:
                if place == 0:
                    raise
                break
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

    def _new_control(self) -> DraftControl:
        config, engine = self.config, self._engine
        if config.exit_layer is None:
            layers = sorted({0, round(engine.num_layers / 10), round(engine.num_layers / 3)})
        else:
            layers = [config.exit_layer]
        vocabularies = (
            engine.draft_vocabularies if config.vocabulary is None else [config.vocabulary]
        )
        ways = [(layer, vocabularies[0]) for layer in layers]
        ways += [(layers[0], vocabulary) for vocabulary in vocabularies[1:]]
        return DraftControl(ways, engine.num_layers, config.tokens)

    def learnt(self) -> dict[str, Any]:
        """What was learnt about drafts, as plain JSON values, for `restore` in another run."""
        return {kind: control.to_dict() for kind, control in self._controls.items()}

    def restore(self, learnt: dict[str, Any]) -> None:
        """Begin with what another run has learnt; what can't be read is left out."""
        for kind, of_kind in learnt.items():
            control = self._new_control()
            try:
                control.restore(of_kind)
            except (KeyError, TypeError, ValueError) as error:
                _log.info("what was learnt about drafts is damaged and is learnt anew: %s", error)
            else:
                self._controls[kind] = control
        self.begin([])


def _agreeing(best: list[int], drafted: Sequence[int]) -> list[int]:
    """The best tokens up to the first that wasn't drafted, without that one if there is none."""
    count = 0
    while count < len(drafted) and drafted[count] == best[count]:
        count += 1
    return best[:count] if best[count] == NO_TOKEN else best[: count + 1]
