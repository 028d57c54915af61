"""Which strategy runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from river_llm.config import Strategy
from river_llm.engines.choice import EngineChoice
from river_llm.engines.weight_packer import check_weights
from river_llm.errors import ConfigError
from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy
from river_llm.strategies.engine import StrategyEngine
from river_llm.strategies.kv_mask import KVMask
from river_llm.strategies.kv_recompute import KVRecompute
from river_llm.strategies.kv_strategy import KVStrategy, NoExit
from river_llm.strategies.monotonic_exit import MonotonicExit
from river_llm.strategies.state_propagation import StatePropagation
from river_llm.strategies.without_river import refused_offloading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# those without a river; the others are the river's engines, with one policy or any
STRATEGIES: dict[str, type[KVStrategy]] = {
    strategy.name: strategy
    for strategy in (KVMask, KVRecompute, StatePropagation, MonotonicExit, NoExit)
}


def default_policy(strategy: Strategy) -> ExitPolicy:
    """When tokens leave unless one says otherwise."""
    if strategy == "quantised":
        return ExitPolicy.always()
    if strategy == "none":
        return ExitPolicy.never()
    return ExitPolicy.similarity(DEFAULT_THRESHOLD)


def check_strategy(
    strategy: Strategy,
    policy: ExitPolicy | None,
    engine: EngineChoice,
    has_river: bool,
    has_8_bits: bool,
    kv_bits: int = 16,
    has_offload: bool = False,
) -> None:
    """Refuse settings that don't go with a strategy, before anything is loaded.

    Args:
        policy: None where it wasn't given.
        has_river: whether a river was given, or how to build one.
        has_8_bits: whether weights beside the river are to be in 8 bits.
        kv_bits: of the KV cache.
        has_offload: whether backbone layers are to be evicted.

    Raises:
        ConfigError: there is no such strategy, or one of the settings is not for it.
    """
    if strategy not in get_args(Strategy):
        names = ", ".join(get_args(Strategy))
        raise ConfigError(f"strategy is {strategy!r}; choose one of {names}")
    if strategy == "river":
        return
    if engine == "cpu":
        raise ConfigError(
            f"the strategy {strategy} is for the torch engine; take --engine torch, or auto"
        )
    if has_8_bits:
        raise ConfigError(
            "8-bit weights beside the river are for the native engine, "
            f"and the strategy {strategy} is for the torch engine"
        )
    if strategy in STRATEGIES and has_river:
        raise ConfigError(f"the strategy {strategy} has no river; leave the river out")
    if strategy in STRATEGIES and kv_bits == 8:
        raise ConfigError(
            f"the strategy {strategy} keeps its KV cache in the model's dtype; leave the 8 bits out"
        )
    if strategy in STRATEGIES and has_offload:
        raise ConfigError(refused_offloading(strategy))
    if policy is not None:
        check_policy(strategy, policy)


def check_policy(strategy: Strategy, policy: ExitPolicy) -> None:
    """See that tokens can leave so with a strategy.

    Raises:
        ConfigError: they can't.
    """
    if strategy in STRATEGIES:
        STRATEGIES[strategy].check_policy(policy)
    elif strategy == "quantised" and policy != ExitPolicy.always():
        raise ConfigError(
            "the strategy quantised runs every token through the exit layers alone, so it goes "
            "with no exit policy but always; leave the policy out"
        )


def make_strategy_engine(
    model: PreTrainedModel, strategy: Strategy, policy: ExitPolicy | None = None
) -> StrategyEngine:
    """The engine of a strategy without a river, on a model that this call takes over.

    Args:
        policy: when tokens leave; by default as `default_policy` says.

    Raises:
        ConfigError: the strategy has a river, or the policy is not for it or for the model.
        UnsupportedModelError: the strategy can't work on the model.
        RiverError: there is a river or another strategy on the model.
    """
    if strategy not in STRATEGIES:
        names = ", ".join(STRATEGIES)
        raise ConfigError(f"the strategy {strategy!r} is none of {names}")
    check_weights(model)
    return StrategyEngine(model, STRATEGIES[strategy], policy or default_policy(strategy))
