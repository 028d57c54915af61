"""Ways in which a model can be broken: each changes a good model directory or writes a file beside
it, and says what to load. None may leave a file `executed` beside the directory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForMaskedLM

from river_llm.load.source import smollm2_path

WEIGHTS = "model.safetensors"


def _no_path(directory: Path) -> str:
    return str(directory / "absent")


def _no_hub_id(directory: Path) -> str:
    return "nobody/nothing"


def _truncated(part: float) -> Callable[[Path], Path]:
    def truncate(directory: Path) -> Path:
        weights = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(weights[: int(part * len(weights))])
        return directory

    return truncate


def _lacks_a_tensor(directory: Path) -> Path:
    weights = load_file(directory / WEIGHTS)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    return directory


def _has_an_odd_shape(directory: Path) -> Path:
    weights = load_file(directory / WEIGHTS)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    return directory


class _LeavesAMark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _only_pickled(directory: Path) -> Path:
    (directory / WEIGHTS).unlink()
    mark = _LeavesAMark(directory.parent / "executed")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(mark))
    return directory


def _lost_weights(directory: Path) -> Path:
    (directory / WEIGHTS).unlink()
    return directory


def _weights_of_another_name(directory: Path) -> Path:
    (directory / WEIGHTS).rename(directory / "weights.safetensors")
    return directory


def _no_tokenizer(directory: Path) -> Path:
    for path in (*directory.glob("tokenizer*"), *directory.glob("*.jinja")):
        path.unlink()
    return directory


def _no_tokenizer_of_gpt2(directory: Path) -> Path:
    return _no_tokenizer(_change_config(directory, model_type="gpt2"))  # there is an empty one


def _settings_of_a_tokenizer_alone(directory: Path) -> Path:
    (directory / "tokenizer.json").unlink()
    return directory


def _empty_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{}")
    return directory


def _one_file(name: str) -> Callable[[Path], Path]:
    return lambda directory: directory / name


def _unknown_model_type(directory: Path) -> Path:
    return _change_config(directory, model_type="martian")


def _remote_code(directory: Path) -> Path:
    mark = directory.parent / "executed"
    (directory / "martian.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "martian.Config", "AutoModelForCausalLM": "martian.Model"}
    return _change_config(directory, model_type="martian", auto_map=auto_map)


def _encoder(directory: Path) -> Path:
    config = DistilBertConfig(vocab_size=97, dim=64, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertForMaskedLM(config).save_pretrained(directory)
    return directory


def _half_a_config(directory: Path) -> Path:
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config[: len(config) // 2])
    return directory


def _no_config(directory: Path) -> Path:
    (directory / "config.json").unlink()
    return directory


def _not_gguf(directory: Path) -> Path:
    path = directory / "model.gguf"
    path.write_bytes(b"GGML" + bytes(1000))
    return path


def _cut_gguf(num_bytes: int) -> Callable[[Path], Path]:
    """SmolLM2's file, to so many bytes; a negative number counts from the end."""

    def cut(directory: Path) -> Path:
        (directory.parent / "cut").mkdir()
        path = directory.parent / "cut" / "model.gguf"
        path.write_bytes(smollm2_path().read_bytes()[:num_bytes])
        return path

    return cut


def _directory_of_a_cut_gguf(directory: Path) -> Path:
    return _cut_gguf(1000)(directory).parent


def _unknown_gguf(directory: Path) -> Path:
    path = directory / "martian.gguf"
    writer = GGUFWriter(path, "martian")
    writer.add_context_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _two_gguf_files(directory: Path) -> Path:
    for name in ("one.gguf", "two.gguf"):
        _unknown_gguf(directory).rename(directory / name)
    return _no_config(directory)


def _change_config(directory: Path, **changes: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


_CUT_WEIGHTS = "the weights of .* can't be read, a file may be cut short"
_CUT_GGUF = "can't be read as GGUF, it may be cut short"

BROKEN: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "no path": (_no_path, "there is no file or directory .*absent"),
    "no Hub id": (_no_hub_id, "there is no (model|file or directory) nobody/nothing"),
    "no weights": (_truncated(0), _CUT_WEIGHTS),
    "weights cut in the header": (_truncated(0.001), _CUT_WEIGHTS),
    "half the weights": (_truncated(0.5), _CUT_WEIGHTS),
    "weights cut at the end": (_truncated(0.99999), _CUT_WEIGHTS),
    "a tensor lacking": (_lacks_a_tensor, "lacks 1 of the model's tensors, model.layers.2.mlp"),
    "a tensor of odd shape": (
        _has_an_odd_shape,
        "weights of .* have other shapes than",
    ),
    "pickled weights": (
        _only_pickled,
        "has no safetensors weights; convert pickled weights to safetensors first",
    ),
    "lost weights": (_lost_weights, "saved holds no weights"),
    "weights of another name": (
        _weights_of_another_name,
        r"holds weights\.safetensors and no model\.safetensors",
    ),
    "the weights' file": (_one_file(WEIGHTS), "is one file of a model; give its folder, .*saved$"),
    "the config's file": (
        _one_file("config.json"),
        "is one file of a model; give its folder, .*saved$",
    ),
    "no tokenizer": (_no_tokenizer, "saved holds no tokenizer"),
    "no tokenizer, which GPT-2 doesn't mind": (_no_tokenizer_of_gpt2, "saved holds no tokenizer"),
    "a tokenizer's settings alone": (_settings_of_a_tokenizer_alone, "saved holds no tokenizer"),
    "an empty config": (_empty_config, r"config\.json of .*saved names no architecture"),
    "unknown model type": (_unknown_model_type, "has an architecture that transformers.*martian"),
    "remote code": (_remote_code, "comes with code of its own"),
    "an encoder": (_encoder, "is no causal language model"),
    "half a config": (_half_a_config, r"saved/config\.json is no valid JSON"),
    "no config": (_no_config, "is no model directory, it has no config.json"),
    "not GGUF": (_not_gguf, "model.gguf is no GGUF file"),
    "GGUF magic alone": (_cut_gguf(4), _CUT_GGUF),
    "GGUF cut in the settings": (_cut_gguf(100), _CUT_GGUF),
    "GGUF cut in the vocabulary": (_cut_gguf(1_000_000), _CUT_GGUF),
    "GGUF cut in the tensors": (_cut_gguf(50_000_000), _CUT_GGUF),
    "GGUF cut at the end": (_cut_gguf(-1), _CUT_GGUF),
    "a cut GGUF in a directory": (_directory_of_a_cut_gguf, _CUT_GGUF),
    "unknown GGUF": (_unknown_gguf, "has an architecture that transformers.*martian"),
    "two GGUF files": (_two_gguf_files, "holds 2 GGUF files"),
}
