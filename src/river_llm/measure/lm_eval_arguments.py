"""The model that lm-eval's `--model_args` name."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from river_llm.config import Mode, RiverConfig
from river_llm.errors import ConfigError
from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy
from river_llm.load.source import DEFAULT_MODEL
from river_llm.river_lm import RiverLM

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
_OF_RIVER = ("bits", "group_size", "quantizer")
_OF_POLICY = ("policy", "threshold", "exit_layer", "first_layer", "prefill")
_KIND = {"threshold": "similarity", "first_layer": "similarity", "exit_layer": "fixed"}


def load_model(
    pretrained: str = DEFAULT_MODEL, *, mode: Mode = "river", dtype: str = "bfloat16", **given: Any
) -> RiverLM:
    """Load a model with its river; None is what wasn't given.

    Args:
        pretrained: a model directory, a GGUF file, a Hub id, or ``smollm2``.
        mode: in lossless mode tokens never leave, and there is no policy to give.
        **given: `river`, or `bits`, `group_size`, `quantizer`; `policy` (its kind), `threshold`,
            `first_layer`, `exit_layer`, `prefill`; all else as of `RiverLM.from_pretrained`.

    Raises:
        ConfigError: an argument is unknown, out of its range or contradicts another.
        RiverError: see `RiverLM.from_pretrained`.
    """
    own = set(inspect.signature(RiverLM.from_pretrained).parameters)
    known = (own - {"name_or_path", "progress"}) | {*_OF_RIVER, *_OF_POLICY}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"model_args: unknown {', '.join(unknown)}; there are pretrained, mode, dtype, "
            f"max_length, chat_template_kwargs, {', '.join(sorted(known - {'dtype'}))}"
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"model_args: dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
    given = {name: value for name, value in given.items() if value is not None}
    of_river = {name: given.pop(name) for name in _OF_RIVER if name in given}
    of_policy = {name: given.pop(name) for name in _OF_POLICY if name in given}
    river = given.pop("river", None)
    if river is not None and of_river:
        raise ConfigError(f"model_args: the river brings its own {min(of_river)}; leave out one")
    if mode == "lossless" and of_policy:
        names = ", ".join(of_policy)
        raise ConfigError(f"model_args: mode=lossless has no exit policy; leave out {names}")
    policy = ExitPolicy.never() if mode == "lossless" else exit_policy(**of_policy)
    return RiverLM.from_pretrained(
        pretrained, river or RiverConfig(**of_river), policy, _DTYPES[dtype], **given
    )


def exit_policy(policy: str | None = None, **fields: Any) -> ExitPolicy:
    """When tokens leave the backbone.

    Args:
        policy: its kind; implied by the other arguments, which are fields of `ExitPolicy`.

    Raises:
        ConfigError: a field is for another kind, missing or out of its range.
    """
    kind = policy or ("fixed" if "exit_layer" in fields else "similarity")
    for name in fields.keys() & _KIND.keys():
        if _KIND[name] != kind:
            raise ConfigError(f"model_args: {name} goes with policy={_KIND[name]}, not {kind}")
    if kind == "similarity":
        fields.setdefault("threshold", DEFAULT_THRESHOLD)
    if kind == "always":
        return ExitPolicy.always(**fields)
    return ExitPolicy(kind, **fields)  # type: ignore[arg-type]  # validated there
