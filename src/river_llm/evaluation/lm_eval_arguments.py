"""What `--model_args` and `--gen_kwargs` of lm-eval come to: a loaded model, sampling settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

from river_llm.config import Mode, RiverConfig, SamplingConfig
from river_llm.errors import ConfigError
from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy
from river_llm.load.source import DEFAULT_MODEL
from river_llm.river_lm import RiverLM

DEFAULT_BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 256  # as of lm-eval's own models

_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
_OF_RIVER = ("bits", "group_size", "quantizer")
_OF_POLICY = ("policy", "threshold", "exit_layer", "first_layer", "prefill")
_ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLED = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """The `--model_args` of `river-llm`; None is what wasn't given.

    Attributes:
        pretrained: a model directory, a GGUF file, a Hub id, or ``smollm2``.
        river: the folder of a saved river.
        bits, group_size, quantizer: how a river is built where none is given.
        policy: ``never``, ``always``, ``fixed`` or ``similarity``; implied by the others.
        threshold, first_layer: of ``similarity``.
        exit_layer: of ``fixed``.
        prefill: how prompts of generated answers run, see `ExitPolicy`.
        mode: ``river``, or ``lossless``: the backbone's own likelihoods and tokens.
        engine, device, dtype, threads, backbone_bits, lm_head_bits, kv_bits, trust_remote_code:
            see `RiverLM.from_pretrained`.
        batch_size: how many questions or prompts run together; ``auto`` is 8.
        max_length: the most tokens that the model is given; by default its context.
        chat_template_kwargs: further variables of the chat template, as a JSON object; one with
            several goes into ``--model_args`` that are JSON as a whole.
    """

    pretrained: str = DEFAULT_MODEL
    river: str | None = None
    bits: int | None = None
    group_size: int | None = None
    quantizer: str | None = None
    policy: str | None = None
    threshold: float | None = None
    exit_layer: int | None = None
    first_layer: int | None = None
    prefill: str | None = None
    mode: Mode = "river"
    engine: str = "auto"
    device: str | None = None
    dtype: str = "bfloat16"
    threads: int | None = None
    backbone_bits: int = 16
    lm_head_bits: int = 16
    kv_bits: int = 16
    batch_size: int | str = 1
    max_length: int | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> ModelArguments:
        """Read arguments as lm-eval hands them over; None, and the text ``none``, is not given.

        Raises:
            ConfigError: one is unknown, no number where one is needed, or contradicts another.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(
                f"model_args: unknown {', '.join(unknown)}; there are {', '.join(names)}"
            )
        values = {
            name: _READERS.get(name, _text)(name, value)
            for name, value in given.items()
            if value is not None and str(value).lower() != "none"
        }
        arguments = cls(**values)
        arguments._check()
        return arguments

    @property
    def rows(self) -> int:
        """How many questions or prompts run together."""
        return DEFAULT_BATCH_SIZE if isinstance(self.batch_size, str) else self.batch_size

    def exit_policy(self) -> ExitPolicy:
        """When tokens leave the backbone: never in lossless mode, where the river only drafts.

        Raises:
            ConfigError: a value is out of its range.
        """
        if self.mode == "lossless":
            return ExitPolicy.never()
        rules = {} if self.prefill is None else {"prefill": self.prefill}
        kind = self.policy or ("similarity" if self.exit_layer is None else "fixed")
        if kind == "never":
            return ExitPolicy.never(**rules)
        if kind == "always":
            return ExitPolicy.always(**rules)
        if kind == "fixed":
            assert self.exit_layer is not None
            return ExitPolicy.fixed(self.exit_layer, **rules)
        threshold = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
        return ExitPolicy.similarity(threshold, self.first_layer or 1, **rules)

    def load(self) -> RiverLM:
        """The model with its river and engine.

        Raises:
            RiverError: see `RiverLM.from_pretrained`.
        """
        built = {name: value for name in _OF_RIVER if (value := getattr(self, name)) is not None}
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return RiverLM.from_pretrained(
            self.pretrained,
            self.river or RiverConfig(**built),
            self.exit_policy(),
            _DTYPES[self.dtype],
            device=_device(self.device),
            engine=self.engine,  # type: ignore[arg-type]  # checked there
            threads=self.threads,
            backbone_bits=self.backbone_bits,
            lm_head_bits=self.lm_head_bits,
            kv_bits=self.kv_bits,
            trust_remote_code=self.trust_remote_code,
        )

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def _check(self) -> None:
        _choose("mode", self.mode, get_args(Mode))
        _choose("dtype", self.dtype, tuple(_DTYPES))
        if self.policy is not None:
            _choose("policy", self.policy, ("never", "always", "fixed", "similarity"))
        for name in ("threads", "max_length", "batch_size", "first_layer"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"model_args: {name} is {value}; give 1 or more")
        if self.river is not None and (own := self._given(_OF_RIVER)):
            raise ConfigError(f"model_args: the river brings its own {own[0]}; leave out one")
        if self.mode == "lossless" and (of_policy := self._given(_OF_POLICY)):
            raise ConfigError(
                f"model_args: mode=lossless has no exit policy; leave out {', '.join(of_policy)}"
            )
        if self.threshold is not None and self.exit_layer is not None:
            raise ConfigError("model_args: give threshold or exit_layer, not both")
        for name, kind in (
            ("threshold", "similarity"),
            ("first_layer", "similarity"),
            ("exit_layer", "fixed"),
        ):
            if getattr(self, name) is not None and self.policy not in (None, kind):
                raise ConfigError(f"model_args: {name} goes with policy={kind}, not {self.policy}")
        if self.first_layer is not None and self.exit_layer is not None:
            raise ConfigError("model_args: first_layer goes with threshold, not exit_layer")
        if self.policy == "fixed" and self.exit_layer is None:
            raise ConfigError("model_args: policy=fixed needs exit_layer=N")


def sampling_config(settings: Mapping[str, Any]) -> SamplingConfig:
    """How an answer is generated, by a task's `generation_kwargs`.

    Without ``do_sample``, a ``temperature`` above 0 samples; ``do_sample: false`` is greedy
    whatever the temperature, and ``do_sample: true`` alone samples at temperature 1. What isn't
    given is off, top-k too.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    until = given.pop("until", ())
    stop = [until] if isinstance(until, str) else until
    lengths = [given.pop(name) for name in _ALIASES if name in given]
    temperature = given.pop("temperature", None)
    if not given.pop("do_sample", bool(temperature)):
        temperature = 0.0
    for name, value in _WITHOUT_EFFECT.items():
        if given.get(name) == value:
            del given[name]
    unknown = sorted(set(given) - set(_SAMPLED))
    if unknown:
        known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *_SAMPLED))
        raise ConfigError(
            f"generation_kwargs: {unknown[0]}={given[unknown[0]]!r} is not supported; "
            f"there are {known}"
        )
    sampled: dict[str, Any] = {
        name: (_integer if name in ("top_k", "seed") else _number)(name, value)
        for name, value in given.items()
    }
    return SamplingConfig(
        max_new_tokens=_integer("max_gen_toks", lengths[0]) if lengths else DEFAULT_NEW_TOKENS,
        temperature=1.0 if temperature is None else _number("temperature", temperature),
        stop=tuple(str(one) for one in stop if one),
        **sampled,
    )


def _choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"model_args: {name} is {value!r}; choose one of {', '.join(choices)}")


def _device(name: str | None) -> torch.device | None:
    """The device of that name, seen to be there.

    Raises:
        ConfigError: there is none.
    """
    if name is None:
        return None
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {name!r} here; try device=cpu") from error


def _text(name: str, value: object) -> str:
    return str(value)


def _integer(name: str, value: object) -> int:
    number = _number(name, value)
    if not number.is_integer():  # infinity neither
        raise ConfigError(f"{name} is {value!r}; give a whole number")
    return int(number)


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; give a number") from error


def _flag(name: str, value: object) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"{name} is {value!r}; give true or false")
    return str(value).lower() == "true"


def _object(name: str, value: object) -> dict[str, Any]:
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        given = None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {value!r}; give a JSON object")
    return dict(given)


def _batch_size(name: str, value: object) -> int | str:
    return "auto" if str(value).startswith("auto") else _integer(name, value)


_READERS: dict[str, Any] = {
    "threshold": _number,
    "trust_remote_code": _flag,
    "chat_template_kwargs": _object,
    "batch_size": _batch_size,
    **dict.fromkeys(
        (
            "bits",
            "group_size",
            "exit_layer",
            "first_layer",
            "threads",
            "backbone_bits",
            "lm_head_bits",
            "kv_bits",
            "max_length",
        ),
        _integer,
    ),
}
