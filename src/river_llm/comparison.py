"""Backbone, full quantisation and River side by side, along one and the same answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch

from river_llm.benchmark.turns import in_turn
from river_llm.engines import Engine
from river_llm.exit_policy import ExitPolicy


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One way to run the model, as `compare_arms` measured it.

    Attributes:
        name: what the table calls it.
        policy: its exit policy, in words.
        decode_tokens_per_second: median over the rounds.
        slowest, fastest: the least and the most tokens per second of any round.
        mean_exit_layer: mean number of backbone layers per decoded token.
        agreement: share of the answer's tokens that this arm finds likeliest too.
    """

    name: str
    policy: str
    decode_tokens_per_second: float
    slowest: float
    fastest: float
    mean_exit_layer: float
    agreement: float


def compare_arms(
    engine: Engine,
    prompt: Sequence[int],
    answer: Sequence[int],
    arms: Mapping[str, ExitPolicy],
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[ArmResult]:
    """Let every arm decode along `answer`, in turn, `rounds` times over.

    Every arm is given the same tokens, so all of them do the same number of steps at the same
    positions, and one wrong token doesn't count again in those after it.

    Args:
        answer: at least two tokens; for `agreement` to mean agreement with the backbone, they have
            to be the backbone's greedy answer.
        progress: called with (passes done, passes in all).
    """
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    exit_layers: dict[str, float] = {}
    agreements: dict[str, float] = {}
    policy_before = engine.policy
    try:
        for done, (name, policy) in enumerate(chain(*in_turn(list(arms.items()), rounds)), 1):
            engine.policy = policy
            speed, exit_layers[name], agreements[name] = _follow(engine, prompt, answer)
            speeds[name].append(speed)
            if progress:
                progress(done, rounds * len(arms))
    finally:
        engine.policy = policy_before
        engine.truncate(0)
    return [
        ArmResult(
            name=name,
            policy=policy.describe(),
            decode_tokens_per_second=statistics.median(speeds[name]),
            slowest=min(speeds[name]),
            fastest=max(speeds[name]),
            mean_exit_layer=exit_layers[name],
            agreement=agreements[name],
        )
        for name, policy in arms.items()
    ]


def _follow(
    engine: Engine, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[float, float, float]:
    """(tokens per second, mean exit layer, agreement) of the current policy along `answer`."""
    engine.truncate(0)
    step = engine.prefill(torch.tensor([prompt]))
    agreed = int(int(step.logits[0].argmax()) == answer[0])
    layers_run = 0
    start = time.perf_counter()
    for token, next_token in pairwise(answer):
        step = engine.decode(torch.tensor([token]))
        agreed += int(int(step.logits[0].argmax()) == next_token)
        layers_run += int(step.exit_layers[0])
    steps = len(answer) - 1
    return (
        steps / (time.perf_counter() - start),
        layers_run / steps,
        agreed / len(answer),
    )
