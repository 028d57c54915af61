"""An engine without a model: what it says depends on every token of a sequence and on how deep each
of them ran, as a KV cache would have it, so a token too many or one left by a draft shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from river_llm.engines.drafting import Choose, Draft, DraftRule, draft_step_by_step
from river_llm.engines.step import Step, StepResult, check_room, check_tokens
from river_llm.exit_policy import ExitPolicy

VOCABULARY = 97
NUM_LAYERS = 4


class ToyEngine:
    """An `Engine` whose rows are hashed.

    Attributes:
        steps: that it has run.
        unlikeness: of the logits of rows that left the backbone, to those that didn't.
        broken: the logits after this token are NaN.
        fails: the next step is cut short.
    """

    name = "toy"
    num_layers = NUM_LAYERS
    vocab_size = VOCABULARY
    device = torch.device("cpu")
    kv_bits = 16
    setting = "toy"
    rope_boundary = None

    def __init__(
        self, context_length: int | None = 64, prefill_rows: int | None = 8, unlikeness: float = 0.5
    ) -> None:
        self.context_length, self.prefill_rows = context_length, prefill_rows
        self.unlikeness = unlikeness
        self.steps: list[Step] = []
        self.broken: int | None = None
        self.fails: type[BaseException] | None = None
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
        self._check(step)
        self.steps.append(step)
        exit_layers, logits = [], []
        means = list(step.mean_groups) or list(range(len(step.tokens)))
        minima = list(step.minimum_groups) or list(range(len(step.tokens)))
        for row, (token, sequence) in enumerate(zip(step.tokens, step.sequences, strict=True)):
            thresholds = step.thresholds if step.thresholds.ndim == 1 else step.thresholds[row]
            group = (means[row], minima[row])  # stands for all of its rows
            exit_layers.append(self._exit_layer(group, token, step, thresholds))
            self._rows[sequence].append((token, exit_layers[-1]))
            if row in step.logit_rows:
                logits.append(self._logits(self._rows[sequence]))
        return StepResult(
            torch.from_numpy(np.stack(logits or [np.zeros(0)])), torch.tensor(exit_layers)
        )

    def _check(self, step: Step) -> None:
        check_tokens(step.tokens, VOCABULARY)
        for sequence in set(step.sequences):
            new = list(step.sequences).count(sequence)
            check_room(self.length(sequence) + new, self.context_length)
        if self.fails is not None:
            failure, self.fails = self.fails, None
            raise failure

    def _exit_layer(self, group: Any, token: int, step: Step, thresholds: torch.Tensor) -> int:
        grouped = bool(step.mean_groups or step.minimum_groups)
        similarity = _random(hash(group) if grouped else token).random()
        leaves = (layer for layer, least in enumerate(thresholds.tolist()) if similarity > least)
        if bool((thresholds == -math.inf).any()):
            return int((thresholds == -math.inf).int().argmax())
        return next(leaves, NUM_LAYERS)

    def _logits(self, rows: list[tuple[int, int]]) -> np.ndarray:
        token, exit_layer = rows[-1]
        if token == self.broken:
            return np.full(VOCABULARY, np.nan, np.float32)
        own = _random(hash(tuple(rows))).standard_normal(VOCABULARY)
        shared = 4 * _random(hash(tuple(token for token, _ in rows[-2:]))).standard_normal(
            VOCABULARY
        )
        likeness = 0.5 if exit_layer == NUM_LAYERS else 0.5 + 4 * self.unlikeness
        return np.asarray(shared + likeness * own, np.float32)


class DraftingEngine(ToyEngine):
    """The same, with drafts in one call."""

    draft_head_bits = (8, 16)
    draft_vocabularies = (VOCABULARY,)

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

        def decode(going: list[int], last: list[int]) -> torch.Tensor:
            step = Step(last, [sequences[i] for i in going], thresholds, range(len(going)))
            return self.forward(step).logits

        lengths = [self.length(sequence) for sequence in sequences]
        try:
            arguments = (tokens, most, rule) if choose is None else (tokens, most, rule, choose)
            return draft_step_by_step(decode, *arguments)
        finally:
            for sequence, length in zip(sequences, lengths, strict=True):
                self.truncate(sequence, length)


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed % 2**32)
