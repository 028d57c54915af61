"""Rows of an engine's step: what the requests want of it, as tokens, thresholds and groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from river_llm.engines.step import Step
from river_llm.exit_policy import ExitPolicy
from river_llm.generate.request import Request


@dataclass(slots=True)
class Part:
    """The rows of one request.

    Attributes:
        tokens: that are appended to its sequence.
        thresholds: float32 `[L]`, by which each of them leaves the backbone.
        logits: so many of the last rows go through the LM head.
        mean_group: of all rows, whose mean similarity decides; None: each row's own does.
        minimum_groups: of each row, among all parts of the step; empty: each row is on its own.
        first_row, first_logit: where they begin in the step and in its logits.
    """

    request: Request
    tokens: list[int]
    thresholds: Tensor
    logits: int
    mean_group: Hashable = None
    minimum_groups: Sequence[Hashable] = field(default=())
    first_row: int = 0
    first_logit: int = 0


def prompt_part(request: Request, start: int, count: int, num_layers: int) -> Part:
    """So many tokens of a prompt, by the prefill rule."""
    tokens = request.tokens[start : start + count]
    policy = request.policy or ExitPolicy.never()
    leaves_whole = policy.prefill == "sequence"
    groups: list[Hashable] = []
    if policy.batch == "minimum":  # whole prompts together, or the tokens as far from their ends
        places = range(request.prompt_length - start, request.prompt_length - start - count, -1)
        groups = [(policy, "prompt" if leaves_whole else place) for place in places]
    return Part(
        request,
        tokens,
        _prefill_thresholds(policy, num_layers),
        logits=int(start + count == request.prompt_length),
        mean_group=request if leaves_whole else None,
        minimum_groups=groups,
    )


def decode_part(request: Request, drafted: Sequence[int], num_layers: int) -> Part:
    """The last token, by the policy, and what was drafted after it."""
    tokens = [request.tokens[-1], *drafted]
    policy = request.policy or ExitPolicy.never()
    groups = [policy] if policy.batch == "minimum" else []
    thresholds = _thresholds(policy, num_layers)
    return Part(request, tokens, thresholds, logits=len(tokens), minimum_groups=groups)


def runs_whole(policy: ExitPolicy | None) -> bool:
    """Whether a prompt has to run in one step: all its tokens leave together."""
    return policy is not None and policy.prefill == "sequence"


def build_step(parts: Sequence[Part]) -> Step:
    """The step of some requests; each part is told where its rows stand in it."""
    tokens: list[int] = []
    sequences: list[int] = []
    logit_rows: list[int] = []
    means: list[Hashable] = []
    minima: list[Hashable] = []
    for part in parts:
        part.first_row, part.first_logit = len(tokens), len(logit_rows)
        count = len(part.tokens)
        tokens += part.tokens
        assert part.request.sequence is not None
        sequences += [part.request.sequence] * count
        rows = range(part.first_row, len(tokens))
        logit_rows += rows[count - part.logits :]
        means += rows if part.mean_group is None else [part.mean_group] * count
        minima += part.minimum_groups or rows
    counts = torch.tensor([len(part.tokens) for part in parts])
    thresholds = parts[0].thresholds
    if any(part.thresholds is not thresholds for part in parts):
        of_parts = torch.stack([part.thresholds for part in parts])
        thresholds = of_parts.repeat_interleave(counts, 0)  # [R, L]
    return Step(
        tokens,
        sequences,
        thresholds,
        logit_rows,
        _numbered(means) if any(part.mean_group is not None for part in parts) else (),
        _numbered(minima) if any(part.minimum_groups for part in parts) else (),
    )


def _numbered(groups: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


@lru_cache(64)
def _thresholds(policy: ExitPolicy, num_layers: int) -> Tensor:
    return torch.tensor(policy.thresholds(num_layers))


@lru_cache(64)
def _prefill_thresholds(policy: ExitPolicy, num_layers: int) -> Tensor:
    return torch.tensor(policy.prefill_thresholds(num_layers))
