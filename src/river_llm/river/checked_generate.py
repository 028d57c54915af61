"""The `generate` of a model with a river on it: what it can't do is refused by name.

A prompt and its answer leave the backbone by different rules. `transformers` has modes whose passes
hold tokens of both, so that neither rule is right; its plain modes read the prompt first
(`_prefill`) and decode then, a token of each sequence at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import TYPE_CHECKING, Any

from river_llm.errors import RiverError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_WAY_OUT = (
    'let RiverLM draft (mode="lossless"), take a policy that treats prompt and answer alike, or '
    "call detach_river(model) first"
)


# Of a mode that isn't known by name.
MIXED_PASS = (
    "this mode of generate() runs several tokens at once behind those in the KV cache, of "
    f"which the river can't know whether they are a prompt's; {_WAY_OUT}"
)


def checked_generate(
    model: PreTrainedModel,
    treats_alike: Callable[[], bool],
    marked: Callable[[], AbstractContextManager[None]],
) -> Callable[..., Any]:
    """The model's `generate`, which refuses modes that mix prompt and answer in a pass.

    Args:
        treats_alike: whether the exit policy does so with prompt and answer; then all modes are
            right.
        marked: a context that says that it runs, and lets one thread in at a time.

    Raises (when called):
        RiverError: the arguments, their `generation_config` or the model's ask for such a mode.
    """
    generate = model.generate

    @wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not treats_alike():
            given = inspect.signature(generate).bind(*args, **kwargs).arguments
            settings = {**given, **given.get("kwargs", {})}
            _check_settings(settings, given.get("generation_config"), model.generation_config)
        with marked():
            return generate(*args, **kwargs)

    return checked


def checked_batching(
    model: PreTrainedModel, treats_alike: Callable[[], bool]
) -> Callable[..., Any]:
    """What starts the model's continuous batching, whose passes hold tokens of all sequences.

    Args:
        treats_alike: see `checked_generate`.

    Raises (when called):
        RiverError: the policy doesn't treat them alike.
    """
    start = model.init_continuous_batching

    @wraps(start)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not treats_alike():
            raise RiverError(
                "continuous batching (generate_batch of transformers) runs tokens of prompts and "
                f"answers in one pass; take RiverLM.generate_batch, or {_WAY_OUT}"
            )
        return start(*args, **kwargs)

    return checked


def _check_settings(settings: dict[str, Any], *configs: Any) -> None:
    def value_of(name: str) -> Any:
        values = [settings.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    for name in _ASSISTED:
        value = value_of(name)
        if value is not None and value is not False:
            raise RiverError(
                f"generate({name}=...) drafts tokens, which the river can't verify by this exit "
                f"policy: its passes hold tokens of prompt and answer; {_WAY_OUT}"
            )
    if value_of("use_cache") is False:
        raise RiverError(
            "generate(use_cache=False) runs the whole text again for every token, so that none "
            f"leaves as an answer's tokens do; take use_cache=True, or {_WAY_OUT}"
        )


def marked_prefill(
    model: PreTrainedModel, marked: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """The model's `_prefill`, within a context that says so."""
    prefill = model._prefill

    @wraps(prefill)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with marked():
            return prefill(*args, **kwargs)

    return inner
