"""What a setting is: a field with its help and its check, which a class of them validates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar, cast

from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, infinities and NaN too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a setting may be: a test, and the same in words ("it must be ...")."""

    test: Callable[[Any], bool]
    words: str


def whole(least: int, most: int | None = None) -> Allowed:
    """A whole number from `least` on."""
    words = f"a whole number, {least} or more"
    if most is None:
        return Allowed(lambda value: is_whole_number(value) and least <= value, words)
    words = f"a whole number from {least} to {most}"
    return Allowed(lambda value: is_whole_number(value) and least <= value <= most, words)


def number(test: Callable[[float], bool], words: str) -> Allowed:
    """A real number for which `test` holds."""
    return Allowed(lambda value: is_number(value) and test(value), words)


def one_of(*values: Any) -> Allowed:
    """One of these, and of their type."""
    return Allowed(
        lambda value: any(value == one and type(value) is type(one) for one in values),
        "one of " + ", ".join(map(str, values)),
    )


def setting(
    default: _T,
    help: str,
    allowed: Allowed | None = None,
    *,
    daily: bool = False,
    option: tuple[str, ...] = (),
) -> _T:
    """A field of a settings class.

    Args:
        help: one sentence, which the command line shows.
        allowed: what it may be beside None, where that is the default; None: anything.
        daily: the command line doesn't list it under "Advanced".
        option: its names on the command line, if not its own; an empty string: it has none there.
    """
    metadata = {"help": help, "allowed": allowed, "advanced": not daily, "option": option}
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the settings: frozen dataclasses whose fields are made by `setting`."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), one.metadata["allowed"]
            if allowed is None or (value is None and one.default is None) or allowed.test(value):
                continue
            raise ConfigError(f"{one.name} is {value!r}; it must be {allowed.words}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From names and values.

        Raises:
            ConfigError: a name is unknown, or a value out of its range.
        """
        (made,) = split_settings(values, cls)
        return cast("Self", made)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def split_settings(values: Mapping[str, Any], *kinds: type[Settings]) -> tuple[Any, ...]:
    """An object of each class, out of names and values that are its fields.

    Raises:
        ConfigError: a name is a field of none of them, or a value is out of its range.
    """
    names = [[one.name for one in fields(kind)] for kind in kinds]
    known = [name for of_kind in names for name in of_kind]
    for name in values:
        if name not in known:
            raise ConfigError(f"there is no setting {name!r}; there are {', '.join(known)}")
    return tuple(
        kind(**{name: values[name] for name in of_kind if name in values})
        for kind, of_kind in zip(kinds, names, strict=True)
    )
