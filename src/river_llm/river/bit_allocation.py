"""Which matrices of a river get more bits than others, so that all of it loses least.

What a quantised matrix costs is the KL divergence between the model's next-token distribution and
that with this matrix in place. To second order it is the Fisher information of what the matrix's
products lose,

    1/2 E[(g . (W - Q) x)^2]        g = d log p(y) / d (W x),  y sampled from the model's p

which one run back and forth gives for all matrices at once (as in Choi et al. 2017, "Towards the
limit of network quantization"). Losses of matrices add up to that of the river; a bit more divides
an error by four. So bits go where they save most for each bit: a knapsack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from river_llm.errors import ConfigError
from river_llm.river.backbone import DecoderLayer, linear_weight
from river_llm.river.quantize import QuantizedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (4, 5, 6, 8)
_SEQUENCES = 32  # from all over the calibration text


@dataclass(frozen=True, slots=True)
class MatrixLoss:
    """Linear layers that share inputs, and so a width.

    Attributes:
        layer: of how many decoder layers before it.
        names: of the linear layers, inside of theirs.
        num_weights: of all of them.
        loss: KL divergence in nats a token, at the first of `WIDTHS`.
    """

    layer: int
    names: tuple[str, ...]
    num_weights: int
    loss: float


def allocate_bits(
    losses: list[MatrixLoss], num_layers: int, average_bits: float
) -> list[dict[str, int]]:
    """Bits of every linear layer, one dict per decoder layer, `average_bits` a weight at most.

    Greedy: the step to a wider code that saves most for each bit comes first.
    """
    budget = (average_bits - WIDTHS[0]) * sum(one.num_weights for one in losses)
    steps = []
    for index, one in enumerate(losses):
        for narrow, wide in pairwise(WIDTHS):
            bits = (wide - narrow) * one.num_weights
            saved = one.loss * (_relative_error(narrow) - _relative_error(wide))
            steps.append((saved / bits, index, bits, wide))
    widths = [WIDTHS[0]] * len(losses)
    for _, index, bits, wide in sorted(steps, key=lambda step: (-step[0], step[3])):
        follows = widths[index] == WIDTHS[WIDTHS.index(wide) - 1]
        if follows and bits <= budget:
            widths[index] = wide
            budget -= bits
    allocated: list[dict[str, int]] = [{} for _ in range(num_layers)]
    for one, width in zip(losses, widths, strict=True):
        allocated[one.layer] |= dict.fromkeys(one.names, width)
    return allocated


def _relative_error(bits: int) -> float:
    """The squared error of codes of a width over that of the narrowest."""
    steps: float = ((2 ** WIDTHS[0] - 1) / (2**bits - 1)) ** 2
    return steps


def matrix_losses(
    model: PreTrainedModel,
    layers: list[DecoderLayer],
    exit_layers: list[dict[str, QuantizedMatrix]],
    token_ids: Tensor,
) -> list[MatrixLoss]:
    """What each matrix of a river costs, measured on some of the calibration text.

    Args:
        exit_layers: the river's, all of the narrowest width.
        token_ids: `[sequences, tokens]`.

    Raises:
        ConfigError: logits or gradients are not finite.
    """
    places = torch.linspace(0, len(token_ids) - 1, min(_SEQUENCES, len(token_ids)))
    text = token_ids[places.long()]
    generator = torch.Generator().manual_seed(0)
    watched = _WatchedProducts(layers, exit_layers)
    with watched.hooks(), _inputs_with_gradient(model), torch.enable_grad():
        for sequence in text:
            output = model(input_ids=sequence[None], use_cache=False)
            log_p = output.logits[0].float().log_softmax(-1)
            if bool(log_p.isnan().any()):
                raise ConfigError("the model's logits are no numbers; check its file")
            sampled = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
            log_p.gather(1, sampled.to(log_p.device)).sum().backward()
            watched.next_sequence()
    return watched.losses(text.numel())


class _WatchedProducts:
    """``(g . (W - Q) x)^2``, summed over tokens, for linear layers that share their inputs."""

    def __init__(
        self, layers: list[DecoderLayer], exit_layers: list[dict[str, QuantizedMatrix]]
    ) -> None:
        self._layers = layers
        self._exit_layers = exit_layers
        self._sums: dict[tuple[int, str], float] = {}
        self._sharing: dict[tuple[int, str], tuple[int, str]] = {}  # to the first of equal inputs
        self._last: tuple[tuple[int, str], Tensor] | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            linear.register_forward_hook(self._watch((index, name)))
            for index, layer in enumerate(self._layers)
            for name, linear in layer.linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def next_sequence(self) -> None:
        self._last = None

    def _watch(
        self, key: tuple[int, str]
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        index, name = key
        matrix = self._exit_layers[index][name]

        def watch(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._last is None or args[0] is not self._last[1]:
                self._last = key, args[0]
            self._sharing[key] = self._last[0]
            with torch.no_grad():
                lost = linear_weight(linear) - matrix.dequantize(linear_weight(linear).dtype)
                lost_product = F.linear(args[0].detach(), lost)

            def add(gradient: Tensor) -> None:
                squares = (gradient * lost_product).float().sum(-1).square().sum()
                self._sums[key] = self._sums.get(key, 0.0) + float(squares)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    def losses(self, num_tokens: int) -> list[MatrixLoss]:
        groups: dict[tuple[int, str], list[str]] = {}
        for key, first in self._sharing.items():
            groups.setdefault(first, []).append(key[1])
        measured = []
        for (index, _), names in groups.items():
            matrices = [self._exit_layers[index][name] for name in names]
            total = sum(self._sums.get((index, name), 0.0) for name in names)
            num_weights = sum(rows * columns for rows, columns in (one.shape for one in matrices))
            measured.append(MatrixLoss(index, tuple(names), num_weights, total / num_tokens / 2))
        if not all(0 <= one.loss < torch.inf for one in measured):
            raise ConfigError(
                "what a matrix costs is no finite number; check the model's file, or take "
                "--dtype bfloat16"
            )
        return measured


@contextmanager
def _inputs_with_gradient(model: PreTrainedModel) -> Iterator[None]:
    """Gradients go back to the embedding's output, and not to the weights."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
