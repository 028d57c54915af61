"""The backbone as the river sees it: a list of decoder layers, each with its linear layers.

Works on any decoder-only model of `transformers` by its structure, not by a list of names. A layer
that holds weight matrices outside of linear layers (fused experts, convolutions, state spaces)
is refused here; one that uses its linear layers in an unusual way is refused by the trial pass
that `attach_river` makes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from river_llm.errors import RiverError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_SWITCHES = ("is_moe", "enable_moe_block")  # False: no experts, whatever their number
_FINGERPRINT_SAMPLES = 1024  # values of each weight that enter the fingerprint
_FINGERPRINT_STRIDE = 2654435761  # a prime near 2**32 / golden ratio: no matrix's width divides it


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One backbone decoder layer.

    Attributes:
        name: its dotted name in the model, `model.layers.3`.
        module: the layer itself.
        linears: its linear layers by their name inside the layer, `self_attn.q_proj`.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Module]


def check_kind(config: PretrainedConfig, model_class: type | None) -> None:
    """Refuse by its configuration what the river can't follow; needs no weights.

    Args:
        model_class: that the configuration is for; None where it isn't known.

    Raises:
        UnsupportedModelError: the model is a mixture of experts, or keeps a recurrent state.
    """
    name = model_class.__name__ if model_class else config.model_type
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state, which has no KV cache slot per token for the river"
        )
    text = config.get_text_config(decoder=True)
    if any(getattr(text, switch, True) is False for switch in _EXPERT_SWITCHES):
        return
    for setting in _EXPERT_COUNTS:
        count = getattr(text, setting, None)
        if isinstance(count, int) and count > 1:
            raise UnsupportedModelError(
                f"{name} is a mixture of experts ({setting} is {count}); "
                "the river needs layers that run all of their weights for every token"
            )


def decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """The model's decoder layers in order.

    Raises:
        UnsupportedModelError: the model has no uniform list of plain decoder layers, or an adapter
            of PEFT is on it.
    """
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedModelError(
                f"{type(model).__name__} has an adapter on it ({type(module).__name__}), whose "
                "weights the river's copies would not have; merge it first: "
                "model = model.merge_and_unload()"
            )
    decoder = text_decoder(model)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for name, module in decoder.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            layers = [_decoder_layer(f"{name}.{i}", layer) for i, layer in enumerate(module)]
            break
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers to build a river of"
        )
    first = layers[0]
    for layer in layers[1:]:
        if type(layer.module) is not type(first.module) or list(layer.linears) != list(
            first.linears
        ):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {layer.name} ({type(layer.module).__name__}) is built "
                f"otherwise than {first.name} ({type(first.module).__name__}); "
                "the river needs layers of one kind"
            )
    return layers


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the model that holds the decoder layers (of a multimodal model, its text part).

    Raises:
        UnsupportedModelError: the model has an encoder, or is refused by `check_kind`.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} has an encoder; the river needs a decoder-only model")
    check_kind(model.config, type(model))
    decoder: nn.Module = model.get_decoder()
    return decoder


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight as `[out_features, in_features]`, whichever way the layer stores it."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def check_in_memory(layers: list[DecoderLayer]) -> None:
    """Validate that the layers have their weights.

    Raises:
        RiverError: they were evicted, or freed by an engine that packed them.
    """
    for layer in layers:
        if any(linear_weight(linear).is_meta for linear in layer.linears.values()):
            raise RiverError(
                f"the weights of {layer.name} are not in memory; "
                "detach the river to bring evicted layers back, or load the model again"
            )


def fingerprint(layers: list[DecoderLayer]) -> str:
    """A digest of the decoder layers' weights, the same in float32 and in bfloat16. In float16,
    which loses small values, it may be another one.

    Covers the name and shape of every linear layer and 1024 of its values, spread over all its
    rows and columns and rounded to bfloat16, so that it costs milliseconds and reads only those
    pages of a mapped file. Any training, merging or re-quantising changes it.

    Raises:
        RiverError: weights are not in memory.
    """
    check_in_memory(layers)
    digest = hashlib.sha256()
    for layer in layers:
        for name, linear in layer.linears.items():
            weight = linear_weight(linear).detach()
            digest.update(f"{layer.name}.{name} {tuple(weight.shape)}\n".encode())
            samples = torch.arange(_FINGERPRINT_SAMPLES, device=weight.device)
            places = samples * _FINGERPRINT_STRIDE % weight.numel()
            sample = weight[places // weight.shape[1], places % weight.shape[1]]
            digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return "sha256:" + digest.hexdigest()


def are_float16(layers: list[DecoderLayer]) -> bool:
    """Whether a linear weight of theirs is in float16."""
    return any(
        linear_weight(linear).dtype == torch.float16
        for layer in layers
        for linear in layer.linears.values()
    )


def check_plain_decoder(model: PreTrainedModel, layers: list[DecoderLayer]) -> None:
    """Run three tokens through the model and validate how its layers are used.

    Every layer has to run once, in order, on hidden states `[batch, tokens, width]` and write its
    own KV cache slot; every linear layer has to be called once, with one row for each token.

    Raises:
        UnsupportedModelError: one of them is used otherwise (a mixture of experts, a shared cache
            slot, a weight taken past its module).
    """
    num_tokens = 3
    order: list[str] = []
    rows: dict[str, list[int]] = defaultdict(list)

    def after_layer(name: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        plain = hidden_states.ndim == 3 and hidden_states.shape[:2] == (1, num_tokens)
        order.append(name if plain else f"{name} with hidden states {hidden_states.shape}")

    def before_linear(name: str, module: nn.Module, args: Any) -> None:
        rows[name].append(args[0].shape[:-1].numel())

    handles = []
    for layer in layers:
        handles.append(layer.module.register_forward_hook(partial(after_layer, layer.name)))
        for name, linear in layer.linears.items():
            hook = partial(before_linear, f"{layer.name}.{name}")
            handles.append(linear.register_forward_pre_hook(hook))
    try:
        device = model.get_input_embeddings().weight.device
        token_ids = torch.arange(num_tokens, device=device).unsqueeze(0)
        with torch.no_grad():
            output = text_decoder(model)(input_ids=token_ids, use_cache=True)
        cache = getattr(output, "past_key_values", None)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be run as a decoder ({type(error).__name__}: {error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    refusal = f"{type(model).__name__} is no plain decoder: "
    if order != [layer.name for layer in layers]:
        odd = next(
            (name for name, layer in zip(order, layers, strict=False) if name != layer.name),
            "one was left out",
        )
        raise UnsupportedModelError(f"{refusal}its layers don't run once and in order ({odd})")
    for name in (f"{layer.name}.{linear}" for layer in layers for linear in layer.linears):
        calls = rows[name]
        if calls != [num_tokens]:
            raise UnsupportedModelError(
                f"{refusal}{name} is called for {calls} rows where {num_tokens} tokens run, "
                "as in a mixture of experts"
            )
    if cache is None:
        raise UnsupportedModelError(f"{refusal}it keeps no KV cache")
    lengths = [int(cache.get_seq_length(index)) for index in range(len(layers))]
    if lengths != [num_tokens] * len(layers):
        raise UnsupportedModelError(f"{refusal}not every layer writes a KV cache slot of its own")


def _decoder_layer(name: str, layer: nn.Module) -> DecoderLayer:
    linears = {
        child_name: child
        for child_name, child in layer.named_modules()
        if isinstance(child, (nn.Linear, Conv1D))
    }
    for child_name, linear in linears.items():
        weight = linear.weight
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{name}.{child_name} is quantised already; "
                "load the model in bfloat16, float16 or float32"
            )
    covered = {id(linear.weight) for linear in linears.values()}
    for parameter_name, parameter in layer.named_parameters():
        if parameter.squeeze().ndim >= 2 and id(parameter) not in covered:
            module_name, _, _ = parameter_name.rpartition(".")
            kind = type(layer.get_submodule(module_name)).__name__
            raise UnsupportedModelError(
                f"{name} is no plain decoder layer: {parameter_name} of {kind} is a weight "
                f"of shape {list(parameter.shape)} outside of any linear layer"
            )
    if not linears:
        raise UnsupportedModelError(f"{name} ({type(layer).__name__}) has no linear layers")
    return DecoderLayer(name, layer, linears)
