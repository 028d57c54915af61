"""What tests of loading do to a good model folder. A change may return a path to load instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
Change = Callable[[Path], Any]


def configured(name: str = "config.json", **changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        settings = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**settings, **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return change


def with_tensor(name: str, tensor: torch.Tensor | None = None) -> Change:
    return tensors(lambda weights: {**weights, name: torch.zeros(3) if tensor is None else tensor})


def renamed(pattern: str, replacement: str) -> Change:
    return tensors(lambda ws: {re.sub(pattern, replacement, name): ws[name] for name in ws})


def written(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def cut(part: float) -> Change:
    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(part * len(content))])

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for path in [path for name in names for path in folder.glob(name)]:
            path.unlink()

    return change


def in_turn(*changes: Change) -> Change:
    def change(folder: Path) -> Any:
        return [one(folder) for one in changes][-1]

    return change


def in_shards(folder: Path) -> None:
    """The weights in two files and their index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(places.values()):
        part = {name: weights[name] for name in weights if places[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
