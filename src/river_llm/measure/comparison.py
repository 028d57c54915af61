"""Backbone, full quantisation and River side by side, along one and the same answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from river_llm.engines import Engine
from river_llm.exit_policy import ExitPolicy
from river_llm.measure.bench import Session
from river_llm.measure.rounds import Progress, Spread, interleaved


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant, as `compare_variants` measured it.

    Attributes:
        policy: its exit policy, in words.
        tokens_per_second: of decoding, over the rounds.
        mean_exit_layer: mean number of backbone layers per decoded token.
        agreement: share of the answer's tokens that are this variant's argmax too.
    """

    variant: str
    policy: str
    tokens_per_second: Spread
    mean_exit_layer: float
    agreement: float


def compare_variants(
    engine: Engine,
    prompt: Sequence[int],
    answer: Sequence[int],
    policies: Mapping[str, ExitPolicy],
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[Compared]:
    """Let every policy decode along `answer`, in interleaved rounds.

    Every variant is given the same tokens, so all of them do the same number of steps at the same
    positions, and one wrong token doesn't count again in those after it.

    Args:
        answer: at least two tokens; for `agreement` to mean agreement with the backbone, they have
            to be the backbone's greedy answer.
    """
    session = Session(engine)
    passes: dict[str, list[tuple[float, float, float]]] = {name: [] for name in policies}
    try:
        for order in interleaved(list(policies.items()), rounds):
            for name, policy in order:
                passes[name].append(_follow(session, prompt, answer, policy))
                if progress:
                    progress(sum(map(len, passes.values())), rounds * len(policies))
    finally:
        session.restart()
    compared = []
    for name, policy in policies.items():
        speeds, depths, agreements = zip(*passes[name], strict=True)
        speed = Spread.of(speeds)
        compared.append(
            Compared(name, policy.describe(), speed, median(depths), median(agreements))
        )
    return compared


def _follow(
    session: Session, prompt: Sequence[int], answer: Sequence[int], policy: ExitPolicy
) -> tuple[float, float, float]:
    """(tokens per second, mean exit layer, agreement) of a policy along `answer`."""
    session.restart()
    found = session.prefill(torch.tensor([prompt]), policy)
    layers_run = 0
    start = time.perf_counter()
    for token in answer[:-1]:
        best, exit_layers = session.decode(torch.tensor([token]), policy)
        found.append(int(best))
        layers_run += int(exit_layers)
    seconds, steps = time.perf_counter() - start, len(answer) - 1
    agreed = sum(mine == theirs for mine, theirs in zip(found, answer, strict=True))
    return steps / seconds, layers_run / steps, agreed / len(answer)
