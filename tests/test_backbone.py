"""What a backbone is to the river: its layers, its fingerprint, and which models have none."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DogeConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from river_llm.errors import UnsupportedModelError
from river_llm.river.backbone import DecoderLayer, check_kind, decoder_layers, fingerprint

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )


def _bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=97,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
    )


def _eight_bit() -> PreTrainedModel:
    model = tiny_model("Llama")
    weight = torch.zeros(96, 64, dtype=torch.int8)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _a_layer_of_another_kind() -> PreTrainedModel:
    model = tiny_model("Llama")
    model.model.layers[2].mlp.extra_proj = nn.Linear(64, 64)
    return model


def _a_layer_too_few() -> PreTrainedModel:
    model = tiny_model("Llama")
    del model.model.layers[3]
    return model


REFUSED = {
    "MoE": (lambda: tiny_model("Mixtral"), "MixtralForCausalLM is a mixture of experts"),
    "MoE of one expert": (
        lambda: tiny_model("Mixtral", num_local_experts=1, num_experts_per_tok=1),
        r"model\.layers\.0 is no plain decoder layer: .* of Mixtral\w+ is a weight of shape",
    ),
    "state space": (lambda: tiny_model("Mamba"), "MambaForCausalLM keeps a recurrent state"),
    "T5": (_t5, "T5ForConditionalGeneration has an encoder; .* decoder-only model"),
    "Bart": (_bart, "BartForConditionalGeneration has an encoder; .* decoder-only model"),
    "8-bit": (
        _eight_bit,
        r"model\.layers\.1\.mlp\.up_proj is quantised already; load the model in bfloat16",
    ),
    "another kind": (
        _a_layer_of_another_kind,
        r"LlamaForCausalLM: model\.layers\.2 \(LlamaDecoderLayer\) is built otherwise",
    ),
    "a layer too few": (_a_layer_too_few, "LlamaForCausalLM has no list of 4 decoder layers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_without_plain_decoder_layers_is_refused(kind: str) -> None:
    make_model, message = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=f"^{message}") as caught:
        decoder_layers(make_model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        DogeConfig(is_moe=False, num_experts=8),
        Gemma4TextConfig(enable_moe_block=False, num_experts=8),
        LlamaConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_a_number_of_experts_that_are_switched_off_is_none(config: PreTrainedConfig) -> None:
    check_kind(config, None)


def test_a_mixture_of_experts_is_refused_without_its_class() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^doge is a mixture .*num_experts is 8\)"):
        check_kind(DogeConfig(is_moe=True, num_experts=8), None)


def test_decoder_layers_come_in_order_with_their_linear_layers(
    tiny_llama: PreTrainedModel,
) -> None:
    layers = decoder_layers(tiny_llama)
    assert [layer.name for layer in layers] == [f"model.layers.{index}" for index in range(4)]
    for layer, module in zip(layers, tiny_llama.model.layers, strict=True):
        assert layer.module is module
        assert list(layer.linears) == LINEARS
        assert all(layer.linears[name] is module.get_submodule(name) for name in LINEARS)


def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(tiny_llama: PreTrainedModel) -> None:
    digest = fingerprint(decoder_layers(tiny_llama))
    assert digest.startswith("sha256:")
    bfloat16 = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    assert fingerprint(decoder_layers(bfloat16)) == digest
    assert fingerprint(decoder_layers(bfloat16.float())) == digest


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("index", range(4))
def test_the_fingerprint_changes_with_any_linear_layer(
    index: int, name: str, tiny_llama: PreTrainedModel
) -> None:
    digest = fingerprint(decoder_layers(tiny_llama))
    weight = tiny_llama.model.layers[index].get_submodule(name).weight
    weight.data += 0.01 * weight.std() * torch.randn(weight.shape)
    assert fingerprint(decoder_layers(tiny_llama)) != digest


def test_the_fingerprint_changes_when_layers_are_swapped(tiny_llama: PreTrainedModel) -> None:
    digest = fingerprint(decoder_layers(tiny_llama))
    layers = tiny_llama.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    assert fingerprint(decoder_layers(tiny_llama)) != digest


def _fingerprint_of(linear: nn.Linear) -> str:
    return fingerprint([DecoderLayer("layer", linear, {"linear": linear})])


@pytest.mark.parametrize("part", ["all columns but one", "all rows but one", "a corner"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (1024, 64), (960, 576), (2048, 2048)])
def test_the_fingerprint_looks_everywhere(rows: int, columns: int, part: str) -> None:
    linear = nn.Linear(columns, rows, bias=False)
    digest = _fingerprint_of(linear)
    changed = {
        "all columns but one": linear.weight.data[:, 1:],
        "all rows but one": linear.weight.data[1:],
        "a corner": linear.weight.data[-rows // 4 :, -columns // 4 :],
    }[part]
    changed *= 1.5
    assert _fingerprint_of(linear) != digest
