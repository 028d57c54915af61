"""Tokens per second of every arm, in turn along one text, and the time of a token as it grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from river_llm.benchmark.arms import Clock, Timing
from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.measure import Spread, measure_rounds, ratio
from river_llm.benchmark.workload import TokenSource, Workload
from river_llm.engines import Engine
from river_llm.exit_policy import ExitPolicy
from river_llm.report.arms import Arm
from river_llm.report.models import Models, Progress
from river_llm.report.random_routing import with_random_routing

_BUCKETS = 16  # of positions, for the time of a token


class FollowingArm:
    """An arm that decodes along a given text, as every other arm does. See `benchmark.arms.Arm`.

    Attributes:
        times: for each pass the seconds of each of its tokens.
    """

    def __init__(
        self, arm: Arm, engine: Engine, tokens: TokenSource, clock: Clock = time.perf_counter
    ) -> None:
        self.name = arm.name
        self.engine = engine.name
        self.policy: ExitPolicy | None = arm.policy
        self.times: list[list[float]] = []
        self._engine = with_random_routing(engine) if arm.kind == "random" else engine
        self._policy = arm.policy
        self._tokens = tokens
        self._clock = clock

    def takes(self, workload: Workload) -> bool:
        return workload.kind == "decode" and workload.batch == 1

    def prepare(self, workload: Workload) -> None:
        """The backbone writes the context, whatever the arm."""
        self._engine.truncate(0)
        self._engine.policy = ExitPolicy.never()
        self._engine.prefill(self._tokens.take(1, 0, workload.context))
        self._engine.policy = self._policy

    def run(self, workload: Workload) -> Timing:
        text = self._tokens.take(1, workload.context, workload.tokens)
        seconds: list[float] = []
        layers_run = 0
        before = self._clock()
        for place in range(workload.tokens):
            step = self._engine.decode(text[:, place])
            step.best_tokens.tolist()  # on an accelerator: wait for it
            layers_run += int(step.exit_layers[0])
            now = self._clock()
            seconds.append(now - before)
            before = now
        self._engine.truncate(0)
        self.times.append(seconds)
        depth = layers_run / workload.tokens
        return Timing(sum(seconds), workload.tokens, mean_exit_layer=depth)


def measure_speed(
    models: Models,
    arms: Sequence[Arm],
    token_ids: Sequence[int],
    *,
    tokens: int,
    rounds: int,
    threads: int,
    read_bandwidth: ReadBandwidth,
    context: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let every arm decode along the same text in turn, `rounds` times after one that warms up.

    Args:
        arms: the backbone first.
        token_ids: of the text, which is repeated where it is shorter.
        tokens: decoded in each pass.
        threads: that read to find the memory's bandwidth.
        context: tokens of the text that stand before the first decoded one, `SHORT_CONTEXT` at
            least.

    Returns:
        plain JSON values: for each arm its speed, the ratios to the backbone and to each fully
        quantised arm round by round, its mean depth and the time of a token by position.

    Raises:
        ContextFullError: so many tokens don't fit the model's context.
    """
    workload = Workload("decode", tokens, depth=context)
    source = TokenSource(token_ids)
    following = [FollowingArm(arm, models.of(arm).engine, source) for arm in arms]
    done = 0

    def round_done(name: str, number: int) -> None:
        del name, number
        nonlocal done
        done += 1
        if progress:
            progress("speed", done, len(arms) * (rounds + 1))

    measured = measure_rounds(following, workload, rounds, threads, read_bandwidth, 1, round_done)
    for arm in arms:
        models.of(arm).forget_cache()
    measures = {
        arm.name: own
        for arm, own in zip(arms, measured, strict=True)
        if arm.kind in ("backbone", "full")
    }
    found = {}
    for arm, timed, own in zip(arms, following, measured, strict=True):
        depth = own[0].mean_exit_layer
        found[arm.name] = {
            "engine": timed.engine,
            "setting": models.of(arm).engine.setting,
            "tokens_per_second": asdict(Spread.of([one.tokens_per_second for one in own])),
            "rounds": [one.tokens_per_second for one in own],
            "bandwidth": asdict(Spread.of([one.bandwidth for one in own])),
            "ratios": {name: asdict(ratio(own, other)) for name, other in measures.items()},
            "mean_exit_layer": depth,
            **_by_position(timed.times[1:], workload.context),
        }
    return {"context": workload.context, "tokens": tokens, "rounds": rounds, "arms": found}


def _by_position(times: Sequence[Sequence[float]], context: int) -> dict[str, list[float]]:
    """A token's time in each of some equal stretches: the median over passes and positions, and
    beside it the median over passes of the mean over positions, in which a token that takes long
    counts in full."""
    count = len(times[0])
    edges = torch.linspace(0, count, min(_BUCKETS, count) + 1).round().int().tolist()
    stretches = list(pairwise(edges))
    return {
        "positions": [context + (first + end - 1) / 2 for first, end in stretches],
        "seconds_per_token": [
            statistics.median(seconds for one in times for seconds in one[first:end])
            for first, end in stretches
        ],
        "mean_seconds_per_token": [
            statistics.median(statistics.fmean(one[first:end]) for one in times)
            for first, end in stretches
        ],
    }
