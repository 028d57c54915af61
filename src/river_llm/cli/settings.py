"""The settings that options name: exit policy, sampling, river."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.cli.options import (
    DraftHeadBits,
    PolicyName,
    PrefillName,
    QuantizerName,
)
from river_llm.cli.usage import usage_error
from river_llm.config import (
    DraftConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from river_llm.exit_policy import ExitPolicy
    from river_llm.residency import OffloadConfig


def exit_policy(
    policy: PolicyName | None,
    threshold: float | None,
    exit_layer: int | None,
    first_layer: int,
    prefill: PrefillName | None,
) -> ExitPolicy | None:
    """The policy that the options name; None: lossless mode.

    Raises:
        typer.Exit: they contradict each other, or one is out of its range.
    """
    from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy

    if threshold is not None and exit_layer is not None:
        raise usage_error("give --threshold or --exit-layer, not both")
    if policy is None and threshold is None and exit_layer is None:
        if first_layer != 1 or prefill is not None:
            name = "--prefill" if first_layer == 1 else "--first-layer"
            raise usage_error(
                f"{name} goes with an exit policy: --policy, --threshold or --exit-layer"
            )
        return None
    implied = PolicyName.fixed if exit_layer is not None else PolicyName.similarity
    kind = policy or implied
    if threshold is not None and kind != PolicyName.similarity:
        raise usage_error(f"--threshold goes with --policy similarity, not {kind.value}")
    if exit_layer is not None and kind != PolicyName.fixed:
        raise usage_error(f"--exit-layer goes with --policy fixed, not {kind.value}")
    if first_layer != 1 and kind != PolicyName.similarity:
        raise usage_error(f"--first-layer goes with --policy similarity, not {kind.value}")
    rules = {} if prefill is None else {"prefill": prefill.value}
    try:
        if kind == PolicyName.never:
            return ExitPolicy.never(**rules)
        if kind == PolicyName.always:
            return ExitPolicy.always(**rules)
        if kind == PolicyName.fixed:
            if exit_layer is None:
                raise usage_error("--policy fixed needs --exit-layer N")
            return ExitPolicy.fixed(exit_layer, **rules)
        tau = DEFAULT_THRESHOLD if threshold is None else threshold
        return ExitPolicy.similarity(tau, first_layer, **rules)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def draft_config(
    policy: ExitPolicy | None,
    tokens: int | None,
    exit_layer: int | None,
    lm_head_bits: DraftHeadBits | None,
    ngram: bool | None,
) -> DraftConfig | None:
    """How lossless mode drafts; None with a policy.

    Raises:
        typer.Exit: an option has no meaning with a policy, or is out of its range.
    """
    if policy is not None:
        given = (tokens, exit_layer, lm_head_bits, ngram)
        if any(value is not None for value in given):
            raise usage_error("the draft options go with lossless mode: leave the exit policy out")
        return None
    bits = None if lm_head_bits is None else int(lm_head_bits.value)
    try:
        return DraftConfig(tokens, exit_layer or 0, bits, ngram is not False)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def offload_config(
    offload: str | None, no_miss: bool, policy: ExitPolicy | None
) -> OffloadConfig | None:
    """Which backbone layers stay in memory; None: all.

    Raises:
        typer.Exit: it can't be read, or the options contradict each other.
    """
    from river_llm.residency import OffloadConfig

    try:
        config = None if offload is None else OffloadConfig.parse(offload, no_miss)
    except ConfigError as error:
        raise usage_error(f"--{error}") from error
    if no_miss and config is None:
        raise usage_error("--no-miss goes with --offload N or --offload SIZE")
    if no_miss and policy is None:
        raise usage_error(
            "--no-miss keeps tokens from the whole backbone: give --threshold or --exit-layer"
        )
    return config


def sampling_config(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> SamplingConfig:
    """The sampling settings that the options name.

    Raises:
        typer.Exit: one is out of its range.
    """
    try:
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
    except ConfigError as error:
        raise usage_error(str(error)) from error


def template_variables(given: str | None) -> dict[str, Any]:
    """Further variables of the chat template, from a JSON object.

    Raises:
        typer.Exit: it is none.
    """
    if given is None:
        return {}
    try:
        variables = json.loads(given)
    except ValueError as error:
        raise usage_error(f"--chat-template-kwargs is no JSON ({error})") from error
    if not isinstance(variables, dict):
        raise usage_error("--chat-template-kwargs is no JSON object; give {...}")
    return variables


def new_river_config(bits: int, group_size: int, quantizer: QuantizerName) -> RiverConfig:
    """How to build a river.

    Raises:
        typer.Exit: a setting is out of its range.
    """
    try:
        return RiverConfig(bits, group_size, quantizer.value)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def river_config(
    river: Path | None, bits: int, group_size: int, quantizer: QuantizerName
) -> Path | RiverConfig:
    """The folder of a saved river, or how to build one.

    Raises:
        typer.Exit: both are given, or a setting is out of its range.
    """
    config = new_river_config(bits, group_size, quantizer)
    if river is None:
        return config
    if config != RiverConfig():
        raise usage_error("--river brings its own --bits, --group-size and --quantizer")
    return river
