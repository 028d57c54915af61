"""Random routing: each token leaves at a depth that is drawn, so that a rule has something to beat.

The depth is drawn by a hash of the seed and of all tokens so far. So the same text leaves at the
same depths whatever ran before, a run that was cut short goes on as it would have, and a beginning
that stays in the cache is the one that would be computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from river_llm.engines import Engine
from river_llm.engines.engine import StepResult
from river_llm.errors import ConfigError, RiverError
from river_llm.exit_policy import ExitPolicy

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class RandomRouting(ExitPolicy):
    """Each token leaves at a depth drawn from a histogram; for `RandomRoutingEngine` alone.

    Attributes:
        depths: pairs of a number of backbone layers and of how many tokens ran so many.
        seed: of the draws.
    """

    depths: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    @classmethod
    def like(cls, histogram: Mapping[int, int], seed: int) -> RandomRouting:
        """Draws as often from each depth as a histogram has it.

        Raises:
            ConfigError: the histogram is empty.
        """
        depths = tuple((layer, histogram[layer]) for layer in sorted(histogram) if histogram[layer])
        if not depths:
            raise ConfigError("random routing: there are no exit depths to draw from")
        return cls(depths=depths, seed=seed)

    @property
    def mean_depth(self) -> float:
        """Mean number of backbone layers of the histogram."""
        return sum(layer * n for layer, n in self.depths) / sum(n for _, n in self.depths)

    def draw(self, state: bytes) -> int:
        """The depth that belongs to a hash."""
        place = int.from_bytes(state, "little") % sum(n for _, n in self.depths)
        for layer, count in self.depths:
            if place < count:
                return layer
            place -= count
        raise AssertionError("the place lies within the histogram")

    @property
    def has_thresholds(self) -> bool:
        return False

    def thresholds(self, num_layers: int) -> tuple[float, ...]:
        raise ConfigError("random routing has no thresholds; an engine of its own runs it")

    def describe(self) -> str:
        return f"random, mean depth {self.mean_depth:.1f}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "random",
            "depths": [list(pair) for pair in self.depths],
            "seed": self.seed,
            "prefill": self.prefill,
        }


class RandomRoutingEngine:
    """An engine whose policy may be a `RandomRouting` too; then it takes one sequence at a time.

    Each token runs in a pass of its own, as decoding would take it, given texts too: no pass of an
    engine takes a depth for each row. Whatever is not said here is the engine's own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._routing: RandomRouting | None = None
        self._states: list[bytes] = []  # the hash after each token in the cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def policy(self) -> ExitPolicy:
        return self._engine.policy if self._routing is None else self._routing

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        if isinstance(policy, RandomRouting):
            deepest = max(layer for layer, _ in policy.depths)
            ExitPolicy.fixed(deepest).thresholds(self._engine.num_layers)  # or there is no such one
            self._routing = policy
        else:
            self._routing = None
            self._engine.policy = policy

    @property
    def record_similarities(self) -> bool:
        return self._engine.record_similarities

    @record_similarities.setter
    def record_similarities(self, record: bool) -> None:
        self._engine.record_similarities = record

    @property
    def depth_limit(self) -> int | None:
        return self._engine.depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        self._engine.depth_limit = limit

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        """See `Engine`; by the rule ``"token"`` every token has a depth of its own."""
        if self._routing is None:
            return self._engine.prefill(token_ids, padding_mask)
        tokens = self._one_sequence(token_ids, padding_mask)
        if self._routing.prefill == "token":
            for token in tokens:
                step = self._decode(token)
            return step
        self._engine.policy = ExitPolicy.never(prefill=self._routing.prefill)
        step = self._engine.prefill(token_ids)
        for token in tokens:
            self._states.append(self._next_state(token))
        return step

    def decode(self, token_ids: Tensor) -> StepResult:
        """See `Engine`."""
        if self._routing is None:
            return self._engine.decode(token_ids)
        (token,) = self._one_sequence(token_ids.unsqueeze(1), None)
        return self._decode(token)

    def score(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        """See `Engine`."""
        if self._routing is None:
            return self._engine.score(token_ids, counts)
        tokens = self._one_sequence(token_ids, None)
        if counts is not None:
            tokens = tokens[: counts[0]]
        if not tokens:
            raise RiverError("there is nothing to score; give one token or more")
        logits, exit_layers = [], []
        for token in tokens:
            step = self._decode(token)
            logits.append(step.logits.clone())
            exit_layers.append(step.exit_layers)
        return StepResult(torch.stack(logits, 1), torch.stack(exit_layers, 1))

    def rewind(self, counts: Sequence[int]) -> None:
        """See `Engine`."""
        self._engine.rewind(counts)
        self._states = self._states[: self._engine.length]

    def truncate(self, length: int) -> None:
        """See `Engine`."""
        self._engine.truncate(length)
        self._states = self._states[:length]

    def _decode(self, token: int) -> StepResult:
        assert self._routing is not None
        state = self._next_state(token)
        self._engine.policy = ExitPolicy.fixed(self._routing.draw(state))
        step = self._engine.decode(torch.tensor([token]))
        self._states.append(state)
        return step

    def _next_state(self, token: int) -> bytes:
        assert self._routing is not None
        seed = self._routing.seed.to_bytes(_HASH_BYTES, "little", signed=True)
        before = self._states[-1] if self._states else seed
        data = before + token.to_bytes(_HASH_BYTES, "little")
        return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()

    def _one_sequence(self, token_ids: Tensor, padding_mask: Tensor | None) -> list[int]:
        if token_ids.shape[0] != 1 or padding_mask is not None:
            raise ConfigError("random routing takes one sequence at a time; give batch size 1")
        self._states = self._states[: self._engine.length]
        tokens: list[int] = token_ids[0].tolist()
        return tokens


def with_random_routing(engine: Engine) -> Engine:
    """`engine`, whose policy may be a `RandomRouting` too."""
    return cast(Engine, RandomRoutingEngine(engine))
