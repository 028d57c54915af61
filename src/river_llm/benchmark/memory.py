"""How much memory backbone, river and offloading take, by the system's own account.

Each arm runs in a process of its own, so that nothing of another one is counted, and starts from
packed weights in a file, as an everyday start does. The context is not computed: its keys and
values are zeros (`CpuEngine.lengthen`), which take the memory and the time of any others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from river_llm.engines import CpuEngine
from river_llm.errors import RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.memory import peak_memory_bytes, resident_memory_bytes
from river_llm.packed_copy import read_engine, write_engine
from river_llm.residency import OffloadConfig

_DESCRIPTION = "engine.json"
_SETTLING_TOKENS = 8  # before memory and speed are read
_Step = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class MemoryArm:
    """What one process holds and runs.

    Attributes:
        name: in tables.
        exit_layer: backbone layers of every token.
        resident_layers: that are in memory; None: all.
        with_river: whether the river is.
    """

    name: str
    exit_layer: int
    resident_layers: int | None = None
    with_river: bool = True


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """What one arm took at one length of context.

    Attributes:
        arm, context: which, in tokens.
        tokens_per_second: of decoding at that length, arms in turn.
        steady_bytes: resident memory of the process after some tokens at that length.
        peak_bytes: the most since the process began.
        base_bytes: resident memory of the process before it held anything of the model: Python and
            its libraries.
        expected_bytes: weights, keys and values that the arm should hold, by arithmetic.
        misses: layers that had to be read back meanwhile.
    """

    arm: str
    context: int
    tokens_per_second: float
    steady_bytes: int
    peak_bytes: int
    base_bytes: int
    expected_bytes: int
    misses: int

    @property
    def held_bytes(self) -> int:
        """Resident memory without Python and its libraries."""
        return self.steady_bytes - self.base_bytes


def memory_arms(num_layers: int, exit_layer: int, bits: int) -> list[MemoryArm]:
    """Backbone, full quantisation, and River at a fixed depth without and with offloading."""
    return [
        MemoryArm("backbone", num_layers, with_river=False),
        MemoryArm(f"full {bits}-bit", 0, 0),
        MemoryArm(f"exit after {exit_layer}", exit_layer),
        MemoryArm(f"exit after {exit_layer}, offloaded", exit_layer, exit_layer),
    ]


def keep_weights(engine: CpuEngine, directory: Path) -> None:
    """Write what the arms' processes start from."""
    description = write_engine(directory, engine)
    (directory / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def measure_memory(
    directory: Path,
    arms: Sequence[MemoryArm],
    contexts: Sequence[int],
    new_tokens: int,
    rounds: int,
    threads: int,
    step_done: _Step,
) -> list[MemoryResult]:
    """Run the arms in turn at each length, the shortest first, in one process for each arm.

    Args:
        directory: where `keep_weights` wrote.
        contexts: tokens in the cache.
        new_tokens: that are decoded in each round.
        rounds: of all arms in turn at each length; the speed is their median.
        step_done: called with (steps done, steps in all).

    Raises:
        RiverError: a process failed, for want of memory for example.
    """
    steps = len(contexts) * (rounds + 1) * len(arms)
    done = 0
    results = []
    with ExitStack() as ending:
        processes = [ending.enter_context(_ArmProcess(directory, arm, threads)) for arm in arms]
        for context in sorted(contexts):
            seen: list[list[dict[str, Any]]] = [[] for _ in arms]
            for _ in range(rounds + 1):  # the first one warms up
                for replies, process in zip(seen, processes, strict=True):
                    replies.append(process.ask(context, new_tokens))
                    done += 1
                    step_done(done, steps)
            for arm, replies in zip(arms, seen, strict=True):
                speed = new_tokens / median(reply.pop("seconds") for reply in replies[1:])
                results.append(MemoryResult(arm.name, context, speed, **replies[-1]))
    return results


class _ArmProcess:
    """A process that holds one arm, and answers with what it takes."""

    def __init__(self, directory: Path, arm: MemoryArm, threads: int) -> None:
        self._name = arm.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._say({"directory": str(directory), "arm": asdict(arm), "threads": threads})

    def __enter__(self) -> _ArmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, context: int, new_tokens: int) -> dict[str, Any]:
        """Decode so many tokens at that length; memory, and the seconds that it took."""
        self._say({"context": context, "new_tokens": new_tokens})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            status = f"status {self._process.returncode}"
            last = errors.strip().rsplit("\n", 1)[-1] or status
            raise RiverError(f"{self._name} could not be measured: {last}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has failed, which the next answer says
            pass


def _serve(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """In the arm's own process: what it takes, for each message after the first."""
    task = next(messages)
    arm = MemoryArm(**task["arm"])
    directory = Path(task["directory"])
    torch.set_num_threads(task["threads"])
    description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
    offload = None
    if arm.resident_layers is not None:
        offload = OffloadConfig("layers", layers=arm.resident_layers)
    base = resident_memory_bytes()
    engine, _ = read_engine(
        directory,
        description,
        ExitPolicy.fixed(arm.exit_layer),
        task["threads"],
        offload,
        with_river=arm.with_river,
    )
    weights = sum(engine.layer_bytes[: engine.resident_layers]) + engine.rest_bytes
    if not arm.with_river:
        weights -= description["rest_bytes"] - engine.head_bytes - _embedding_bytes(engine)
    token = torch.zeros(1, dtype=torch.long)
    for message in messages:
        engine.truncate(0)
        engine.lengthen(message["context"])
        for _ in range(_SETTLING_TOKENS):
            token = engine.decode(token).best_tokens
        start = time.perf_counter()
        for _ in range(message["new_tokens"]):
            token = engine.decode(token).best_tokens
        yield {
            "seconds": time.perf_counter() - start,
            "steady_bytes": resident_memory_bytes(),
            "peak_bytes": peak_memory_bytes(),
            "base_bytes": base,
            "expected_bytes": weights + engine.cache_bytes,
            "misses": engine.offload_statistics.misses,
        }


def _embedding_bytes(engine: CpuEngine) -> int:
    return 0 if engine.embedding is None else int(engine.embedding.nbytes)


if __name__ == "__main__":
    for found in _serve(map(json.loads, sys.stdin)):
        print(json.dumps(found), flush=True)
