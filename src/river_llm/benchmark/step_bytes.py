"""Bytes that a decode step has to read: weights of the layers that ran, LM head, KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from river_llm.backbone import decoder_layers, linear_weight
from river_llm.engines import Engine
from river_llm.engines.kv_cache import position_bytes
from river_llm.river import River


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes of a model and its river, by the shapes and types of their tensors.

    Norms, biases and the one row of the embedding are left out: they are less than a thousandth.

    Attributes:
        backbone_layers: of each decoder layer's linear weights.
        river_layers: of each exit layer.
        head: of the LM head.
        position: keys and values of one position in one layer.
        windows: for each layer, how many positions it looks back; None: all.
    """

    backbone_layers: tuple[int, ...]
    river_layers: tuple[int, ...]
    head: int
    position: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, river: River, kv_bits: int = 16) -> ModelBytes:
        """Measure a model and its river, with a KV cache of so many bits."""
        layers = decoder_layers(model)
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attentions = [getattr(layer.module, "self_attn", None) for layer in layers]
        head = model.get_output_embeddings().weight
        return cls(
            backbone_layers=tuple(
                sum(linear_weight(linear).nbytes for linear in layer.linears.values())
                for layer in layers
            ),
            river_layers=tuple(
                sum(matrix.num_bytes for matrix in layer.values()) for layer in river.exit_layers
            ),
            head=head.nbytes,
            position=position_bytes(key_heads, head_dim, head.element_size(), kv_bits),
            windows=tuple(getattr(attention, "sliding_window", None) for attention in attentions),
        )

    def step(self, exit_layers: Sequence[int], position: int) -> int:
        """Bytes of one step; arguments as of `step_bytes`."""
        deepest, shallowest = max(exit_layers), min(exit_layers)
        weights = sum(self.backbone_layers[:deepest]) + sum(self.river_layers[shallowest:])
        return weights + self.head + len(exit_layers) * self.cache(position)

    def cache(self, position: int) -> int:
        """Bytes of the keys and values that one sequence attends to at `position`."""
        return sum(self.position * min(position, window or position) for window in self.windows)


def step_bytes(engine: Engine, sizes: ModelBytes, exit_layers: Sequence[int], position: int) -> int:
    """Bytes that `engine` reads to decode one token for each sequence.

    A weight is read once for all sequences; where some are in the backbone and others in the river,
    both of a layer's weights are read.

    Args:
        sizes: what counts where the engine has no account of its own (`step_bytes`).
        exit_layers: how many backbone layers each sequence ran.
        position: tokens in the cache before.
    """
    account: Callable[[int, int], int] | None = getattr(engine, "step_bytes", None)
    if account is None:
        return sizes.step(exit_layers, position)
    deepest, shallowest = max(exit_layers), min(exit_layers)
    one_sequence = account(deepest, position)
    cache = one_sequence - account(deepest, 0)
    both = sum(sizes.river_layers[shallowest:deepest])
    return one_sequence + both + (len(exit_layers) - 1) * cache
