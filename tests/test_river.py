"""The river as built, saved and loaded: bit for bit, or whole or not at all."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model
from transformers import PreTrainedModel

from river_llm import river as river_module
from river_llm.config import RiverConfig
from river_llm.errors import ConfigError, RiverFileError
from river_llm.river.backbone import decoder_layers, fingerprint
from river_llm.river.quantize import quantize
from river_llm.river.river import MANIFEST_NAME, TENSORS_NAME, River
from river_llm.store import file_digest

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
CONFIG = RiverConfig(bits=3, group_size=32, quantizer="rtn")
BUILD_AND_SAVE = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from river_llm import River
from river_llm.memory import peak_memory_bytes, resident_memory_bytes

shape = LlamaConfig(
    vocab_size=256, hidden_size=1024, intermediate_size=8192, num_hidden_layers=6,
    num_attention_heads=16, num_key_value_heads=4,
)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(shape)
layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
with torch.inference_mode():  # what the first pass and the first product allocate for good
    model(torch.tensor([[1, 2, 3]]))
before = resident_memory_bytes()
river = River.build(model)
river.save(sys.argv[1])
print(peak_memory_bytes() - before, layer + river.num_bytes)
"""


@pytest.fixture
def saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A river of `tiny_llama` on disk, alone in its parent directory."""
    directory = tmp_path / "place" / "river"
    River.build(tiny_llama, CONFIG).save(directory)
    return directory


def _assert_same(one: River, other: River) -> None:
    assert one.config == other.config
    assert one.fingerprint == other.fingerprint
    assert one.model_type == other.model_type
    assert one.num_bytes == other.num_bytes
    for layer, other_layer in zip(one.exit_layers, other.exit_layers, strict=True):
        assert list(layer) == list(other_layer)
        for name, matrix in layer.items():
            for part in ("packed", "scales", "zeros"):
                assert torch.equal(getattr(matrix, part), getattr(other_layer[name], part))
            assert torch.equal(matrix.dequantize(), other_layer[name].dequantize())


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_river_holds_every_linear_layer_quantised(tiny_llama: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    river = River.build(tiny_llama, CONFIG)
    assert len(river.exit_layers) == 4
    for index, layer in enumerate(river.exit_layers):
        assert list(layer) == LINEARS
        for name, matrix in layer.items():
            weight = before[f"model.layers.{index}.{name}.weight"]
            assert torch.equal(matrix.dequantize(), quantize(weight, CONFIG).dequantize())
    num_weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert river.num_bytes == num_weights * 3 // 8 + 4 * num_weights // 32
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_building_reports_every_layer(tiny_llama: PreTrainedModel) -> None:
    reports: list[tuple[int, int]] = []
    River.build(tiny_llama, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.skipif(sys.platform != "linux", reason="the system's account of memory")
def test_building_and_saving_take_the_river_and_a_layer_at_most(tmp_path: Path) -> None:
    output = subprocess.check_output(
        [sys.executable, "-c", BUILD_AND_SAVE, tmp_path / "river"], text=True
    )
    taken, bound = map(int, output.split())
    assert taken <= bound


@pytest.mark.parametrize("model_name", ["GPT2", "Phi3"])
def test_a_group_size_that_does_not_divide_names_the_layer(model_name: str) -> None:
    model = tiny_model(model_name, **({"n_inner": 96} if model_name == "GPT2" else {}))
    last = {"GPT2": r"transformer\.h\.0\.mlp\.c_proj", "Phi3": r"model\.layers\.0\.mlp\.down_proj"}
    with pytest.raises(ConfigError, match=f"^{last[model_name]}: group size 64 .* choose 32$"):
        River.build(model, RiverConfig(group_size=64))


@pytest.mark.parametrize("config", [CONFIG, RiverConfig(), RiverConfig(6, 64, "hqq")], ids=str)
def test_a_river_is_loaded_bit_for_bit(
    config: RiverConfig, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    river = River.build(tiny_llama, config)
    river.save(tmp_path / "a" / "new" / "place")
    loaded = River.load(tmp_path / "a" / "new" / "place")
    _assert_same(loaded, river)
    loaded.check_fits(decoder_layers(tiny_llama))


def test_a_saved_river_is_two_files_without_norms(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {MANIFEST_NAME, TENSORS_NAME}
    assert [path.name for path in saved.parent.iterdir()] == ["river"]
    with safe_open(saved / TENSORS_NAME, framework="pt") as tensors:
        names = set(tensors.keys())
    parts = ("packed", "scales", "zeros")
    assert names == {
        f"{index}.{name}.{part}" for index in range(4) for name in LINEARS for part in parts
    }


def test_the_manifest_says_what_the_river_is(saved: Path, tiny_llama: PreTrainedModel) -> None:
    assert json.loads((saved / MANIFEST_NAME).read_text()) == {
        "format_version": 2,
        "config": {"bits": 3, "group_size": 32, "quantizer": "rtn"},
        "model_type": "llama",
        "num_layers": 4,
        "linears": LINEARS,
        "fingerprint": fingerprint(decoder_layers(tiny_llama)),
        "tensor_bytes": (saved / TENSORS_NAME).stat().st_size,
        "tensor_digest": file_digest(saved / TENSORS_NAME),
    }


def test_an_older_river_is_replaced(saved: Path, tiny_llama: PreTrainedModel) -> None:
    newer = River.build(tiny_llama, RiverConfig(bits=8))
    newer.save(saved)
    _assert_same(River.load(saved), newer)
    River.load(saved).save(saved)
    _assert_same(River.load(saved), newer)
    assert [path.name for path in saved.parent.iterdir()] == ["river"]


def test_an_empty_directory_is_filled(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    River.build(tiny_llama, CONFIG).save(tmp_path)
    assert River.load(tmp_path).config == CONFIG


@pytest.mark.parametrize("with_river", [False, True], ids=["alone", "beside a river"])
def test_other_files_are_left_alone(
    with_river: bool, saved: Path, tiny_llama: PreTrainedModel
) -> None:
    directory = saved if with_river else saved.parent
    (directory / "notes.txt").write_text("mine")
    before = _contents(saved.parent)
    with pytest.raises(RiverFileError) as caught:
        River.build(tiny_llama).save(directory)
    assert str(caught.value) == (
        f"{directory} exists and holds other files than a river's, as notes.txt, which would be "
        "lost; choose a new directory"
    )
    assert _contents(saved.parent) == before


def test_a_file_in_the_way_is_left_alone(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "river").write_text("mine")
    for place in (tmp_path / "river", tmp_path / "river" / "below"):
        with pytest.raises(RiverFileError):
            River.build(tiny_llama).save(place)
    assert _contents(tmp_path) == {"river": b"mine"}


def _disk_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(river_module, "save_file", fail)


def _file_may_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system itself stops a file at 1,000 bytes, as a full disk would."""
    resource = pytest.importorskip("resource")
    write = river_module.save_file

    def limited(*args: Any, **kwargs: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(river_module, "save_file", limited)


def _last_rename_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new" and Path(target).name == "river":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)


def _stopped_between_the_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older river has left its place when Ctrl-C comes."""
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupt)


def test_a_save_that_is_stopped_between_its_renames_puts_the_older_river_back(
    saved: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(saved.parent)
    river = River.build(tiny_llama, RiverConfig(bits=8))
    _stopped_between_the_renames(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        river.save(saved)
    monkeypatch.undo()
    assert _contents(saved.parent) == before


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize(
    "failure",
    [
        _disk_fills_up,
        _file_may_not_grow,
        _last_rename_fails,
    ],
)
def test_a_failed_save_changes_nothing(
    failure: Callable[[pytest.MonkeyPatch], None],
    in_place: bool,
    saved: Path,
    tiny_llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = _contents(saved.parent)
    river = River.build(tiny_llama, RiverConfig(bits=8))
    directory = saved if in_place else saved.parent / "new" / "river"
    failure(monkeypatch)
    with pytest.raises(RiverFileError, match=f"^can't write the river to {directory}: .*$"):
        river.save(directory)
    monkeypatch.undo()
    assert _contents(saved.parent) == before
    assert not list(saved.parent.rglob(".writing-*"))
    assert not (saved.parent / "new" / "river").exists()


def test_an_interrupted_save_changes_nothing(
    saved: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    before = _contents(saved.parent)
    monkeypatch.setattr(river_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        River.build(tiny_llama).save(saved)
    assert _contents(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["river"]
