"""Rounds A B C, C B A, ..., each beside the bandwidth of its moment; medians, spreads, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from river_llm.benchmark.arms import Arm
from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.turns import in_turn
from river_llm.benchmark.workload import Workload

RoundDone = Callable[[str, int], None]  # (name of the arm, number of the round, 0 is the warm-up)


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of one arm.

    Attributes:
        tokens_per_second: of all sequences together.
        bandwidth: bytes per second that the memory gave, the mean of the readings right before and
            right after.
        bytes_per_token: see `Timing`.
        limit_fraction: bytes that were read each second over the bandwidth; None for prompts. Above
            one where weights stay in a cache that the bandwidth's buffer doesn't fit in.
        mean_exit_layer: see `Timing`.
    """

    tokens_per_second: float
    bandwidth: float
    bytes_per_token: float | None = None
    limit_fraction: float | None = None
    mean_exit_layer: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of the rounds, with the least and the most."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def measure_rounds(
    arms: Sequence[Arm],
    workload: Workload,
    rounds: int,
    threads: int,
    read_bandwidth: ReadBandwidth,
    warm_up: int = 1,
    round_done: RoundDone | None = None,
) -> list[list[Round]]:
    """Let every arm do the workload in turn (`in_turn`), `rounds` times over.

    Args:
        threads: that read to find the bandwidth.
        warm_up: rounds before, which don't count.

    Returns:
        for each arm its rounds, in order.
    """
    results: list[list[Round]] = [[] for _ in arms]
    pairs = list(zip(arms, results, strict=True))
    before = 0.0
    for number, order in enumerate(in_turn(pairs, warm_up + rounds), 1 - warm_up):
        for arm, arm_rounds in order:
            arm.prepare(workload)
            counts = number > 0
            if counts:
                before = read_bandwidth(threads)
            timing = arm.run(workload)
            if counts:
                bandwidth = (before + read_bandwidth(threads)) / 2
                speed = timing.tokens / timing.seconds
                read = timing.bytes_per_token
                fraction = None if read is None else read * speed / bandwidth
                arm_rounds.append(Round(speed, bandwidth, read, fraction, timing.mean_exit_layer))
            if round_done:
                round_done(arm.name, max(number, 0))
    return results


def ratio(rounds: Sequence[Round], others: Sequence[Round]) -> Spread:
    """How many times as fast as the other arm, round by round: both had the same machine then."""
    return Spread.of(
        [
            mine.tokens_per_second / other.tokens_per_second
            for mine, other in zip(rounds, others, strict=True)
        ]
    )
