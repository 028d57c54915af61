"""The arms of a comparison: what runs, and what each is to be held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from river_llm.config import Strategy
from river_llm.evaluation.result_file import Result
from river_llm.exit_policy import ExitPolicy
from river_llm.report.random_routing import RandomRouting

ArmKind = Literal["backbone", "full", "fixed", "similarity", "random", "strategy"]

FULL_BITS = 8  # of the fully quantised model that the river has to beat


@dataclass(frozen=True, slots=True)
class Variant:
    """What has to be loaded for an arm.

    Attributes:
        bits: of the river; None: the river that the user named.
        strategy: what becomes of the K and V of skipped layers.
        engine: what computes; None: what the user named. Strategies beside the river's are for the
            torch engine.
    """

    bits: int | None = None
    strategy: Strategy = "river"
    engine: Literal["torch"] | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: short, good for a file.
        kind: what it is.
        policy: when tokens leave.
        variant: what it runs on.
    """

    name: str
    kind: ArmKind
    policy: ExitPolicy
    variant: Variant = Variant()


BACKBONE = Arm("backbone", "backbone", ExitPolicy.never())


def planned_arms(
    bits: int,
    thresholds: Sequence[float],
    exit_layers: Sequence[int] = (),
    strategies: Sequence[Strategy] = (),
) -> list[Arm]:
    """The arms that are known before anything ran, the backbone first.

    Args:
        bits: of the river.
        thresholds: one arm each, and one for each strategy.
        exit_layers: the same.
        strategies: beside the river's own, as `Variant` has it.
    """
    arms = [BACKBONE, full(bits)]
    if bits != FULL_BITS:
        arms.append(full(FULL_BITS, Variant(bits=FULL_BITS)))
    arms += [fixed(layer) for layer in exit_layers]
    arms += [similarity(threshold) for threshold in thresholds]
    for strategy in strategies:
        variant = Variant(strategy=strategy, engine="torch")
        for layer in exit_layers:
            name = f"{strategy}-exit-{layer}"
            arms.append(Arm(name, "strategy", ExitPolicy.fixed(layer), variant))
        for threshold in thresholds:
            policy = ExitPolicy.similarity(threshold)
            arms.append(Arm(strategy_name(strategy, threshold), "strategy", policy, variant))
    return arms


def full(bits: int, variant: Variant = Variant()) -> Arm:
    """Every layer quantised."""
    return Arm(f"full-{bits}bit", "full", ExitPolicy.always(), variant)


def fixed(exit_layer: int) -> Arm:
    """Every token leaves after so many layers."""
    return Arm(f"exit-{exit_layer}", "fixed", ExitPolicy.fixed(exit_layer))


def similarity(threshold: float) -> Arm:
    """The paper's rule."""
    return Arm(f"similarity-{threshold:g}", "similarity", ExitPolicy.similarity(threshold))


def random_like(arm: Arm, depths: Mapping[int, int], seed: int) -> Arm:
    """Depths are drawn, as often as `arm` had each.

    Args:
        depths: how many tokens of `arm` ran so many backbone layers.
    """
    return Arm(random_name(arm), "random", RandomRouting.like(depths, seed), arm.variant)


def random_name(arm: Arm) -> str:
    """What the random arm of a similarity arm is called."""
    return f"random-{arm.policy.threshold:g}"


def strategy_name(strategy: str, threshold: float) -> str:
    """What the similarity arm of a strategy is called."""
    return f"{strategy}-{threshold:g}"


def on_torch(arm: Arm) -> Arm:
    """The same on the torch engine, to be timed beside the strategies that only it has."""
    return replace(arm, name=f"{arm.name}-torch", variant=replace(arm.variant, engine="torch"))


def fixed_like(depths: Mapping[int, int]) -> Arm:
    """Every token leaves at the whole number of layers nearest to the mean depth."""
    return fixed(round(mean_depth(depths)))


def decided_depths(result: Result) -> dict[int, int]:
    """How many tokens ran so many layers, of those whose exit the policy decided: the first token
    of a generated answer comes from the prompt, which the backbone runs."""
    assert result.summary is not None
    depths = {int(layer): count for layer, count in result.summary["exit_layers"].items()}
    if "form" in result.run and result.run["policy"]["prefill"] == "backbone":
        num_layers = result.summary["num_layers"]
        depths[num_layers] = depths.get(num_layers, 0) - result.summary["items"]
    decided = {layer: count for layer, count in depths.items() if count > 0}
    return decided or {result.summary["num_layers"]: 1}


def mean_depth(depths: Mapping[int, int]) -> float:
    """Mean number of layers of a histogram."""
    return sum(layer * count for layer, count in depths.items()) / sum(depths.values())
