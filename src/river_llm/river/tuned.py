"""The setting that `river-llm tune` chose for a river, and what it promises; kept in the river's
folder as `tuned.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from river_llm.config import EngineConfig
from river_llm.errors import ConfigError, RiverFileError
from river_llm.river.manifest import TUNED_NAME
from river_llm.river.policy import ExitPolicy
from river_llm.river.river import River
from river_llm.settings import is_number
from river_llm.store import atomic_write

Measure = Literal["kld", "agreement", "speed"]
NamedPolicy = ExitPolicy | Literal["tuned"] | None  # None: lossless mode
WIDTHS = ("backbone_bits", "lm_head_bits", "kv_bits")
_NUMBERS = ("confidence", "sequences", "tokens", "cut_sequences", "loss", "speed_up", "seed")
_FORMAT_VERSION = 1
_AGAIN = "tune it again: river-llm tune MODEL --river DIR --budget kld=0.05"


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """What a user asks for.

    Attributes:
        measure: ``kld``, the mean KL divergence from the backbone at most, in nats a token;
            ``agreement``, the share of tokens that the backbone would have chosen at least; or
            ``speed``, times the backbone's speed at least, for the least divergence.
        value: that number.
    """

    measure: Measure
    value: float

    def __post_init__(self) -> None:
        allowed = {
            "kld": (0 < self.value < 100, "a number of nats above 0, as kld=0.05"),
            "agreement": (
                0 < self.value < 1 and self.loss < 1,
                "a share between 0 and 1, as agreement=0.95",
            ),
            "speed": (1 < self.value < math.inf, "a ratio above 1, as speed=2.0"),
        }
        if not allowed[self.measure][0]:
            raise ConfigError(
                f"the budget is {self.describe()}; {self.measure} takes {allowed[self.measure][1]}"
            )

    @classmethod
    def parse(cls, text: str) -> QualityBudget:
        """``kld=0.05``, ``agreement=0.95``, ``speed=2.0``.

        Raises:
            ConfigError: it is nothing like that, or out of range.
        """
        measure, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if measure not in get_args(Measure) or math.isnan(number):
            raise ConfigError(
                f"the budget is {text!r}; give kld=0.05, agreement=0.95 or speed=2.0, with a "
                "number of your own"
            )
        return cls(measure, number)  # type: ignore[arg-type]

    @property
    def loss(self) -> float:
        """The largest mean loss: a divergence, or a share of tokens."""
        return 1 - self.value if self.measure == "agreement" else self.value

    @property
    def largest_loss(self) -> float:
        """That a sequence can have."""
        return 1.0 if self.measure == "agreement" else math.inf

    def describe(self) -> str:
        """As it is parsed, to the last digit."""
        return f"{self.measure}={float(self.value)!r}".removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen for a river, and how it was measured.

    Attributes:
        policy: the exit policy; None: nothing may leave, so answers are lossless.
        budget: what was asked for, as ``kld=0.05``.
        certified: the same as it was certified: where a speed was asked for, the smallest
            ``kld=`` that the certificate gives. None: nothing was certified, or there is no loss.
        confidence: of the certificate.
        sequences: that certified it.
        tokens: of each sequence or answer, at most.
        cut_sequences: of them, whose loss counted as four times the budget.
        loss: the mean over the sequences that certified it, as the budget measures it.
        held_out_loss: over sequences that had no part in choosing; None without a policy.
        speed_up: times the backbone's speed, median of the rounds.
        data: what the sequences are.
        data_digest: of their tokens, SHA-256.
        seed: of the split.
        widths: bits of backbone, LM head and KV cache, see `WIDTHS`.
        engine: that measured it.
        run: version, processor, date.
    """

    policy: ExitPolicy | None
    budget: str
    certified: str | None
    confidence: float
    sequences: int
    tokens: int
    cut_sequences: int
    loss: float
    held_out_loss: float | None
    speed_up: float
    data: str
    data_digest: str
    seed: int
    widths: Mapping[str, int]
    engine: str
    run: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        policy = None if self.policy is None else self.policy.to_dict()
        return {**asdict(self), "policy": policy}

    @staticmethod
    def check_place(directory: Path) -> None:
        """Validate that there is a river that `save` can write to.

        Raises:
            RiverFileError: there is none, or its folder can't be written to.
        """
        _river_digest(directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise RiverFileError(
                f"{directory} can't be written to, and what is tuned is kept there; copy the river "
                "to another place"
            )

    def save(self, directory: Path) -> None:
        """Write it into a river's folder, whole or not at all.

        Raises:
            RiverFileError: it can't be written, or there is no river.
        """
        described = {
            "format_version": _FORMAT_VERSION,
            "river": _river_digest(directory),
            **self.to_dict(),
        }
        try:
            with atomic_write(directory / TUNED_NAME) as new:
                new.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RiverFileError(f"can't write to {directory / TUNED_NAME}: {error}") from error

    @classmethod
    def load(cls, directory: Path) -> Tuned | None:
        """That of a river's folder; None if it wasn't tuned.

        Raises:
            RiverFileError: it is damaged or of another river, or there is no river.
        """
        path = directory / TUNED_NAME
        river = _river_digest(directory)
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, of_river = values.pop("format_version"), values.pop("river")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise RiverFileError(f"{path} is cut short, or can't be read; {_AGAIN}") from error
        if version != _FORMAT_VERSION:
            raise RiverFileError(
                f"{path} is of format version {version}, this release reads {_FORMAT_VERSION}; "
                + _AGAIN
            )
        if of_river != river:
            raise RiverFileError(f"{path} was made for another river; {_AGAIN}")
        try:
            policy = values.pop("policy")
            tuned = cls(policy=None if policy is None else ExitPolicy.of(policy), **values)
            tuned._check()
        except (ConfigError, TypeError, KeyError, AttributeError) as error:
            raise RiverFileError(f"{path} is damaged ({error}); {_AGAIN}") from error
        return tuned

    def _check(self) -> None:
        QualityBudget.parse(self.budget)
        if not all(is_number(self.widths[name]) for name in WIDTHS):
            raise TypeError("widths")
        for name in _NUMBERS if self.held_out_loss is None else (*_NUMBERS, "held_out_loss"):
            if not is_number(getattr(self, name)):
                raise TypeError(f"{name} is {getattr(self, name)!r}")

    def check_settings(self, config: EngineConfig) -> EngineConfig:
        """Settings with the widths that it was measured with, where they name none.

        Raises:
            ConfigError: they name others.
        """
        standard = EngineConfig()
        for name in WIDTHS:
            given, own = getattr(config, name), self.widths[name]
            if given not in (own, getattr(standard, name)):
                raise ConfigError(
                    f"the river was tuned with {name} {own}, not {given}: leave {name} out, or "
                    "tune the river with it"
                )
        return EngineConfig.of({**config.to_dict(), **{name: self.widths[name] for name in WIDTHS}})

    def describe(self) -> str:
        """One line: what is chosen, and what it promises."""
        if self.policy is None:
            words = "never leave: answers are lossless"
        else:
            words = self.policy.describe()
        line = f"{words}, {self.speed_up:.2f} times the backbone's speed, for {self.budget}"
        if self.certified is None:
            return line
        line += (
            f"; certified {self.certified} with confidence {self.confidence:g} on "
            f"{self.sequences} sequences of {self.data}"
        )
        return line if self.held_out_loss is None else f"{line}; held out {self._held_out()}"

    def _held_out(self) -> str:
        assert self.held_out_loss is not None
        if self.budget.startswith("agreement"):
            return f"agreement={1 - self.held_out_loss:.4g}"
        return f"kld={self.held_out_loss:.4g}"


def chosen_policy(
    policy: NamedPolicy, river: object, config: EngineConfig
) -> tuple[ExitPolicy | None, EngineConfig]:
    """A policy, and the engine's settings that go with it; ``"tuned"`` is what the river was tuned
    to.

    Args:
        river: the folder of a saved river, or what else a river is named by.

    Raises:
        ConfigError: the river wasn't tuned, or for other settings.
        RiverFileError: what was saved is damaged.
    """
    if policy != "tuned":
        return policy, config
    tuned = Tuned.load(Path(river)) if isinstance(river, str | Path) else None
    if tuned is None:
        raise ConfigError(
            "there is no tuned policy: it is saved with a river by `river-llm tune MODEL --river "
            "DIR --budget kld=0.05`, and taken with that river"
        )
    return tuned.policy, tuned.check_settings(config)


def _river_digest(directory: Path) -> str:
    digest: str = River.identity(directory)[1]["tensor_digest"]
    return digest
