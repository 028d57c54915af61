"""Ways in which a model can be broken, and what is said of it. None may leave a file `executed`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
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

from river_llm.load.source import smollm2_path

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROJECTION = "model.layers.1.mlp.up_proj"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}


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


def rope(**settings: Any) -> dict[str, Any]:
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
    **{f"weights cut at {part}": (cut(part), _CUT_WEIGHTS) for part in (0, 0.001, 0.99999)},
    "a tensor lacks": (
        tensors(lambda ws: {name: ws[name] for name in ws if name != f"{PROJECTION}.weight"}),
        f"lacks 1 of the model's tensors, {PROJECTION}.weight among them; get all its files",
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
            rf"lacks .* and has others such as .*{replacement}.* what wrapped the model",
        )
        for pattern, replacement in (("^", "module."), (r"^model\.", "model._orig_mod."))
    },
    **{
        f"{name} without a place": (
            with_tensor(name),
            rf"holds 1 tensor \({name}\) that LlamaForCausalLM",
        )
        for name in (
            *("model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight", "lm_head.bias"),
            *("model.norm.bias", "model.embed_norm.weight"),
            *("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_norm_scale"),
        )
    },
    # quantised already
    **{
        f"{how}{' in its text part' * in_part}": (
            configured(**({"text_config": quantised} if in_part else quantised)),
            rf"is quantised already \({how}\); take the original weights{fix}$",
        )
        for settings, how in QUANTISERS
        for fix in [r", of .*: river-llm build MODEL --from \S+ -o DIR" * how.startswith("gptq")]
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
        r"chat_template\.jinja has NUL bytes, as UTF-16 has",
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
            configured(**{key: rope(**{name: "su2", "factor": 2.0})}),
            "names the rotary type 'su2'",
        )
        for key in ("rope_parameters", "rope_scaling")
        for name in ("rope_type", "type")
    },
    "a rotary setting lacks": (
        configured(rope_parameters=rope(rope_type="yarn")),
        r"config\.json of .* isn't valid \(.*'factor'.*; correct it",
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
    **{f"GGUF {n}": (_cut_gguf(n), _CUT_GGUF) for n in (4, 1_000_000, -1)},
}
