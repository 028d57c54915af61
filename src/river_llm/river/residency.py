"""Which backbone layers stay in memory.

Most tokens leave the backbone early, so its deep layers lie idle. The first layers stay, those
behind them are evicted and come back, one after the other, when a token goes that deep: a miss.
The river, the LM head and the embedding always stay. What is kept where is the engines' business;
here is only how many layers stay, and what misses have cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy
from river_llm.settings import is_whole_number
from river_llm.sizes import format_bytes

OffloadKind = Literal["auto", "layers", "budget"]

_MEBI = 2**20
_CHOICES = "give off, auto, a number of layers that stay, or a size such as 2GiB"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i?)b", re.IGNORECASE)
_MISSED_SHARE = 0.01  # of tokens, that `auto` lets go deeper than the layers that stay
_FIRST_LOOK, _LOOK_EVERY = 32, 16  # tokens
_MEMORY = 512  # tokens that exit depths are remembered for, about


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """What a user asks for; None in place of it keeps every layer in memory.

    Attributes:
        kind: ``"layers"``: the first `layers` stay. ``"budget"``: as many as fit in `max_bytes`
            together with the river, the LM head and the embedding. ``"auto"``: as many as hardly a
            token goes beyond, by the exit depths seen so far; all of them before any was seen.
        no_miss: a token that would go deeper than the layers that stay leaves behind the last of
            them, the prompt's tokens too.

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: OffloadKind
    layers: int | None = None
    max_bytes: int | None = None
    no_miss: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(OffloadKind):
            kinds = ", ".join(get_args(OffloadKind))
            raise ConfigError(f"offloading is by {self.kind!r}; choose one of {kinds}")
        if self.kind == "layers" and not (is_whole_number(self.layers) and self.layers >= 0):
            raise ConfigError(
                f"offloading keeps {self.layers!r} layers; it must be a whole number, 0 or more"
            )
        if self.kind == "auto" and self.no_miss:
            raise ConfigError(
                "how many layers auto keeps is learnt from misses; with no_miss give a number of "
                "layers or a size"
            )
        if self.kind == "budget" and not (is_whole_number(self.max_bytes) and self.max_bytes >= 1):
            raise ConfigError(
                f"a memory budget of {self.max_bytes!r} bytes; it must be a whole number, 1 or more"
            )

    @classmethod
    def of(
        cls, offload: OffloadConfig | str | int | None, no_miss: bool = False
    ) -> OffloadConfig | None:
        """From ``off``, ``auto``, a number of layers, or a size such as ``2GiB`` or ``800MB``.

        Raises:
            ConfigError: it is none of them, or there is nothing that `no_miss` could go with.
        """
        if isinstance(offload, str):
            offload = cls._parse(offload.strip(), no_miss)
        elif is_whole_number(offload):
            offload = cls("layers", layers=offload, no_miss=no_miss)
        elif offload is not None and not isinstance(offload, OffloadConfig):
            raise ConfigError(f"offload is {offload!r}; {_CHOICES}")
        if no_miss and (offload is None or not offload.no_miss):
            raise ConfigError("no_miss goes with offload: a number of layers that stay, or a size")
        return offload

    @classmethod
    def _parse(cls, text: str, no_miss: bool) -> OffloadConfig | None:
        if text.lower() == "off":
            return None
        if text.lower() == "auto":
            return cls("auto", no_miss=no_miss)
        if text.isdecimal():
            return cls("layers", layers=int(text), no_miss=no_miss)
        size = _SIZE.fullmatch(text)
        if size is None:
            raise ConfigError(f"offload is {text!r}; {_CHOICES}")
        power = 1 + "kmgt".index(size[2].lower())
        max_bytes = int(float(size[1]) * (1024 if size[3] else 1000) ** power)
        return cls("budget", max_bytes=max_bytes, no_miss=no_miss)


class ResidencyPlan:
    """How many of the first backbone layers stay, and for ``auto``, how that changes.

    Attributes:
        config: what was asked for.
        resident: layers that stay now.
        num_layers: L, layers in all.
        layer_bytes: of each layer's weights.
        fixed_bytes: of the weights that always stay.
    """

    def __init__(
        self,
        config: OffloadConfig,
        layer_bytes: Sequence[int],
        fixed_bytes: int,
        policy: ExitPolicy,
    ) -> None:
        """
        Raises:
            ConfigError: the model has fewer layers, or the budget doesn't even hold what always
                stays.
        """
        self.config = config
        self.layer_bytes = list(layer_bytes)
        self.num_layers = len(self.layer_bytes)
        self.fixed_bytes = fixed_bytes
        self._depths = [0.0] * (self.num_layers + 1)
        self._seen = 0
        self.resident = self._at_first(policy)

    @property
    def resident_bytes(self) -> int:
        """Of all weights that stay."""
        return self.fixed_bytes + sum(self.layer_bytes[: self.resident])

    def note(self, exit_layers: Iterable[int]) -> bool:
        """Count how deep decoded tokens went; whether the plan has changed."""
        if self.config.kind != "auto":
            return False
        before = self._seen
        for layer in exit_layers:
            self._depths[layer] += 1
            self._seen += 1
        if self._seen < _FIRST_LOOK or self._seen // _LOOK_EVERY == before // _LOOK_EVERY:
            return False
        total = sum(self._depths)
        if total > _MEMORY:
            self._depths = [count * _MEMORY / total for count in self._depths]
        resident = self._deepest_but(_MISSED_SHARE)
        changed = resident != self.resident
        self.resident = resident
        return changed

    def describe(self) -> str:
        """A few words: ``3 of 16 layers stay``."""
        return f"{self.resident} of {self.num_layers} layers stay"

    def _at_first(self, policy: ExitPolicy) -> int:
        config = self.config
        if config.kind == "layers":
            assert config.layers is not None
            if config.layers > self.num_layers:
                raise ConfigError(
                    f"offloading keeps {config.layers} layers, but the model has "
                    f"{self.num_layers}; choose 0 to {self.num_layers}"
                )
            return config.layers
        if config.kind == "budget":
            assert config.max_bytes is not None
            left = config.max_bytes - self.fixed_bytes
            if left < 0:
                least = -(-self.fixed_bytes // _MEBI)
                raise ConfigError(
                    f"a memory budget of {format_bytes(config.max_bytes)}; the river, the LM head "
                    f"and the embedding alone take {format_bytes(self.fixed_bytes)}: give at least "
                    f"{least}MiB"
                )
            resident = 0
            while resident < self.num_layers and self.layer_bytes[resident] <= left:
                left -= self.layer_bytes[resident]
                resident += 1
            return resident
        if policy.second_look is not None:
            return self.num_layers
        # no token goes beyond the first layer after which all of them leave
        thresholds = policy.thresholds(self.num_layers)
        return thresholds.index(-math.inf) if -math.inf in thresholds else self.num_layers

    def _deepest_but(self, share: float) -> int:
        """The smallest depth that at most this share of tokens went beyond."""
        beyond = sum(self._depths)
        allowed = share * beyond
        for depth, count in enumerate(self._depths):
            beyond -= count
            if beyond <= allowed:
                return depth
        return self.num_layers


@dataclass(frozen=True, slots=True)
class OffloadStatistics:
    """What evicted layers have cost.

    Attributes:
        resident_layers: that stay now.
        misses: evicted layers that had to be brought back, each time.
        bytes_read: for that.
        seconds_waited: by the computation, for that.
        depth_capped: tokens that left where the layers that stay end, and would have gone deeper.
    """

    resident_layers: int
    misses: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0
    depth_capped: int = 0

    def since(self, earlier: OffloadStatistics) -> OffloadStatistics:
        """What came after `earlier`."""
        differences = {
            field.name: getattr(self, field.name) - getattr(earlier, field.name)
            for field in fields(self)
            if field.name != "resident_layers"
        }
        return OffloadStatistics(self.resident_layers, **differences)
