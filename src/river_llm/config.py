"""What the user sets: how the exit river is quantised, how tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    LogitsFunction = Callable[[Tensor, Tensor], Tensor]

Quantizer = Literal["hqq", "rtn"]
Mode = Literal["river", "lossless"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MIN_TEMPERATURE = 1e-4  # besides 0


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, infinities and NaN too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class RiverConfig:
    """How every linear weight of an exit layer is quantised. Activations stay in 16 bits (W4A16).

    Attributes:
        bits: width of a code: 2, 3, 4, 5, 6 or 8.
        group_size: consecutive inputs of one output row that share a scale and a zero: 32, 64 or
            128. It has to divide the input width of every linear layer.
        quantizer: ``"hqq"`` (half-quadratic quantisation, Badri and Shaji 2023), the paper's
            default, or ``"rtn"`` (round to nearest), the plain reference.

    Raises:
        ConfigError: a value is none of the above.
    """

    bits: int = 4
    group_size: int = 64
    quantizer: Quantizer = "hqq"

    def __post_init__(self) -> None:
        if self.bits not in BITS or not isinstance(self.bits, int):
            raise ConfigError(f"bits is {self.bits!r}; choose one of {_listed(BITS)}")
        if self.group_size not in GROUP_SIZES or not isinstance(self.group_size, int):
            raise ConfigError(
                f"group size is {self.group_size!r}; choose one of {_listed(GROUP_SIZES)}"
            )
        if self.quantizer not in get_args(Quantizer):
            raise ConfigError(
                f"quantizer is {self.quantizer!r}; choose one of {_listed(get_args(Quantizer))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RiverConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is unknown or out of its range.
        """
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown river setting {_listed(sorted(unknown))}")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when generation stops.

    Attributes:
        max_new_tokens: at most this many, the stop token among them.
        temperature: 0 takes the likeliest token (greedy); else from `MIN_TEMPERATURE` (0.0001),
            below which logits divided by it would leave the range of float32.
        top_k: sample among the k likeliest only; 0 for all.
        top_p: sample among the likeliest that hold this share of the probability.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that stand in the text already less likely.
        seed: of the random numbers; sequence i of a batch uses seed + i. None draws a new one.
        stop: a string, or several, that end the text where one first appears; not part of it. None
            is no string.
        processors: more logits processors of `transformers`, or functions like them of (token ids
            `[1, T]`, logits `[1, V]`) that give logits; after the penalty, before the temperature.
            In lossless mode they are asked about drafted text too, so their answer may depend on
            nothing but what they are given.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | str | None = ()
    processors: tuple[LogitsFunction, ...] = ()

    def __post_init__(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        for name in ("stop", "processors"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        ranges = (
            (
                "max_new_tokens",
                is_whole_number(self.max_new_tokens) and self.max_new_tokens >= 1,
                "a whole number, 1 or more",
            ),
            (
                "temperature",
                is_number(self.temperature)
                and (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf),
                f"0 (the likeliest token), or a number, {MIN_TEMPERATURE} or more",
            ),
            (
                "top_k",
                is_whole_number(self.top_k) and self.top_k >= 0,
                "a whole number, 0 (all tokens) or more",
            ),
            ("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
                "above 0 and finite",
            ),
            (
                "processors",
                isinstance(self.processors, tuple) and all(map(callable, self.processors)),
                "functions of (token ids, logits)",
            ),
            (
                "seed",
                self.seed is None or (is_whole_number(self.seed) and 0 <= self.seed < 2**63),
                "a whole number in [0, 2**63)",
            ),
            (
                "stop",
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "a string or several, no empty string",
            ),
        )
        for name, holds, wanted in ranges:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> SamplingConfig:
        """From keyword arguments.

        Raises:
            ConfigError: one of them is unknown or out of its range.
        """
        unknown = [name for name in fields if name not in cls.__dataclass_fields__]
        if unknown:
            raise ConfigError(
                f"there is no setting {unknown[0]!r}; the sampling settings are "
                f"{_listed(cls.__dataclass_fields__)}; those of the chat template go to "
                "chat_template_kwargs"
            )
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """How tokens are guessed in lossless mode. It decides over speed only: whatever is drafted, the
    tokens are the backbone's.

    Attributes:
        tokens: the length of every draft, 1 to 64; None: as long as it is worth its time, by what
            was accepted before.
        exit_layer: backbone layers that a drafted token runs before it leaves; 0: the river alone.
        lm_head_bits: of the LM head that drafts, 16, 8 or 4; None: those that the engine drafts
            best with.
        ngram: draft what followed the last tokens where they stood in the text before, too.

    Raises:
        ConfigError: a value is out of its range.
    """

    tokens: int | None = None
    exit_layer: int = 0
    lm_head_bits: int | None = None
    ngram: bool = True

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens or 1), ("exit_layer", self.exit_layer)):
            if not is_whole_number(value):
                raise ConfigError(f"{name} of drafts is {value!r}; it must be a whole number")
        if self.tokens is not None and not 1 <= self.tokens <= 64:
            raise ConfigError(f"a draft of {self.tokens} tokens; it must have 1 to 64")
        if self.exit_layer < 0:
            raise ConfigError(f"the draft's exit layer is {self.exit_layer}; it must be 0 or more")
        if self.lm_head_bits not in (None, 4, 8, 16):
            raise ConfigError(
                f"the drafts' LM head has {self.lm_head_bits} bits; choose 16, 8 or 4"
            )

    def check_fits(self, num_layers: int) -> None:
        """Validate that the model has the layers that drafts are to run.

        Raises:
            ConfigError: it has fewer.
        """
        if self.exit_layer > num_layers:
            raise ConfigError(
                f"the draft's exit layer is {self.exit_layer}, but the model has {num_layers} "
                f"layers; choose one in [0, {num_layers}]"
            )


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
