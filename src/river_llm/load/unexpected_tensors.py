"""Tensors of a checkpoint that the model has no place for: which may be left out, and which would
have changed the answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from river_llm.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What older checkpoints hold of what a model computes itself (rotary frequencies, causal masks);
# and scales of a KV cache in 8 bits, which is the choice of who runs the model.
_WITHOUT_EFFECT = re.compile(
    r"(^|[._])(inv_freq|position_ids|(cos|sin)_cached?)$"
    r"|(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$"
    r"|\.(self_attn|attn|attention|[kv]_proj|qkv_proj)\.(k|v|kv)_(scale|zero_point)$"
    r"|\.[kv]_proj\.output_(scale|zero_point)$"
)
# Beside the language model: towers of other inputs and outputs, heads that predict further tokens
# or judge a text.
_APART = re.compile(
    r"vision|visual|vit|image|video|audio|speech|multi_?modal|^mm_|projector|connector|merger"
    r"|talker|token2wav|code2wav|mtp|nextn|medusa|eagle|score|classifier|reward|v_head|value_head"
)

_log = logging.getLogger(__name__)


def check_unexpected(
    name: str, model: PreTrainedModel, config: PretrainedConfig, keys: Iterable[str]
) -> None:
    """Refuse a checkpoint with tensors that belong to what the model computes and are not in it.

    Args:
        name: of the model, as the user gave it.
        config: of the checkpoint, which may be that of a model with more parts than this one.
        keys: what `from_pretrained` calls unexpected, without what it ignores by its own lists.

    Raises:
        ModelLoadError: there are such tensors, or the LM head is another matrix than the embedding
            and the configuration says that they are one.
    """
    used = sorted(key for key in keys if not _WITHOUT_EFFECT.search(key))
    lost = [key for key in used if _changes_the_answer(model, config, key)]
    if lost:
        raise ModelLoadError(
            f"{name} holds {_count(lost)} that {type(model).__name__} with its config.json has no "
            "place for, and the answers would be others without; get config and weights from one "
            "place, upgrade transformers, or take another model"
        )
    unknown = [key for key in used if not _is_apart(config, key)]
    if unknown:
        _log.warning("%s: no part of the model takes %s", name, _count(unknown))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    is_tied = text.tie_word_embeddings and model._tied_weights_keys and head is not None
    if is_tied and head.weight.data_ptr() != embedding.weight.data_ptr():
        raise ModelLoadError(
            f"{name} holds an LM head that differs from the embedding, and its config.json says "
            'that they are one; set "tie_word_embeddings": false there, or take the head out'
        )


def _count(keys: list[str]) -> str:
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)} ({keys[0]}{', ...' * (len(keys) > 1)})"


def _changes_the_answer(model: PreTrainedModel, config: PretrainedConfig, key: str) -> bool:
    """Whether a tensor stands in a decoder layer, in a layer too many, or in another part that the
    model has."""
    base = getattr(model, model.base_model_prefix, model)
    parts = key.split(".")
    # names may leave out the prefix of the base model
    module: nn.Module = base if parts[0] in base._modules else model
    while parts and (child := module._modules.get(parts[0])) is not None:
        module = child
        del parts[0]
    if isinstance(module, nn.ModuleList) and parts and parts[0].isdigit():
        text = config.get_text_config(decoder=True)
        # layers that predict further tokens come after the last one
        return int(parts[0]) >= len(module) + (getattr(text, "num_nextn_predict_layers", 0) or 0)
    if module is model:
        return False
    return module is not base or not _is_apart(config, key)


def _is_apart(config: PretrainedConfig, key: str) -> bool:
    towers = [part for part in getattr(config, "sub_configs", ()) if part != "text_config"]
    return bool(towers) or any(_APART.search(part) for part in key.split(".")[:2])
