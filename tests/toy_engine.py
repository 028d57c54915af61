"""An engine without a model. What it says hangs on every token of a sequence and on how deep each
of them ran, as with a KV cache, so a token too many, or one that a draft has left, shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from river_llm.engines.drafting import Choose, Draft, DraftRule, draft_step_by_step
from river_llm.engines.step import Step, StepResult, check_room, check_tokens
from river_llm.river.policy import ExitPolicy

VOCABULARY = 97
NUM_LAYERS = 4


class ToyEngine:
    """An `Engine`; see there.

    Attributes:
        steps: that it has run.
        river_noise: how far the logits of rows that left the backbone are from those of others.
        broken: the logits after this token are no numbers.
        fail: is called before each step.
    """

    name = "toy"
    num_layers = NUM_LAYERS
    vocab_size = VOCABULARY
    device = torch.device("cpu")
    kv_bits = 16
    setting = "toy"
    rope_boundary = None

    def __init__(
        self, context_length: int | None = 64, prefill_rows: int | None = 8, river_noise: float = 3
    ) -> None:
        self.context_length, self.prefill_rows = context_length, prefill_rows
        self.river_noise = river_noise
        self.steps: list[Step] = []
        self.broken: int | None = None
        self.fail: Callable[[], None] = lambda: None
        self._rows: dict[int, list[tuple[int, int]]] = {}  # (token, exit layer) of each sequence

    def add_sequence(self, prompt_length: int = 0) -> int:
        sequence = next(number for number in count() if number not in self._rows)
        self._rows[sequence] = []
        return sequence

    def drop_sequence(self, sequence: int) -> None:
        del self._rows[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        del self._rows[sequence][length:]

    def length(self, sequence: int) -> int:
        return len(self._rows[sequence])

    def sequences(self) -> list[int]:
        return sorted(self._rows)

    def forward(self, step: Step) -> StepResult:
        check_tokens(step.tokens, VOCABULARY)
        for sequence in set(step.sequences):
            new = list(step.sequences).count(sequence)
            check_room(self.length(sequence) + new, self.context_length)
        self.fail()
        self.steps.append(step)
        exit_layers, logits = [], []
        for row, (token, sequence) in enumerate(zip(step.tokens, step.sequences, strict=True)):
            thresholds = step.thresholds if step.thresholds.ndim == 1 else step.thresholds[row]
            exit_layers.append(_exit_layer(token, thresholds))
            self._rows[sequence].append((token, exit_layers[-1]))
            if row in step.logit_rows:
                logits.append(self._logits(self._rows[sequence]))
        found = np.stack(logits) if logits else np.zeros((0, VOCABULARY), np.float32)
        return StepResult(torch.from_numpy(found), torch.tensor(exit_layers))

    def _logits(self, rows: list[tuple[int, int]]) -> np.ndarray:
        token, exit_layer = rows[-1]
        if token == self.broken:
            return np.full(VOCABULARY, np.nan, np.float32)
        by_text = _random(hash(tuple(token for token, _ in rows[-3:])))
        by_cache = _random(hash(tuple(rows)))
        noise = 0.5 if exit_layer == NUM_LAYERS else self.river_noise
        return np.asarray(
            8 * by_text.standard_normal(VOCABULARY) + noise * by_cache.standard_normal(VOCABULARY),
            np.float32,
        )


class DraftingEngine(ToyEngine):
    """The same, with drafts in one call.

    Attributes:
        drafted: tokens of each draft so far.
    """

    draft_head_bits = (8, 16)

    def __init__(self, *args: float, river_noise: float = 3) -> None:
        super().__init__(*args, river_noise=river_noise)  # type: ignore[arg-type]
        self.drafted: list[int] = []

    def prepare_drafts(self, lm_head_bits: int) -> None:
        assert lm_head_bits in self.draft_head_bits

    def draft(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        thresholds = torch.tensor(ExitPolicy.fixed(rule.exit_layer).thresholds(NUM_LAYERS))

        def decode(going: list[int], last: list[int]) -> Tensor:
            step = Step(last, [sequences[i] for i in going], thresholds, range(len(going)))
            result = ToyEngine.forward(self, step)
            self.steps.pop()  # it is none of the backbone's
            return result.logits

        lengths = [self.length(sequence) for sequence in sequences]
        given = (tokens, most, rule) if choose is None else (tokens, most, rule, choose)
        try:
            drafts = draft_step_by_step(decode, *given)
        finally:
            for sequence, length in zip(sequences, lengths, strict=True):
                self.truncate(sequence, length)
        self.drafted += [len(draft.tokens) for draft in drafts]
        return drafts


class Clock(DraftingEngine):
    """The same with a clock of its own: a step takes a second and a bit for each row beyond the
    first, a drafted token a part of a second.

    Attributes:
        now: seconds.
    """

    row, drafted_token = 0.03, 0.4

    def __init__(self, patched: pytest.MonkeyPatch, river_noise: float) -> None:
        super().__init__(None, river_noise=river_noise)  # type: ignore[arg-type]
        self.now = 0.0
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        for name in ("generator", "lossless", "recorder"):
            patched.setattr(f"river_llm.generate.{name}.time", clock)

    def forward(self, step: Step) -> StepResult:
        self.now += 1 + self.row * (len(step.tokens) - 1)
        return super().forward(step)

    def draft(self, *args: object) -> list[Draft]:
        drafts = super().draft(*args)  # type: ignore[arg-type]
        self.now += self.drafted_token * max(len(draft.tokens) for draft in drafts)
        return drafts


def _exit_layer(token: int, thresholds: Tensor) -> int:
    """By similarities that hang on the token alone."""
    similarities = [-math.inf, *_random(token).random(NUM_LAYERS - 1)]
    pairs = enumerate(zip(similarities, thresholds.tolist(), strict=True))
    return next((l for l, (s, t) in pairs if s > t or t == -math.inf), NUM_LAYERS)  # noqa: E741


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed % 2**32)
