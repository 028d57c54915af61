"""Which backbone layers' weights are in memory, and how the others come back for a pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from river_llm.backbone import DecoderLayer, linear_weight
from river_llm.errors import ConfigError, RiverError
from river_llm.memory import give_back_freed
from river_llm.offloading.file_store import FileStore
from river_llm.offloading.host_store import HostStore
from river_llm.offloading.layer_store import Arrival, LayerStore
from river_llm.store import cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class _EvictedWeight:
    """The weight of one linear layer that was taken out of it.

    Attributes:
        module: the linear layer.
        parameter: its own parameter, which goes back in the end; without values until then.
        placeholder: what stands there meanwhile: shape and dtype, and no memory.
    """

    module: nn.Module
    parameter: nn.Parameter
    placeholder: nn.Parameter

    @classmethod
    def of(cls, module: nn.Module) -> _EvictedWeight:
        parameter = module.weight
        assert isinstance(parameter, nn.Parameter)
        empty = torch.empty_like(parameter, device="meta")
        return cls(module, parameter, nn.Parameter(empty, requires_grad=False))

    def evict(self) -> None:
        self.module.weight = self.placeholder
        self.parameter.data = self.parameter.data.new_empty(0)

    def bind(self, weight: Tensor) -> None:
        """Let the linear layer compute with a weight that won't stay."""
        self.module.weight = nn.Parameter(weight, requires_grad=False)

    def unbind(self) -> None:
        self.module.weight = self.placeholder

    def restore(self, weight: Tensor) -> None:
        self.parameter.data = weight
        self.module.weight = self.parameter


class EvictedLayers:
    """The backbone layers of a model behind the first `resident` ones.

    Of an evicted layer the weights of the linear layers are in a store (on a CPU a file, on a CUDA
    device pinned memory of the host); norms and biases stay. A pass calls `before_layer` and
    `after_layer` around each layer that tokens still run in the backbone, and `end_pass`.

    A layer is written to the store once; its weights may not be changed afterwards.

    Attributes:
        misses: evicted layers that passes ran.
        bytes_read: of all that was brought back for passes, what was read ahead in vain included.
    """

    def __init__(self, model: PreTrainedModel, layers: list[DecoderLayer]) -> None:
        self.misses = 0
        self.bytes_read = 0
        self._model = model
        self._layers = layers
        self._store: LayerStore | None = None
        self._evicted: dict[int, list[_EvictedWeight]] = {}  # the last so many layers
        weights = [[linear_weight(linear) for linear in layer.linears.values()] for layer in layers]
        self._device = weights[0][0].device
        self.layer_bytes = [sum(weight.nbytes for weight in of_layer) for of_layer in weights]
        self._arriving: dict[int, Arrival] = {}
        self._bound: dict[int, Arrival] = {}
        self._is_model_in_memory = False

    @property
    def resident(self) -> int:
        """How many of the first layers are in memory."""
        return len(self._layers) - len(self._evicted)

    @property
    def seconds_waited(self) -> float:
        """By the computation, for layers that were still on their way."""
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

    def before_layer(self, index: int, least: int, most: int) -> None:
        """Have layer `index` in memory for the running pass, and read ahead.

        Args:
            least, most: layers that tokens of the pass run in the backbone: surely, possibly.

        Raises:
            RiverError: the layer can't be brought back.
        """
        is_miss = index in self._evicted
        if is_miss:
            self._fetch(index)
        ahead = max(index + 1, self.resident)
        if ahead < (most if is_miss else least):
            self._fetch(ahead)
        if is_miss:
            self.misses += 1
            arrival = self._bound[index] = self._arriving.pop(index)
            for evicted, weight in zip(self._evicted[index], arrival.weights(), strict=True):
                evicted.bind(weight)

    def after_layer(self, index: int) -> None:
        """Evict layer `index` again, if it came back for the running pass."""
        arrival = self._bound.get(index)
        if arrival is not None:
            for evicted in self._evicted[index]:
                evicted.unbind()
            del self._bound[index]
            arrival.release()

    def end_pass(self) -> None:
        """Let go of all that came back for the last pass, also if it was cut short."""
        for index in list(self._bound):
            self.after_layer(index)
        for index in list(self._arriving):
            self._arriving.pop(index).release()
        if self._store is not None:
            self._store.end_pass()

    def _fetch(self, index: int) -> None:
        if index not in self._arriving:
            assert self._store is not None
            self._arriving[index] = self._store.fetch(index)
            self.bytes_read += self.layer_bytes[index]

    def _evict(self, index: int) -> None:
        weights = [_EvictedWeight.of(module) for module in self._evictable(index)]
        if self._store is None:
            self._store = _make_store(self._device)
        if index not in self._store:
            self._store.put(index, [weight.parameter.detach() for weight in weights])
        self._evicted[index] = weights
        for weight in weights:
            weight.evict()

    def _restore(self, index: int) -> None:
        assert self._store is not None
        for evicted, weight in zip(self._evicted[index], self._store.read(index), strict=True):
            evicted.restore(weight)
        del self._evicted[index]

    def _evictable(self, index: int) -> list[nn.Module]:
        """The linear layers of a layer.

        Raises:
            RiverError: one of them has no weight of its own there.
        """
        layer = self._layers[index]
        for name, linear in layer.linears.items():
            weight = linear._parameters.get("weight")
            if weight is None or weight.device != self._device:
                raise RiverError(
                    f"{layer.name}.{name} has no weight of its own on {self._device}, "
                    "so the layer can't be evicted; run without offloading"
                )
        return list(layer.linears.values())

    def _take_into_memory(self) -> None:
        """Let nothing that stays be in pages of a mapped file."""
        if self._device.type == "cpu":
            for tensor in chain(self._model.parameters(), self._model.buffers()):
                if not tensor.is_meta:
                    tensor.data = tensor.data.clone()
        self._is_model_in_memory = True


def _make_store(device: torch.device) -> LayerStore:
    """
    Raises:
        RiverError: there is none for the device, or no place for it.
    """
    if device.type == "cpu":
        return FileStore(cache_directory())
    if device.type == "cuda":
        from river_llm.offloading.cuda_stream import CudaSideStream

        return HostStore(CudaSideStream(device))
    raise RiverError(f"offloading needs a model on a CPU or on CUDA, not on {device}")
