"""Exit layers quantised for the inputs that they will meet: layer by layer, on calibration text.

Hidden states of the calibration text go through the layers one after the other. Each layer's
linear weights are quantised by `gptq` with the inputs that reach them through the *quantised*
layers before, so that a layer is fitted to the river as it is, errors of earlier layers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from river_llm.errors import ConfigError
from river_llm.river.backbone import DecoderLayer, linear_weight, text_decoder
from river_llm.river.gptq import gptq
from river_llm.river.quantize import QuantizedMatrix, check_group_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 4096  # that go through a layer at a time


class LayerInputs:
    """What every decoder layer is called with, batch by batch: recorded by a run of the model whose
    layers hand their input on, so that it costs next to nothing.

    Attributes:
        hidden_states: of each batch, the first layer's input `[sequences, tokens, width]`.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[DecoderLayer], batches: list[Tensor]
    ) -> None:
        self.hidden_states: list[Tensor] = []
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        with _recorded(layers, self._record):
            for batch in batches:
                text_decoder(model)(input_ids=batch, use_cache=False)

    def _record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kwargs = dict(kwargs)
        hidden_states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self._calls.setdefault(index, []).append((args[1:], kwargs))
        if index == 0:
            self.hidden_states.append(hidden_states)
        return hidden_states

    def run(self, index: int, module: nn.Module, hidden_states: list[Tensor]) -> Iterator[Tensor]:
        """Run the layer on each batch's hidden states."""
        for batch, (args, kwargs) in zip(hidden_states, self._calls[index], strict=True):
            output = module(batch, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output


@contextmanager
def _recorded(
    layers: list[DecoderLayer], record: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Layers that record how they are called, and give back the hidden states as they came."""
    returns_tuple: list[bool] = []

    def replaced(index: int, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not returns_tuple:
                returns_tuple.append(isinstance(original(*args, **kwargs), tuple))
            hidden_states = record(index, args, kwargs)
            return (hidden_states,) if returns_tuple[0] else hidden_states

        return forward

    originals = [vars(layer.module).get("forward") for layer in layers]  # as hooks have put there
    for index, layer in enumerate(layers):
        layer.module.forward = replaced(index, layer.module)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            del layer.module.forward
            if original is not None:
                layer.module.forward = original


@torch.no_grad()
def calibrated_exit_layers(
    model: PreTrainedModel,
    layers: list[DecoderLayer],
    group_size: int,
    bits: list[dict[str, int]],
    token_ids: Tensor,
) -> Iterator[dict[str, QuantizedMatrix]]:
    """Quantise every layer's linear weights by GPTQ; one dict per layer, as in `River`.

    Between two layers, and after the last, the model is as it was.

    Args:
        bits: of each layer's linear weights, by name.
        token_ids: the calibration text, `[sequences, tokens]`.

    Raises:
        ConfigError: the group size doesn't divide an input width, linear layers that share inputs
            differ in bits, or something isn't finite.
    """
    batches = list(torch.split(token_ids, max(1, _BATCH_TOKENS // token_ids.shape[1])))
    inputs = LayerInputs(model, layers, batches)
    hidden_states = inputs.hidden_states
    for index, layer in enumerate(layers):
        run = partial(inputs.run, index, layer.module, hidden_states)
        with _weights_restored(layer):
            exit_layer = _quantized_layer(layer, run, group_size, bits[index])
            hidden_states = list(run())
        yield exit_layer


def _quantized_layer(
    layer: DecoderLayer,
    run: Callable[[], Iterator[Tensor]],
    group_size: int,
    bits: dict[str, int],
) -> dict[str, QuantizedMatrix]:
    """Quantise a layer's linear weights, and put the quantised in their places.

    Args:
        run: runs the layer on the calibration text, batch by batch.
    """
    quantized: dict[str, QuantizedMatrix] = {}
    hessians = _hessians(layer, run)
    while hessians:
        names, hessian = hessians.pop(0)  # each may take a gibibyte
        weights = [linear_weight(layer.linears[name]) for name in names]
        try:
            check_group_size(weights[0], group_size)
            matrix = gptq(torch.cat(weights), hessian, _shared_bits(names, bits), group_size)
        except ConfigError as error:
            raise ConfigError(f"{layer.name}.{names[0]}: {error}") from error
        blocks = _row_blocks(matrix, weights)
        for name, weight, block in zip(names, weights, blocks, strict=True):
            quantized[name] = block
            dense = block.dequantize(weight.dtype)
            linear = layer.linears[name]
            linear.weight.data = dense.T if isinstance(linear, Conv1D) else dense
    return {name: quantized[name] for name in layer.linears}


def _shared_bits(names: list[str], bits: dict[str, int]) -> int:
    """The width of linear layers that are quantised as one matrix."""
    widths = [bits[name] for name in names]
    if len(set(widths)) > 1:
        raise ConfigError(
            f"gptq quantises {', '.join(names)} as one matrix, for they share inputs; give them "
            f"the same bits, not {', '.join(map(str, widths))}"
        )
    return widths[0]


@contextmanager
def _weights_restored(layer: DecoderLayer) -> Iterator[None]:
    originals = {name: linear.weight.data for name, linear in layer.linears.items()}
    try:
        yield
    finally:
        for name, linear in layer.linears.items():
            linear.weight.data = originals[name]


def _hessians(
    layer: DecoderLayer, run: Callable[[], Iterator[Tensor]]
) -> list[tuple[list[str], Tensor]]:
    """``sum x x^T`` over all inputs, once for linear layers that share them (queries, keys and
    values; gate and up), with these layers' names."""
    sums: dict[str, Tensor] = {}
    sharing: dict[str, str] = {}  # a linear layer -> the first one of the same inputs
    last: tuple[str, Tensor] | None = None

    def hook(name: str) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal last
            if last is not None and args[0] is last[1]:
                sharing[name] = last[0]
                return
            last = (name, args[0])
            sharing[name] = name
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.T, rows)

        return collect

    handles = [
        linear.register_forward_pre_hook(hook(name)) for name, linear in layer.linears.items()
    ]
    try:
        for _ in run():
            last = None
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[str]] = {}
    for name, first in sharing.items():
        groups.setdefault(first, []).append(name)
    return [(names, sums[first]) for first, names in groups.items()]


def _row_blocks(matrix: QuantizedMatrix, weights: list[Tensor]) -> Iterator[QuantizedMatrix]:
    """The matrices that were quantised as one, `torch.cat(weights)`."""
    start = 0
    for weight in weights:
        end = start + weight.shape[0]
        yield QuantizedMatrix(
            matrix.packed[start:end],
            matrix.scales[start:end],
            matrix.zeros[start:end],
            matrix.bits,
            matrix.group_size,
        )
        start = end
