"""Rows of an engine's step: what sequences want of it, as tokens, thresholds and groups."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from river_llm.engines.step import Engine, Step, StepResult
from river_llm.generate.second_look import Again, run_step
from river_llm.river.policy import ExitPolicy


@dataclass(slots=True)
class Part:
    """The rows of one sequence.

    Attributes:
        tokens: that are appended to it.
        thresholds: float32 `[L]`, by which each of them leaves the backbone.
        logits: so many of the last rows go through the LM head.
        leaves_whole: the mean similarity of its rows decides, and not each row's own.
        minimum_groups: of each row, among all parts of the step; empty: each row is on its own.
        second_look: of the last row, where its logits are wanted; see `ExitPolicy`.
        before: what runs again with it.
        first_row, first_logit: where they begin in the step and in its logits.
    """

    sequence: int
    tokens: list[int]
    thresholds: Tensor
    logits: int
    leaves_whole: bool = False
    minimum_groups: Sequence[Hashable] = ()
    second_look: float | None = None
    before: Sequence[int] = ()
    first_row: int = 0
    first_logit: int = 0


def prompt_part(
    sequence: int,
    prompt: Sequence[int],
    start: int,
    count: int,
    policy: ExitPolicy | None,
    num_layers: int,
) -> Part:
    """So many tokens of a prompt, by the prefill rule; None for the policy: they never leave."""
    policy = policy or ExitPolicy.never()
    leaves_whole = runs_whole(policy)
    groups: list[Hashable] = []
    if policy.batch == "minimum":  # whole prompts together, or the tokens as far from their ends
        places = range(len(prompt) - start, len(prompt) - start - count, -1)
        groups = [(policy, "prompt" if leaves_whole else place) for place in places]
    return Part(
        sequence,
        list(prompt[start : start + count]),
        _tensor(policy.prefill_thresholds(num_layers)),
        logits=int(start + count == len(prompt)),
        leaves_whole=leaves_whole,
        minimum_groups=groups,
        second_look=policy.second_look,
    )


def decode_part(
    sequence: int,
    tokens: Sequence[int],
    policy: ExitPolicy | None,
    num_layers: int,
    before: Sequence[int] = (),
) -> Part:
    """Tokens of an answer or a draft, by the policy; None: they never leave. `before` runs again
    with the last."""
    policy = policy or ExitPolicy.never()
    thresholds = _tensor(policy.thresholds(num_layers))
    groups = [policy] * len(tokens) if policy.batch == "minimum" else []
    return Part(
        sequence,
        list(tokens),
        thresholds,
        len(tokens),
        minimum_groups=groups,
        second_look=policy.second_look,
        before=before,
    )


def runs_whole(policy: ExitPolicy | None) -> bool:
    """Whether a prompt has to run in one step: all its tokens leave together."""
    return policy is not None and policy.prefill == "sequence"


def build_step(parts: Sequence[Part]) -> Step:
    """The step of some sequences; each part is told where its rows stand in it."""
    tokens: list[int] = []
    sequences: list[int] = []
    logit_rows: list[int] = []
    means: list[Hashable] = []
    minima: list[Hashable] = []
    for part in parts:
        part.first_row, part.first_logit = len(tokens), len(logit_rows)
        count = len(part.tokens)
        tokens += part.tokens
        sequences += [part.sequence] * count
        rows = range(part.first_row, len(tokens))
        logit_rows += rows[count - part.logits :]
        means += [("sequence", part.sequence)] * count if part.leaves_whole else rows
        minima += part.minimum_groups or rows
    thresholds = parts[0].thresholds
    if any(part.thresholds is not thresholds for part in parts):
        counts = torch.tensor([len(part.tokens) for part in parts])
        of_parts = torch.stack([part.thresholds for part in parts])
        thresholds = of_parts.repeat_interleave(counts, 0)  # [R, L]
    return Step(
        tokens,
        sequences,
        thresholds,
        logit_rows,
        _numbered(means) if any(part.leaves_whole for part in parts) else (),
        _numbered(minima) if any(part.minimum_groups for part in parts) else (),
    )


def run_parts(
    engine: Engine, parts: Sequence[Part], *, keep_logits: bool = True
) -> tuple[StepResult, Again]:
    """Run the step of some sequences, with second looks; see `run_step`."""
    step = build_step(parts)
    of_logits = [part for part in parts for _ in range(part.logits)]
    looks = [part.second_look for part in of_logits]
    before = [part.before for part in of_logits]
    return run_step(engine, step, looks, before, keep_logits=keep_logits)


# ---- one sequence alone ----


@contextmanager
def new_sequence(engine: Engine, prompt_length: int = 0) -> Iterator[int]:
    """A sequence of an engine, for a while."""
    sequence = engine.add_sequence(prompt_length)
    try:
        yield sequence
    finally:
        engine.drop_sequence(sequence)


def prefill(
    engine: Engine, sequence: int, prompt: Sequence[int], policy: ExitPolicy | None
) -> StepResult:
    """Run the rest of a prompt, in parts; what comes of the last one, with the last token's
    logits."""
    most = len(prompt) if runs_whole(policy) else engine.prefill_rows or len(prompt)
    while True:
        start = engine.length(sequence)
        count = min(most, len(prompt) - start)
        part = prompt_part(sequence, prompt, start, count, policy, engine.num_layers)
        result, _ = run_parts(engine, [part])
        if part.logits:
            return result


def decode(
    engine: Engine,
    sequence: int,
    token: int,
    policy: ExitPolicy | None,
    before: Sequence[int] = (),
) -> StepResult:
    """Run one more token; `before`: see `Part`."""
    part = decode_part(sequence, [token], policy, engine.num_layers, before)
    return run_parts(engine, [part])[0]


def _numbered(groups: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


@lru_cache(64)
def _tensor(thresholds: tuple[float, ...]) -> Tensor:
    return torch.tensor(thresholds)
