"""RiverConfig: how the exit river is quantised."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from river_llm.errors import ConfigError

Quantizer = Literal["hqq", "rtn"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


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
        if self.group_size not in GROUP_SIZES:
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


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)
