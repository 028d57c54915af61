"""What the results say, in sentences: who is on the frontier, and whether the rule earns its keep.

Accuracies are compared item by item over all tasks together (McNemar's exact test), divergences
from the backbone window by window (a sign-flip test of the mean difference). Each question is put
at several thresholds, so its p-values are corrected by Holm's method.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from river_llm.config import Strategy
from river_llm.evaluation.harness import compare_results
from river_llm.evaluation.result_file import Result
from river_llm.evaluation.statistics import mcnemar
from river_llm.report.arms import ArmKind, strategy_name
from river_llm.report.quality import TaskResults
from river_llm.strategies import STRATEGIES

LEVEL = 0.05
_EXACT_WINDOWS = 12  # up to here all flips of the signs are counted
_DRAWS = 20_000

Measure = Literal["accuracy", "kld"]
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Point:
    """One arm in the plane of speed and quality.

    Attributes:
        kind: of the arm, or its strategy where that is another than the river's.
        speed: tokens per second.
        quality: more is better.
        error: the standard error of the quality; None where it isn't known.
    """

    arm: str
    kind: ArmKind | Strategy
    speed: float
    quality: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """One arm against another on the same items.

    Attributes:
        question: what the other one stands for: ``"fixed depth"``, ``"random routing"``, the name
            of a fully quantised arm or of a strategy.
        measure: of the quality.
        arm, against: their names; the other's may differ between tasks.
        difference: positive where the arm is better; a share of the items, or nats.
        p: two-sided.
        p_adjusted: the same among all contests of its question and measure (Holm).
        depth, other_depth: mean exit depth of the two.
    """

    question: str
    measure: Measure
    arm: str
    against: str
    difference: float
    p: float
    p_adjusted: float
    depth: float
    other_depth: float

    @property
    def verdict(self) -> Verdict:
        """What can be said at the level of 5 %."""
        if self.p_adjusted > LEVEL or self.difference == 0:
            return "undecided"
        return "better" if self.difference > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "verdict": self.verdict}


# ---- numbers ----


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in speed and quality at once, the fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speed, -point.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value that the mean of paired differences is 0: how many ways to give each a sign
    make the mean as large. Exact up to 12 of them, drawn beyond."""
    size = abs(sum(differences)) * (1 - 1e-12)
    if len(differences) <= _EXACT_WINDOWS:
        flips = itertools.product((1, -1), repeat=len(differences))
        sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in flips]
        return sum(abs(one) >= size for one in sums) / len(sums)
    draw = random.Random(0)
    as_large = sum(
        abs(sum(d if draw.random() < 0.5 else -d for d in differences)) >= size
        for _ in range(_DRAWS)
    )
    return (1 + as_large) / (1 + _DRAWS)


def quality(summary: Mapping[str, Any]) -> float | None:
    """Of a task: its accuracy, or minus the mean divergence; None where it has neither."""
    if "accuracy" in summary:
        return float(summary["accuracy"])
    return -float(summary["mean_kld"]) if "mean_kld" in summary else None


def quality_error(summary: Mapping[str, Any]) -> float | None:
    """The standard error of `quality`; None where it isn't known, as of a single item."""
    error = summary.get("standard_error" if "accuracy" in summary else "mean_kld_error")
    return None if error is None else float(error)


def mean_accuracy(tasks: Sequence[TaskResults]) -> dict[str, float]:
    """Of each arm that answered all tasks that have answers: the mean over these."""
    answered = _with_accuracy(tasks)
    if not answered:
        return {}
    common = [arm for arm in answered[0].results if all(arm in one.results for one in answered)]
    return {
        arm: sum(one.summary(arm)["accuracy"] for one in answered) / len(answered) for arm in common
    }


def mean_accuracy_errors(tasks: Sequence[TaskResults]) -> dict[str, float | None]:
    """The standard errors of `mean_accuracy`: tasks have no items in common."""
    answered = _with_accuracy(tasks)
    found: dict[str, float | None] = {}
    for arm in mean_accuracy(tasks):
        errors = [quality_error(one.summary(arm)) for one in answered]
        known = [error for error in errors if error is not None]
        found[arm] = math.hypot(*known) / len(known) if len(known) == len(errors) else None
    return found


def contests(tasks: Sequence[TaskResults], full_arms: Sequence[str]) -> list[Contest]:
    """Each similarity arm against fixed depth and random routing at its own depth, against the
    fully quantised ones, and against the same threshold under each other strategy."""
    found: list[Contest] = []
    for measure in ("accuracy", "kld"):
        kept = _with_accuracy(tasks) if measure == "accuracy" else _with_divergence(tasks)
        if not kept:
            continue
        arms = [name for name, arm in kept[0].arms.items() if arm.kind == "similarity"]
        questions = {"fixed depth", "random routing"} if kept[0].same_mean else {"fixed depth"}
        strategies = [
            arm.variant.strategy for arm in kept[0].arms.values() if arm.kind == "strategy"
        ]
        for question in [*sorted(questions), *full_arms, *dict.fromkeys(strategies)]:
            rows = [_contest(kept, measure, question, arm) for arm in arms]
            adjusted = holm([row.p for row in rows])
            found += [
                Contest(**{**asdict(row), "p_adjusted": p})
                for row, p in zip(rows, adjusted, strict=True)
            ]
    return found


def _contest(
    tasks: Sequence[TaskResults], measure: Literal["accuracy", "kld"], question: str, arm: str
) -> Contest:
    others = [_opponent(task, question, arm) for task in tasks]
    pairs = [
        (task.results[arm], task.results[other]) for task, other in zip(tasks, others, strict=True)
    ]
    if measure == "accuracy":
        compared = [compare_results(*pair) for pair in pairs]
        items = sum(one["items"] for one in compared)
        wins = sum(one["only_first"] for one in compared)
        losses = sum(one["only_second"] for one in compared)
        difference, p = (wins - losses) / items, mcnemar(wins, losses)
    else:
        differences = [d for pair in pairs for d in _divergence_differences(*pair)]
        difference, p = sum(differences) / len(differences), sign_flip_test(differences)
    return Contest(
        question,
        measure,
        arm,
        ", ".join(dict.fromkeys(others)),
        difference,
        p,
        p,
        *(_mean([one.summary for one in side]) for side in zip(*pairs, strict=True)),
    )


def _opponent(task: TaskResults, question: str, arm: str) -> str:
    same = {"fixed depth": task.same_depth, "random routing": task.same_mean}
    if question in same:
        return same[question][arm]
    threshold = task.arms[arm].policy.threshold
    return strategy_name(question, threshold or 0.0) if question in STRATEGIES else question


def _divergence_differences(first: Result, second: Result) -> list[float]:
    """How much nearer to the backbone the first is, in each window: nats a token."""
    means = [
        {item: sum(record["kld"]) / len(record["kld"]) for item, record in result.items.items()}
        for result in (first, second)
    ]
    return [means[1][item] - means[0][item] for item in sorted(means[0])]


def _mean(summaries: Sequence[Mapping[str, Any] | None]) -> float:
    depths = [summary["mean_exit_layer"] for summary in summaries if summary is not None]
    return float(sum(depths) / len(depths))


def _with_accuracy(tasks: Sequence[TaskResults]) -> list[TaskResults]:
    return [task for task in tasks if "accuracy" in task.summary("backbone")]


def _with_divergence(tasks: Sequence[TaskResults]) -> list[TaskResults]:
    return [task for task in tasks if "mean_kld" in task.summary("backbone")]


# ---- sentences ----


def frontier_sentence(points: Sequence[Point], measure: Measure, where: str = "") -> str:
    """The best arm at each speed; `where` says on what, after a blank. Of many arms the best point
    values are in part luck, so the standard error stands beside them."""
    best = [
        f"{point.arm} ({format_quality(point.quality, measure)}, {point.speed:.0f} tokens/s)"
        for point in frontier(points)
    ]
    beaten = len(points) - len(best)
    rest = f"; of the other arms ({beaten}) each is matched or beaten in both" if beaten else ""
    errors = [point.error for point in points if point.error is not None]
    error = f"; the standard error is up to {_format_error(max(errors), measure)}" if errors else ""
    return (
        f"Best at each speed{where}, {_NAMES[measure]}, the fastest first: {', '.join(best)}{rest}"
        f". By point values{error}."
    )


def rule_sentence(rows: Sequence[Contest]) -> str:
    """Whether the similarity rule beats what stands against it.

    Args:
        rows: of one question and measure.
    """
    first = rows[0]
    at_own = {"fixed depth", "random routing"}
    place = " at its own mean depth" if first.question in at_own else ""
    if first.question in STRATEGIES:
        place = " at the same threshold"
    return (
        f"Similarity against {first.question}{place}, {_NAMES[first.measure]}: {_verdicts(rows)}."
    )


def same_speed_sentence(rows: Sequence[Contest], speeds: Mapping[str, float], full: str) -> str:
    """Whether an arm of the river beats a fully quantised one at that one's own speed.

    Args:
        rows: similarity arms against it, of one measure.
        speeds: how many times as fast each is.
    """
    fast = [row for row in rows if speeds[row.arm] >= 1]
    name = _NAMES[rows[0].measure]
    if not fast:
        ratios = [speeds[row.arm] for row in rows]
        return (
            f"No similarity arm is as fast as {full} ({min(ratios):.2f} to {max(ratios):.2f} times "
            f"its speed), so none beats it at its own speed; {name}: {_verdicts(rows)}."
        )
    verdict = "beats" if any(row.verdict == "better" for row in fast) else "doesn't beat"
    return (
        f"The river {verdict} {full} at its own speed, {name}: of {len(rows)} similarity arms "
        f"{len(fast)} are as fast or faster; {_verdicts(fast)}."
    )


def correlation_sentence(reading: Mapping[str, Any]) -> str:
    """How early similarity predicts the last layer's values."""
    r = reading["early_correlation"]
    found = "can't be told, one of the two doesn't vary" if r is None else f"r = {r:.2f}"
    return (
        f"Mean similarity in layers 1 to {reading['early_layers']} against the value cosine of the "
        f"last layer: {found} ({reading['tokens']} tokens; the paper reports 0.55)."
    )


def format_quality(value: float, measure: Measure) -> str:
    """An accuracy in per cent, or a divergence."""
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"KLD {-value:.4f}"


def _format_error(error: float, measure: Measure) -> str:
    return f"{100 * error:.1f} points" if measure == "accuracy" else f"{error:.4f} nats"


def format_difference(contest: Contest) -> str:
    """With its sign: points, or nats."""
    if contest.measure == "accuracy":
        return f"{100 * contest.difference:+.1f} points"
    return f"{contest.difference:+.4f} nats"


_NAMES: dict[Measure, str] = {"accuracy": "by accuracy", "kld": "by divergence from the backbone"}


def _verdicts(rows: Sequence[Contest]) -> str:
    parts = []
    for verdict in ("better", "worse"):
        own = [row for row in rows if row.verdict == verdict]
        listed = "; ".join(
            f"{row.arm} {format_difference(row)}, p = {row.p_adjusted:.2g}" for row in own
        )
        parts.append(f"{verdict} at {len(own)} of {len(rows)}" + (f" ({listed})" if own else ""))
    undecided = sum(row.verdict == "undecided" for row in rows)
    return ", ".join([*parts, f"no difference shown at {undecided}"])
