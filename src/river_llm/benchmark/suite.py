"""The whole run: every test with every number of threads, and what comes of it as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from river_llm.benchmark.arms import Arm
from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.disturbance import busy_core
from river_llm.benchmark.measure import Round, Spread, measure_rounds, ratio
from river_llm.benchmark.workload import Workload
from river_llm.exit_policy import ExitPolicy

MakeArms = Callable[[int], AbstractContextManager[list[Arm]]]
Progress = Callable[[int, int], None]  # (passes done, passes in all)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        workloads: the tests.
        threads: each test is run with every one of these numbers of threads.
        rounds: that count, after one that warms up.
        disturbed_core: a core to keep busy during as many rounds again; None: no such rounds.
    """

    workloads: Sequence[Workload]
    threads: Sequence[int]
    rounds: int = 5
    disturbed_core: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One arm in one test with one number of threads.

    Attributes:
        arm, engine, policy: see `Arm`.
        rounds: in order.
        ratios: how many times as fast as the backbone and each peer, by their names, round by
            round in this test.
        disturbed: the rounds beside a busy core.
    """

    arm: str
    engine: str
    policy: ExitPolicy | None
    workload: Workload
    threads: int
    rounds: list[Round]
    ratios: dict[str, Spread]
    disturbed: list[Round]

    @property
    def speed(self) -> Spread:
        """Tokens per second."""
        return Spread.of([round_.tokens_per_second for round_ in self.rounds])

    @property
    def bandwidth(self) -> Spread:
        """Bytes per second that the memory gave beside the rounds."""
        return Spread.of([round_.bandwidth for round_ in self.rounds])

    @property
    def bytes_per_token(self) -> float | None:
        """Median over the rounds; None for prompts."""
        return _median([round_.bytes_per_token for round_ in self.rounds])

    @property
    def mean_exit_layer(self) -> float | None:
        """Median over the rounds; None for prompts and peers."""
        return _median([round_.mean_exit_layer for round_ in self.rounds])

    @property
    def limit_fraction(self) -> Spread | None:
        """Of the bandwidth; None for prompts."""
        fractions = [round_.limit_fraction for round_ in self.rounds]
        known = [fraction for fraction in fractions if fraction is not None]
        return Spread.of(known) if known else None

    @property
    def worst_disturbed(self) -> float | None:
        """The slowest round beside a busy core over the quiet median; None if there were none."""
        if not self.disturbed:
            return None
        return min(round_.tokens_per_second for round_ in self.disturbed) / self.speed.median

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every round among them."""
        return {
            "arm": self.arm,
            "engine": self.engine,
            "policy": None if self.policy is None else self.policy.to_dict(),
            "test": self.workload.name,
            "workload": asdict(self.workload),
            "threads": self.threads,
            "tokens_per_second": asdict(self.speed),
            "bandwidth": asdict(self.bandwidth),
            "bytes_per_token": self.bytes_per_token,
            "limit_fraction": None if self.limit_fraction is None else asdict(self.limit_fraction),
            "mean_exit_layer": self.mean_exit_layer,
            "ratios": {name: asdict(spread) for name, spread in self.ratios.items()},
            "rounds": [asdict(round_) for round_ in self.rounds],
            "disturbed_rounds": [asdict(round_) for round_ in self.disturbed],
            "worst_disturbed_over_quiet_median": self.worst_disturbed,
        }


def run_suite(
    make_arms: MakeArms,
    plan: Plan,
    read_bandwidth: ReadBandwidth,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Run the plan; results in the order threads, test, arm, each once its test is done.

    Args:
        make_arms: gives the arms for a number of threads, the backbone first.
    """
    for index, threads in enumerate(plan.threads):

        def passes_done(done: int, total: int, before: int = index) -> None:
            if progress:
                progress(before * total + done, len(plan.threads) * total)

        yield from _run_with_threads(make_arms, plan, threads, read_bandwidth, passes_done)


def _run_with_threads(
    make_arms: MakeArms,
    plan: Plan,
    threads: int,
    read_bandwidth: ReadBandwidth,
    progress: Progress,
) -> Iterator[Result]:
    """Run every test; the arms and their memory are gone after the last result."""
    done = 0

    def round_done(arm: str, number: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with make_arms(threads) as arms:
        passes = 1 + plan.rounds * (1 if plan.disturbed_core is None else 2)
        total = passes * sum(arm.takes(workload) for arm in arms for workload in plan.workloads)
        for workload in plan.workloads:
            taking = [arm for arm in arms if arm.takes(workload)]
            common = (taking, workload, plan.rounds, threads, read_bandwidth)
            quiet = measure_rounds(*common, round_done=round_done)
            disturbed: list[list[Round]] = [[] for _ in taking]
            if plan.disturbed_core is not None:
                with busy_core(plan.disturbed_core):
                    disturbed = measure_rounds(*common, warm_up=0, round_done=round_done)
            yield from _results(taking, workload, threads, quiet, disturbed)


def _results(
    arms: Sequence[Arm],
    workload: Workload,
    threads: int,
    quiet: Sequence[list[Round]],
    disturbed: Sequence[list[Round]],
) -> list[Result]:
    """Each arm's result; the first arm and the peers are what all are compared with."""
    measures = {
        arm.name: rounds
        for index, (arm, rounds) in enumerate(zip(arms, quiet, strict=True))
        if index == 0 or arm.policy is None
    }
    return [
        Result(
            arm.name,
            arm.engine,
            arm.policy,
            workload,
            threads,
            rounds,
            {name: ratio(rounds, others) for name, others in measures.items()},
            disturbed_rounds,
        )
        for arm, rounds, disturbed_rounds in zip(arms, quiet, disturbed, strict=True)
    ]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return Spread.of(known).median if known else None
