"""GGUF files are used whole, or refused: each setting and each tensor changes the logits as it does
in the model that the file was made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from byte_models import IDS, byte_model, save_gguf
from gguf_cases import CASES, HALF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from river_llm.errors import ModelLoadError, UnsupportedModelError
from river_llm.load.gguf import load_gguf
from river_llm.load.gguf.file import read_gguf
from river_llm.load.model import load_backbone


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS[:200]])).logits
    return logits


def _model(architecture: str = "Llama", **settings: Any) -> PreTrainedModel:
    """A random model whose biases and norms count."""
    model = byte_model(architecture, dtype=torch.float32, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_logits_of_the_model_that_it_was_made_from(
    name: str, tmp_path: Path
) -> None:
    architecture, of_transformers, model_settings, metadata, tensors = CASES[name]
    model = _model(of_transformers, **model_settings)
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()}
    file = save_gguf(tmp_path / "model.gguf", model, architecture, metadata, tensors, pre="gpt-2")
    own = _logits(model)
    read, _ = load_gguf([file], torch.float32)
    assert torch.allclose(_logits(read), own, atol=1e-4 * float(own.abs().max()))
    # each of them counts: without it the answer is another one, or none; scaling is linear anyway
    for key in metadata.keys() - {"llama.rope.scaling.type", "gemma3.rope.scaling.type"}:
        rest = {other: value for other, value in metadata.items() if other != key}
        _check_differs(file, model, architecture, rest, tensors, own)
    for key in tensors:
        rest = {other: value for other, value in tensors.items() if other != key}
        _check_differs(file, model, architecture, metadata, rest, own)


def _check_differs(
    file: Path,
    model: PreTrainedModel,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    own: torch.Tensor,
) -> None:
    save_gguf(file, model, architecture, metadata, tensors, pre="gpt-2")
    try:
        other = _logits(load_gguf([file], torch.float32)[0])
    except ModelLoadError:
        return
    assert not torch.allclose(other, own, atol=1e-4)


@pytest.mark.parametrize("is_fused", [True, False])
def test_queries_keys_and_values_may_stand_in_one_tensor_or_in_three(
    is_fused: bool, tmp_path: Path
) -> None:
    model = _model("Llama" if is_fused else "Phi3", **({} if is_fused else {"pad_token_id": 0}))
    architecture = "llama" if is_fused else "phi3"
    file = save_gguf(tmp_path / "model.gguf", model, architecture, pre="gpt-2")
    read = load_gguf([file], torch.float32)[0]
    tensors = {
        name: one.read(torch.float32).numpy() for name, one in read_gguf([file]).tensors.items()
    }
    extra = {}
    for layer in range(4):
        names = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"]
        whole = f"blk.{layer}.attn_qkv.weight"
        if is_fused:
            extra[whole] = np.concatenate([tensors.pop(name) for name in names])
        else:
            split = dict(zip(names, np.split(tensors.pop(whole), [64, 96]), strict=True))
            extra.update(reversed(split.items()))  # in any order
    other = save_gguf(
        tmp_path / "other.gguf",
        model,
        architecture,
        tensors=extra,
        pre="gpt-2",
        only=lambda name: name in tensors,
    )
    assert torch.equal(_logits(load_gguf([other], torch.float32)[0]), _logits(read))


def test_parts_are_one_file(tmp_path: Path) -> None:
    model = _model()

    def save(name: str, number: int, count: int, only: Callable[[str], bool]) -> Path:
        metadata = {"split.no": number, "split.count": count}
        return save_gguf(tmp_path / name, model, metadata=metadata, only=only, pre="gpt-2")

    parts = [
        save("a.gguf", 0, 2, lambda name: not name.startswith("blk.2.")),
        save("b.gguf", 1, 2, lambda name: name.startswith("blk.2.")),
    ]
    assert torch.equal(_logits(load_gguf(parts, torch.float32)[0]), _logits(model))
    with pytest.raises(ModelLoadError, match=r"is one of 2 parts, and parts \[0\] were found"):
        load_gguf(parts[:1], torch.float32)
    with pytest.raises(ModelLoadError, match=r"parts \[1, 0\] were found"):
        load_gguf(parts[::-1], torch.float32)


def test_a_big_endian_file_says_how_to_convert_it(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", _plain(), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ModelLoadError, match=f"gguf-convert-endian {file} little$"):
        load_backbone(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a scale of logits": ({"llama.logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
    "a cap": ({"llama.attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping"),
    "a key of no architecture": ({"x.y": 1}, {}, r"has x\.y = 1, which isn't known"),
    "a key of the tokenizer": ({"tokenizer.ggml.foo": True}, {}, r"tokenizer\.ggml\.foo"),
    "an array": ({"llama.layer_scales": [1.0, 2.0]}, {}, "layer_scales = an array"),
    "layers that differ": (
        {"llama.feed_forward_length": [128, 128, 128, 64]},
        {},
        "layers that differ in llama.feed_forward_length",
    ),
    "partial rotation": ({"llama.rope.dimension_count": 8}, {}, "rotates 8 of 16 dimensions"),
    "an unknown scaling": ({"llama.rope.scaling.type": "su2"}, {}, "'su2', which isn't known"),
    "ntk's alpha": ({"llama.rope.scaling.alpha": 2.0}, {}, r"rope\.scaling\.alpha = 2"),
    "q norms of Llama": ({}, {"blk.0.attn_q_norm.weight": [1.0] * 16}, "attn_q_norm.weight"),
    "a layer too many": ({}, {"blk.4.attn_norm.weight": [1.0] * 64}, "tensors of 5 layers"),
    "queries twice": (
        {},
        {"blk.0.attn_qkv.weight": np.ones((128, 64))},
        "q_proj.weight twice, in ",
    ),
    "an adapter": ({"general.type": "adapter"}, {}, "its type is 'adapter'"),
    "odd divisors": ({}, {"rope_freqs.weight": [1.0, 2.0]}, "divides no 8 frequencies"),
    "a scaled and divided rope": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
        {"rope_freqs.weight": HALF},
        "by yarn and by rope_freqs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_nowhere_is_refused(name: str, tmp_path: Path) -> None:
    metadata, tensors, message = REFUSED[name]
    with pytest.raises(ModelLoadError, match=message) as error:
        _load_with(tmp_path, metadata, tensors)
    assert "\n" not in str(error.value)


def test_a_name_with_line_breaks_leaves_the_error_in_one_line(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", _plain(), metadata={"x.\n\x1b[2J": 1}, pre="gpt-2")
    with pytest.raises(ModelLoadError, match=r"has x\.\?\?\[2J = 1") as error:
        load_backbone(file)
    assert str(error.value).isprintable()


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is a mixture of experts"):
        _load_with(tmp_path, {"llama.expert_count": 8}, {})


@cache
def _plain() -> PreTrainedModel:
    return _model(num_hidden_layers=4)


def _load_with(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Any:
    file = save_gguf(tmp_path / "model.gguf", _plain(), "llama", metadata, tensors, pre="gpt-2")
    return load_gguf([file], torch.float32)[0]


_KEYS = sorted(
    {
        value.removeprefix("{arch}.")
        for part in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(part).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
)
# They say how long a text may be, what the tensors say too, or something of a scaling.
_WITHOUT_EFFECT = {
    "context_length",
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}


@pytest.mark.parametrize("architecture", ["llama", "granite"])
@pytest.mark.parametrize("value", [3, 0.7])
def test_every_key_that_gguf_knows_counts_or_is_refused(
    architecture: str, value: float, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32}
    granite = {"logits_scaling": 2.0} if architecture == "granite" else {}
    base = {"granite.logit_scale": 2.0} if granite else {}
    model = _model(architecture.capitalize(), **sizes, **granite)
    own = _logits(model)
    for key in set(_KEYS) - _WITHOUT_EFFECT:
        metadata = {**base, f"{architecture}.{key}": value}
        file = save_gguf(tmp_path / "model.gguf", model, architecture, metadata, pre="gpt-2")
        try:
            read = load_gguf([file], torch.float32)[0]
        except (ModelLoadError, UnsupportedModelError):
            continue
        assert not torch.allclose(_logits(read), own, atol=1e-4), key


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.from_regex(r"[a-z]{2,8}(\.[a-z_]{2,12}){1,2}", fullmatch=True),
    value=st.one_of(
        st.booleans(), st.integers(0, 99), st.floats(0.5, 9), st.text(min_size=1, max_size=5)
    ),
    is_tensor=st.booleans(),
    prefix=st.sampled_from(["", "llama.", "llama.attention.", "tokenizer.ggml.", "blk.1."]),
)
def test_a_random_key_or_tensor_is_never_ignored(
    name: str, value: Any, is_tensor: bool, prefix: str, tmp_path: Path
) -> None:
    key = f"{prefix}{name}"
    extra = ({}, {key: [1.0]}) if is_tensor else ({key: value}, {})
    with pytest.raises(ModelLoadError):
        _load_with(tmp_path, *extra)
