"""What backbone, full quantisation and River hold at a length of context, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from river_llm.backbone import decoder_layers, linear_weight
from river_llm.config import RiverConfig

_WEIGHT_BYTES = 2  # 16 bits, of a cache entry too
_SCALE_AND_ZERO_BYTES = 4  # of a group


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model and its river, each tensor once.

    Attributes:
        backbone_layer: linear weights of one decoder layer, in 16 bits.
        exit_layer: the same quantised.
        num_layers: of either.
        rest: all other weights, embedding and LM head mostly.
        position: keys and values of one position in one layer.
        windows: for each layer, how many positions it looks back; None: all.
        context_length: the most tokens that the model takes; None: any number.
    """

    backbone_layer: int
    exit_layer: int
    num_layers: int
    rest: int
    position: int
    windows: tuple[int | None, ...]
    context_length: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, river: RiverConfig) -> ModelSizes:
        """Of a language model, whose tensors may be empty, see `empty_model`.

        Raises:
            UnsupportedModelError: see `decoder_layers`.
        """
        config = model.config
        layers = decoder_layers(model)
        counts = [linear_weight(linear).numel() for linear in layers[0].linears.values()]
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = sum(counts) // river.group_size
        total = sum(parameter.numel() for parameter in model.parameters())
        attentions = [getattr(layer.module, "self_attn", None) for layer in layers]
        window = getattr(config, "sliding_window", None)  # of all layers, as Mistral has it
        return cls(
            backbone_layer=_WEIGHT_BYTES * sum(counts),
            exit_layer=sum(counts) * river.bits // 8 + _SCALE_AND_ZERO_BYTES * groups,
            num_layers=len(layers),
            rest=_WEIGHT_BYTES * (total - len(layers) * sum(counts)),
            position=2 * key_heads * head_dim * _WEIGHT_BYTES,
            windows=tuple(getattr(attention, "sliding_window", window) for attention in attentions),
            context_length=getattr(config, "max_position_embeddings", None),
        )

    def held(self, context: int, backbone_layers: int, with_river: bool = True) -> int:
        """Bytes with so many backbone layers in memory and so many tokens in the cache."""
        river = self.num_layers * self.exit_layer if with_river else 0
        cache = sum(self.position * min(context, window or context) for window in self.windows)
        return backbone_layers * self.backbone_layer + river + self.rest + cache
