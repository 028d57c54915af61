"""Evicted layers in a file, for models on a CPU."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from river_llm.errors import RiverError
from river_llm.memory import own_block
from river_llm.offloading.layer_store import Layout

_Result = TypeVar("_Result")


class FileStore:
    """Layers in a temporary file without a name, which is gone with the store or the process.

    The file is read, not mapped: where a mapped file is cut short, the system kills the process;
    here that is an error. One thread does all reading and writing, so that a layer is read while
    another one is computed, and Ctrl-C cuts nothing in half.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is where the file is; by default where the system has its temporary files.

        Raises:
            RiverError: no file can be made there.
        """
        self.directory = directory or Path(tempfile.gettempdir())
        self.seconds_waited = 0.0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115, it is closed with the store
                dir=self.directory, buffering=0
            )
        except OSError as error:
            raise self._no_room(error) from error
        self._state = self._state_now()
        self._layers: dict[int, tuple[int, Layout]] = {}  # where each begins, and how it lies
        self._end = 0
        self._thread = ThreadPoolExecutor(1, "river-llm-layers")
        self._process = os.getpid()

    def __contains__(self, index: int) -> bool:
        return index in self._layers

    def put(self, index: int, weights: Sequence[Tensor]) -> None:
        self._submit(self._write, index, weights).result()

    def read(self, index: int) -> list[Tensor]:
        return self._submit(self._read, index).result()

    def fetch(self, index: int) -> _Reading:
        return _Reading(self, self._submit(self._read, index))

    def end_pass(self) -> None:
        pass  # a layer's memory goes with its tensors

    def _submit(self, work: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        """Let the thread do it."""
        if os.getpid() != self._process:
            raise RiverError(
                "this process was forked from the one that evicted the layers, and has no thread "
                "that reads them; load the model in each process"
            )
        return self._thread.submit(work, *arguments)

    def _write(self, index: int, weights: Sequence[Tensor]) -> None:
        layout = Layout.of(weights)
        block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        layout.write(weights, block)
        rest = block.numpy().data
        try:
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._state = self._state_now()
        except OSError as error:
            self._forget_rest()
            raise self._no_room(error) from error
        self._layers[index] = self._end, layout
        self._end += layout.num_bytes

    def _read(self, index: int) -> list[Tensor]:
        start, layout = self._layers[index]
        block = own_block(layout.num_bytes)
        rest = block.numpy().data
        try:
            self._file.seek(start)
            while rest and (count := self._file.readinto(rest)):
                rest = rest[count:]
            is_changed = bool(rest) or self._state_now() != self._state
        except OSError as error:
            raise RiverError(
                f"evicted layers can't be read from {self.directory} ({error}); "
                "load the model again"
            ) from error
        if is_changed:
            raise RiverError(
                f"the file of evicted layers in {self.directory} was cut short or changed by "
                "something else; load the model again"
            )
        return layout.views(block)

    def _state_now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def _forget_rest(self) -> None:
        """Cut off a layer that was not written to its end. Where that fails too, reading will."""
        with suppress(OSError):
            self._file.truncate(self._end)
            self._state = self._state_now()

    def _no_room(self, error: OSError) -> RiverError:
        return RiverError(
            f"evicted layers can't be written to {self.directory} ({error.strerror}); "
            "make room, or set RIVER_LLM_CACHE to a folder elsewhere"
        )


class _Reading:
    """A layer that is being read."""

    def __init__(self, store: FileStore, reading: Future[list[Tensor]]) -> None:
        self._store = store
        self._reading = reading

    def weights(self) -> list[Tensor]:
        start = time.perf_counter()
        try:
            return self._reading.result()
        finally:
            self._store.seconds_waited += time.perf_counter() - start

    def release(self) -> None:
        self._reading.cancel()  # if it wasn't begun
