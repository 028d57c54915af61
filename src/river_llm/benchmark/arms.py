"""What is timed against each other: an engine with an exit policy, or a peer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from river_llm.benchmark.step_bytes import ModelBytes, step_bytes
from river_llm.benchmark.workload import TokenSource, Workload
from river_llm.engines import Engine
from river_llm.exit_policy import ExitPolicy

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass over a workload.

    Attributes:
        seconds: between the clock's start and stop.
        tokens: of all sequences together.
        bytes_per_token: that decoding had to read, the mean over the pass; None for prompts, whose
            speed isn't the memory's.
        mean_exit_layer: backbone layers of each decoded token; None for prompts and peers.
    """

    seconds: float
    tokens: int
    bytes_per_token: float | None = None
    mean_exit_layer: float | None = None


class Arm(Protocol):
    """One way to run the model.

    Attributes:
        name: what tables call it.
        engine: what computes: ``cpu``, ``torch``, ``transformers``, ``llama.cpp``.
        policy: of a river arm; None for a peer.
    """

    name: str
    engine: str
    policy: ExitPolicy | None

    def takes(self, workload: Workload) -> bool:
        """Whether the workload says something about this arm."""
        ...

    def prepare(self, workload: Workload) -> None:
        """Bring the cache to where the workload begins. Not timed."""
        ...

    def run(self, workload: Workload) -> Timing:
        """Do the workload once."""
        ...


class EngineSession:
    """An engine whose cache several arms share, since they never run at once.

    The context of a workload is filled once, by the backbone, for all of them.
    """

    def __init__(self, engine: Engine, tokens: TokenSource, sizes: ModelBytes) -> None:
        self.engine = engine
        self.tokens = tokens
        self.sizes = sizes
        self._batch = 0

    def fill(self, workload: Workload) -> None:
        """Have exactly the workload's context in the cache."""
        if self._batch != workload.batch or self.engine.length < workload.context:
            self.engine.truncate(0)
            self._batch = workload.batch
        missing = workload.context - self.engine.length
        if missing > 0:
            self.engine.policy = ExitPolicy.never()
            self.engine.prefill(self.tokens.take(workload.batch, self.engine.length, missing))
        else:
            self.engine.truncate(workload.context)


class EngineArm:
    """An engine with an exit policy."""

    def __init__(
        self,
        name: str,
        session: EngineSession,
        policy: ExitPolicy,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.name = name
        self.engine = session.engine.name
        self.policy: ExitPolicy | None = policy
        self._session = session
        self._policy = policy
        self._clock = clock

    def takes(self, workload: Workload) -> bool:
        """A prompt that the policy sends through the backbone is timed as the backbone's alone."""
        through_backbone = self._policy.prefill == "backbone" and self._policy.kind != "never"
        return workload.kind == "decode" or not through_backbone

    def prepare(self, workload: Workload) -> None:
        self._session.fill(workload)
        self._session.engine.policy = self._policy

    def run(self, workload: Workload) -> Timing:
        return self._prompt(workload) if workload.kind == "prompt" else self._decode(workload)

    def _prompt(self, workload: Workload) -> Timing:
        engine = self._session.engine
        prompt = self._session.tokens.take(workload.batch, workload.context, workload.tokens)
        start = self._clock()
        engine.prefill(prompt).best_tokens.tolist()
        return Timing(self._clock() - start, workload.batch * workload.tokens)

    def _decode(self, workload: Workload) -> Timing:
        engine = self._session.engine
        tokens = self._session.tokens.take(workload.batch, workload.context, 1)[:, 0]
        exits: list[Tensor] = []
        start = self._clock()
        for _ in range(workload.tokens):
            step = engine.decode(tokens)
            tokens = step.best_tokens
            exits.append(step.exit_layers)
        tokens.tolist()  # on an accelerator: wait for it
        seconds = self._clock() - start
        exit_layers: list[list[int]] = [layers.tolist() for layers in exits]
        read = sum(
            step_bytes(engine, self._session.sizes, layers, workload.context + index)
            for index, layers in enumerate(exit_layers)
        )
        count = workload.batch * workload.tokens
        return Timing(seconds, count, read / count, sum(map(sum, exit_layers)) / count)
