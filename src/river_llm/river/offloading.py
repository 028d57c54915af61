"""Evicted backbone layers of a model of `transformers`: where they are, how they come back.

Of an evicted layer the weights of the linear layers are in a store (on a CPU a file, on CUDA pinned
memory of the host); norms and biases stay. A layer comes back when a token of a pass goes so deep,
and is let go of behind it, so that one is there at a time. Copying takes so much longer than to
compute a layer for a few tokens that to overlap the two would gain little.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from river_llm.errors import ConfigError, RiverError
from river_llm.memory import give_back_freed, own_block
from river_llm.river.backbone import DecoderLayer, linear_weight
from river_llm.store import cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64  # bytes, as PyTorch aligns what it allocates
_TIMES_KEPT = 1024  # of copies that need not have ended yet


class FileStore:
    """Weights of layers in a temporary file without a name, which is gone with the process.

    The file is read, not mapped: where a mapped file is cut short, the system kills the process.
    """

    def __init__(self, directory: Path | None) -> None:
        """`directory` is where the file is; None: where the system has its temporary files."""
        self.directory = directory or Path(tempfile.gettempdir())
        self.seconds_waited = 0.0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115, it is closed with the store
                dir=self.directory, buffering=0
            )
        except OSError as error:
            raise self._no_room(error) from error
        self._layers: dict[int, tuple[int, list[Tensor]]] = {}  # where each is, and like what
        self._end = 0

    def put(self, index: int, weights: Sequence[Tensor]) -> None:
        """Keep a layer's weights, once for all times; a RiverError where there is no room."""
        if index in self._layers:
            return
        like = [torch.empty_like(weight, device="meta") for weight in weights]
        block = torch.empty(sum(map(_aligned_bytes, like)), dtype=torch.uint8)
        for part, weight in zip(_parts(block, like), weights, strict=True):
            part.copy_(weight)
        rest = block.numpy().data
        try:
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise self._no_room(error) from error
        self._layers[index] = self._end, like
        self._end += len(block)

    def read(self, index: int) -> list[Tensor]:
        """A layer's weights, in memory of their own.

        Raises:
            RiverError: the file can't be read, or was cut short.
        """
        began = time.perf_counter()
        start, like = self._layers[index]
        block = own_block(sum(map(_aligned_bytes, like)))
        rest = block.numpy().data
        try:
            self._file.seek(start)
            while rest and (count := self._file.readinto(rest)):
                rest = rest[count:]
            if rest:
                raise OSError("the file was cut short")
        except OSError as error:
            raise RiverError(
                f"evicted layers can't be read from {self.directory} ({error}); "
                "load the model again"
            ) from error
        self.seconds_waited += time.perf_counter() - began
        return _parts(block, like)

    def _no_room(self, error: OSError) -> RiverError:
        return RiverError(
            f"evicted layers can't be written to {self.directory} ({error.strerror}); "
            "make room, or set RIVER_LLM_CACHE to a folder elsewhere"
        )


class HostStore:
    """Weights of layers in pinned memory of the host, copied by the device in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: dict[int, list[Tensor]] = {}
        self._seconds = 0.0
        self._times: deque[tuple[Any, Any]] = deque()  # events before and after each copy

    @property
    def seconds_waited(self) -> float:
        """Returns only when the device has made all copies."""
        self._add_times(but=0)
        return self._seconds

    def put(self, index: int, weights: Sequence[Tensor]) -> None:
        """Keep a layer's weights, once for all times; a RiverError where there is no room."""
        if index in self._layers:
            return
        try:
            self._layers[index] = [weight.to("cpu").pin_memory() for weight in weights]
        except RuntimeError as error:
            raise RiverError(
                "the host has no memory left to pin for an evicted layer; keep more layers on the "
                "device"
            ) from error

    def read(self, index: int) -> list[Tensor]:
        """A layer's weights on the device."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self._device)
        before.record(stream)
        weights = [weight.to(self._device, non_blocking=True) for weight in self._layers[index]]
        after.record(stream)
        self._times.append((before, after))
        self._add_times(but=_TIMES_KEPT)
        return weights

    def _add_times(self, but: int) -> None:
        while len(self._times) > but:
            before, after = self._times.popleft()
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1000  # it counts milliseconds


@dataclass(frozen=True, slots=True)
class _EvictedWeight:
    """The weight of one linear layer that was taken out of it."""

    module: nn.Module  # the linear layer
    parameter: nn.Parameter  # its own, without values until it goes back
    placeholder: nn.Parameter  # what stands there meanwhile: shape and dtype, and no memory


class EvictedLayers:
    """The backbone layers of a model behind the first `resident` ones; a layer is written to the
    store once, and its weights may not be changed afterwards.

    Attributes:
        layer_bytes: of each layer's linear weights.
        misses: evicted layers that passes ran.
        bytes_read: that were brought back for passes.
    """

    def __init__(self, model: PreTrainedModel, layers: list[DecoderLayer]) -> None:
        self.misses = 0
        self.bytes_read = 0
        self._model = model
        self._layers = layers
        self._store: FileStore | HostStore | None = None
        self._evicted: dict[int, list[_EvictedWeight]] = {}  # the last so many layers
        weights = [[linear_weight(linear) for linear in layer.linears.values()] for layer in layers]
        self._device = weights[0][0].device
        self.layer_bytes = [sum(weight.nbytes for weight in of_layer) for of_layer in weights]
        self._is_model_in_memory = False

    @property
    def resident(self) -> int:
        """How many of the first layers are in memory."""
        return len(self._layers) - len(self._evicted)

    @property
    def seconds_waited(self) -> float:
        """For layers to come back."""
        return self._store.seconds_waited if self._store is not None else 0.0

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Have the first `count` layers in memory and no others.

        Once layers are evicted, all that stays is in memory of its own, not in pages of a file
        that the model was loaded from. After an error each layer is in memory or evicted.

        Raises:
            ConfigError: there are fewer layers.
            RiverError: there is no room for what is evicted, or no way to bring it back.
        """
        num_layers = len(self._layers)
        if not 0 <= count <= num_layers:
            raise ConfigError(
                f"{count} layers are to stay, but the model has {num_layers}; "
                f"choose 0 to {num_layers}"
            )
        self.end_pass()
        if count == self.resident:
            return
        with torch.inference_mode(False):  # or the weights could only be used in that mode
            for index in range(self.resident, count):
                self._restore(index)
            for index in range(self.resident - 1, count - 1, -1):
                self._evict(index)
            if self._evicted and not self._is_model_in_memory:
                self._take_into_memory()
        give_back_freed()

    def before_layer(self, index: int) -> None:
        """Have layer `index` in memory for the running pass.

        Raises:
            RiverError: it can't be brought back.
        """
        if index in self._evicted:
            assert self._store is not None
            weights = self._store.read(index)
            self.misses += 1
            self.bytes_read += self.layer_bytes[index]
            for evicted, weight in zip(self._evicted[index], weights, strict=True):
                evicted.module.weight = nn.Parameter(weight, requires_grad=False)

    def after_layer(self, index: int) -> None:
        """Let go of layer `index`, if it is an evicted one."""
        for evicted in self._evicted.get(index, []):
            evicted.module.weight = evicted.placeholder

    def end_pass(self) -> None:
        """Let go of what came back, also if the pass was cut short."""
        for index in self._evicted:
            self.after_layer(index)

    def _evict(self, index: int) -> None:
        weights = []
        layer = self._layers[index]
        for name, module in layer.linears.items():
            parameter = module._parameters.get("weight")
            if parameter is None or parameter.device != self._device:
                raise RiverError(
                    f"{layer.name}.{name} has no weight of its own on {self._device}, "
                    "so the layer can't be evicted; run without offloading"
                )
            empty = torch.empty_like(parameter, device="meta")
            placeholder = nn.Parameter(empty, requires_grad=False)
            weights.append(_EvictedWeight(module, parameter, placeholder))
        if self._store is None:
            self._store = _make_store(self._device)
        self._store.put(index, [weight.parameter.detach() for weight in weights])
        self._evicted[index] = weights
        self.after_layer(index)
        for weight in weights:
            weight.parameter.data = weight.parameter.data.new_empty(0)

    def _restore(self, index: int) -> None:
        assert self._store is not None
        for evicted, weight in zip(self._evicted[index], self._store.read(index), strict=True):
            evicted.parameter.data = weight
            evicted.module.weight = evicted.parameter
        del self._evicted[index]

    def _take_into_memory(self) -> None:
        """Let nothing that stays be in pages of a mapped file."""
        if self._device.type == "cpu":
            for tensor in chain(self._model.parameters(), self._model.buffers()):
                if not tensor.is_meta:
                    tensor.data = tensor.data.clone()
        self._is_model_in_memory = True


def _make_store(device: torch.device) -> FileStore | HostStore:
    if device.type == "cpu":
        return FileStore(cache_directory())
    if device.type == "cuda":
        return HostStore(device)
    raise RiverError(f"offloading needs a model on a CPU or on CUDA, not on {device}")


def _aligned_bytes(weight: Tensor) -> int:
    return math.ceil(weight.nbytes / _ALIGNMENT) * _ALIGNMENT


def _parts(block: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that lie in a block, uint8 `[bytes]`, one after the other; no copies."""
    parts, start = [], 0
    for one in like:
        values = block[start : start + one.nbytes].view(one.dtype)
        parts.append(values.as_strided(one.shape, one.stride()))
        start += _aligned_bytes(one)
    return parts
