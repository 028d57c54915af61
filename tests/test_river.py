"""The river as built, saved and loaded: bit for bit, or whole or not at all; one that is damaged or
made from other weights is refused in one line with a fix."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import mixed_bits, tiny_model
from transformers import PreTrainedModel

from river_llm.config import RiverConfig
from river_llm.errors import ConfigError, RiverFileError
from river_llm.river import river as river_module
from river_llm.river.backbone import decoder_layers, fingerprint
from river_llm.river.manifest import MANIFEST_NAME, TENSORS_NAME
from river_llm.river.quantize import quantize
from river_llm.river.river import River

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
CONFIG = RiverConfig(bits=3, group_size=32, quantizer="rtn")
AUTO = RiverConfig("auto", 32, "rtn")
BUILD_AND_SAVE = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from river_llm import River
from river_llm.memory import peak_memory_bytes, resident_memory_bytes

shape = LlamaConfig(
    vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
    num_attention_heads=16, num_key_value_heads=4,
)
torch.set_num_threads(1)  # two that spin beside another process take a hundred times longer
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


def assert_same(one: River, other: River) -> None:
    for name in ("config", "fingerprint", "model_type", "num_bytes", "average_bits"):
        assert getattr(one, name) == getattr(other, name)
    for layer, other_layer in zip(one.exit_layers, other.exit_layers, strict=True):
        assert list(layer) == list(other_layer)
        for name, matrix in layer.items():
            assert matrix.bits == other_layer[name].bits
            for part in ("packed", "scales", "zeros"):
                assert torch.equal(getattr(matrix, part), getattr(other_layer[name], part))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


class TestBuilding:
    def test_quantises_every_linear_layer(self, tiny_llama: PreTrainedModel) -> None:
        before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
        reports: list[tuple[int, int]] = []
        river = River.build(tiny_llama, CONFIG, lambda *progress: reports.append(progress))
        assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
        for index, layer in enumerate(river.exit_layers):
            assert list(layer) == LINEARS
            for name, matrix in layer.items():
                weight = before[f"model.layers.{index}.{name}.weight"]
                assert torch.equal(matrix.dequantize(), quantize(weight, CONFIG).dequantize())
        num_weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
        assert river.num_bytes == num_weights * 3 // 8 + 4 * num_weights // 32
        assert all(torch.equal(t, before[name]) for name, t in tiny_llama.state_dict().items())

    @pytest.mark.skipif(sys.platform != "linux", reason="the system's account of memory")
    def test_and_saving_take_the_river_and_a_layer_at_most(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", BUILD_AND_SAVE, tmp_path / "river"]
        # what is freed goes back to the system at once, else the peak differs by 20 MB
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.check_output(command, text=True, env=environment)
        taken, bound = map(int, output.split())
        assert taken <= bound

    @pytest.mark.parametrize("architecture", ["GPT2", "Phi3"])
    def test_names_the_layer_that_no_group_size_divides(self, architecture: str) -> None:
        model = tiny_model(architecture, **({"n_inner": 96} if architecture == "GPT2" else {}))
        last = {"GPT2": r"transformer\.h\.0\.mlp\.c_proj", "Phi3": r".*\.0\.mlp\.down_proj"}
        with pytest.raises(ConfigError, match=f"^{last[architecture]}: group size 64 .*choose 32$"):
            River.build(model, RiverConfig(group_size=64))


class TestSaving:
    @pytest.mark.parametrize("config", [CONFIG, RiverConfig(), RiverConfig(6, 64), AUTO], ids=str)
    def test_loses_no_bit(
        self, config: RiverConfig, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        bits = mixed_bits(tiny_llama) if config.bits == "auto" else None
        river = River.build(tiny_llama, config, bits=bits)
        river.save(tmp_path / "a" / "new" / "place")
        loaded = River.load(tmp_path / "a" / "new" / "place")
        assert_same(loaded, river)
        loaded.check_fits(decoder_layers(tiny_llama))

    def test_writes_two_files(self, saved: Path, tiny_llama: PreTrainedModel) -> None:
        assert {path.name for path in saved.iterdir()} == {MANIFEST_NAME, TENSORS_NAME}
        assert [path.name for path in saved.parent.iterdir()] == ["river"]
        with safe_open(saved / TENSORS_NAME, framework="pt") as tensors:
            names = set(tensors.keys())
        parts = ("packed", "scales", "zeros")
        assert names == {
            f"{i}.{name}.{part}" for i in range(4) for name in LINEARS for part in parts
        }
        manifest = json.loads((saved / MANIFEST_NAME).read_text())
        assert isinstance(manifest.pop("tensor_digest"), str)
        assert manifest == {
            "format_version": 3,
            "config": CONFIG.to_dict(),
            "model_type": "llama",
            "num_layers": 4,
            "linears": LINEARS,
            "fingerprint": fingerprint(decoder_layers(tiny_llama)),
            "tensor_bytes": (saved / TENSORS_NAME).stat().st_size,
        }

    def test_replaces_an_older_river_and_fills_an_empty_directory(
        self, saved: Path, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        newer = River.build(tiny_llama, RiverConfig(bits=8))
        newer.save(saved)
        assert_same(River.load(saved), newer)
        River.load(saved).save(saved)  # over the file that its own tensors are mapped from
        assert_same(River.load(saved), newer)
        assert [path.name for path in saved.parent.iterdir()] == ["river"]
        (tmp_path / "empty").mkdir()
        newer.save(tmp_path / "empty")
        assert_same(River.load(tmp_path / "empty"), newer)

    def test_leaves_other_files_alone(self, saved: Path, tiny_llama: PreTrainedModel) -> None:
        (saved / "notes.txt").write_text("mine")
        (saved.parent / "file").write_text("mine")
        before, river = contents(saved.parent), River.build(tiny_llama)
        other = "exists and holds other files than a river's, as"
        for place, message in (
            (saved, f"^{saved} {other} notes.txt, which would be lost; choose a new directory$"),
            (saved.parent, other),
            (saved.parent / "file", "exists and is a file"),
            (saved.parent / "file" / "below", "is a file, so there can be no"),
        ):
            with pytest.raises(RiverFileError, match=message):
                river.save(place)
        assert contents(saved.parent) == before


def disk_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(river_module, "save_file", fail)


def file_may_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
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


def last_rename_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        assert self.name == "new"
        assert target.name == "river"
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(river_module, "save_file", interrupt)


def interrupted_between_the_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older river has left its place when Ctrl-C comes."""
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if target.name == "old":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupt)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize(
    "failure",
    [
        disk_fills_up,
        file_may_not_grow,
        last_rename_fails,
        interrupted,
        interrupted_between_the_renames,
    ],
)
def test_a_failed_save_changes_nothing(
    failure: Callable[[pytest.MonkeyPatch], None],
    in_place: bool,
    saved: Path,
    tiny_llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if failure is interrupted_between_the_renames and not in_place:
        pytest.skip("there is one rename")
    before = contents(saved.parent)
    river = River.build(tiny_llama, RiverConfig(bits=8))
    directory = saved if in_place else saved.parent / "new" / "river"
    failure(monkeypatch)
    with pytest.raises((RiverFileError, KeyboardInterrupt)) as caught:
        river.save(directory)
    if isinstance(caught.value, RiverFileError):
        assert str(caught.value).startswith(f"can't write the river to {directory}: ")
    monkeypatch.undo()
    assert contents(saved.parent) == before
    assert not list(saved.parent.rglob(".river-*"))
    assert not (saved.parent / "new" / "river").exists()


def cut(name: str, part: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        content = (directory / name).read_bytes()
        kept = int(part * len(content)) if part >= 0 else len(content) + int(part)
        (directory / name).write_bytes(content[:kept])

    return spoil


def manifest(**changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        for key, value in changes.items():
            manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
        (directory / MANIFEST_NAME).write_text(json.dumps(manifest))

    return spoil


def auto(bits: Any) -> Callable[[Path], None]:
    return manifest(config={"bits": "auto"}, bits=bits)


def manifest_of(content: bytes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / MANIFEST_NAME).write_bytes(content)

    return spoil


def overwritten(start: int | None, byte: bytes) -> Callable[[Path], None]:
    """From `start` on, or None: all after the header, as after a crash of the machine."""

    def spoil(directory: Path) -> None:
        content = (directory / TENSORS_NAME).read_bytes()
        first = 8 + int.from_bytes(content[:8], "little") if start is None else start
        end = len(content) if start is None else first + 192
        filled = content[:first] + byte * (end - first) + content[end:]
        (directory / TENSORS_NAME).write_bytes(filled)

    return spoil


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (lambda d: (d / TENSORS_NAME).unlink(), "has 0 bytes where .* cut short"),
    **{
        f"tensors cut at {part}": (cut(TENSORS_NAME, part), "bytes where .* it is cut short")
        for part in (0, 0.0001, 0.01, 0.5, 0.999, -1)
    },
    "a garbled header": (overwritten(8, b"\xff"), f"{TENSORS_NAME} is damaged"),
    "tensors that never reached the disk": (overwritten(None, b"\0"), f"{TENSORS_NAME} is damaged"),
    **{
        f"manifest cut at {part}": (cut(MANIFEST_NAME, part), f"{MANIFEST_NAME} is cut short")
        for part in (0, 0.1, 0.5, 0.9, -2)
    },
    "a manifest of bytes": (manifest_of(b"\xff\xfe\x00"), f"{MANIFEST_NAME} is cut short"),
    "a manifest that is a list": (manifest_of(b"[1]"), f"{MANIFEST_NAME} is cut short"),
    "a manifest of nothing": (manifest_of(b"{}"), f"{MANIFEST_NAME} is cut short"),
    "a later format": (manifest(format_version=4), "format version 4, this release reads 3"),
    "an unknown setting": (manifest(config={"axis": 1}), "damaged .*there is no setting 'axis'"),
    "odd bits": (manifest(config={"bits": 7}), "damaged .*bits is 7; it must be one of 2, 3, 4"),
    "no config": (manifest(config=None), "damaged"),
    "other bits": (manifest(config={"bits": 2}), "holds other bits or groups"),
    "other bits in one matrix": (auto(["3333333"] * 3 + ["3333334"]), "holds other bits or groups"),
    "no bits of matrices": (manifest(config={"bits": "auto"}), r"damaged \('bits'\)"),
    **{
        f"{name} of matrices": (auto(bits), "damaged")
        for name, bits in {
            "bits for a layer too few": ["3333333"] * 3,
            "bits for a matrix too few": ["333333"] * 4,
            "odd bits": ["3333337"] * 4,
            "bits in words": ["three"] * 4,
            "bits in numbers": [[3] * 7] * 4,
            "one width": 3,
        }.items()
    },
    "layers in words": (manifest(num_layers="four"), r"damaged \(num_layers\)"),
    "a layer too many": (manifest(num_layers=5), "can't be read .*4.self_attn"),
    "another linear layer": (manifest(linears=["mlp.experts"]), "can't be read .*mlp.experts"),
}


class TestLoading:
    def test_takes_the_format_before_mixed_widths(
        self, saved: Path, tiny_llama: PreTrainedModel
    ) -> None:
        config = {"bits": 3, "group_size": 32, "quantizer": "rtn"}
        description = json.loads((saved / MANIFEST_NAME).read_text())
        description |= {"format_version": 2, "config": config}
        (saved / MANIFEST_NAME).write_text(json.dumps(description))
        assert_same(River.load(saved), River.build(tiny_llama, CONFIG))

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_refuses_a_damaged_river(self, damage: str, saved: Path) -> None:
        spoil, message = DAMAGES[damage]
        spoil(saved)
        fix = r"; build it again: river-llm build MODEL -o DIR$"
        with pytest.raises(RiverFileError, match=f"{message}.*{fix}") as caught:
            River.load(saved)
        assert "\n" not in str(caught.value)

    def test_refuses_a_place_without_one(self, saved: Path) -> None:
        for where in (saved.parent, saved / "absent"):
            with pytest.raises(RiverFileError, match=r"holds no river.json; build .*: river-llm"):
                River.load(where)

    def test_refuses_other_weights_and_models(
        self, saved: Path, tiny_llama: PreTrainedModel
    ) -> None:
        river = River.load(saved)
        fix = r"build one for this model: river-llm build MODEL -o DIR$"
        for index in range(4):
            weight = tiny_llama.model.layers[index].mlp.up_proj.weight.data
            weight *= 1.01
            with pytest.raises(RiverFileError, match=f"built for other weights .*; {fix}"):
                river.check_fits(decoder_layers(tiny_llama))
            weight /= 1.01
        for count in (3, 5):
            other = decoder_layers(tiny_model("Llama", num_hidden_layers=count))
            with pytest.raises(RiverFileError, match=rf"another model \(llama, 4 layers.*; {fix}"):
                river.check_fits(other)
