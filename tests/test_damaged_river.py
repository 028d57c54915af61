"""A river that is damaged, or was built for another model: refused in one line with the mend."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from transformers import PreTrainedModel

from river_llm.config import RiverConfig
from river_llm.errors import RiverFileError
from river_llm.river.backbone import decoder_layers
from river_llm.river.river import MANIFEST_NAME, TENSORS_NAME, River


@pytest.fixture
def saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A river of `tiny_llama` on disk, alone in its parent directory."""
    directory = tmp_path / "place" / "river"
    River.build(tiny_llama, RiverConfig(bits=3, group_size=32, quantizer="rtn")).save(directory)
    return directory


def _assert_refused(error: RiverFileError, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), message


def _cut(name: str, part: float) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        content = (directory / name).read_bytes()
        kept = int(part * len(content)) if part >= 0 else len(content) + int(part)
        (directory / name).write_bytes(content[:kept])

    return cut


def _manifest(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST_NAME).read_text())
        for key, value in changes.items():
            manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
        (directory / MANIFEST_NAME).write_text(json.dumps(manifest))

    return change


def _manifest_of(content: bytes) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / MANIFEST_NAME).write_bytes(content)

    return replace


def _garbled_header(directory: Path) -> None:
    content = bytearray((directory / TENSORS_NAME).read_bytes())
    content[8:200] = b"\xff" * 192
    (directory / TENSORS_NAME).write_bytes(content)


def _zeros(directory: Path) -> None:
    """All after the header is zero, as after a crash of the machine."""
    content = (directory / TENSORS_NAME).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    (directory / TENSORS_NAME).write_bytes(content[:header] + bytes(len(content) - header))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (lambda d: (d / TENSORS_NAME).unlink(), "has 0 bytes where .* cut short"),
    **{
        f"tensors cut at {part}": (_cut(TENSORS_NAME, part), "bytes where .* it is cut short")
        for part in (0, 0.0001, 0.01, 0.5, 0.999, -1)
    },
    "a garbled header": (_garbled_header, f"{TENSORS_NAME} is damaged"),
    "tensors that never reached the disk": (_zeros, f"{TENSORS_NAME} is damaged"),
    **{
        f"manifest cut at {part}": (_cut(MANIFEST_NAME, part), f"{MANIFEST_NAME} is cut short")
        for part in (0, 0.1, 0.5, 0.9, -2)
    },
    "a manifest of bytes": (_manifest_of(b"\xff\xfe\x00"), f"{MANIFEST_NAME} is cut short"),
    "a manifest that is a list": (_manifest_of(b"[1]"), f"{MANIFEST_NAME} is cut short"),
    "a manifest of nothing": (_manifest_of(b"{}"), f"{MANIFEST_NAME} is cut short"),
    "a later format": (_manifest(format_version=3), "format version 3, this release reads 2"),
    "an unknown setting": (_manifest(config={"axis": 1}), "damaged .*unknown river setting axis"),
    "odd bits": (_manifest(config={"bits": 7}), "damaged .*bits is 7; choose one of 2, 3, 4"),
    "no config": (_manifest(config=None), "damaged"),
    "layers in words": (_manifest(num_layers="four"), r"damaged \(num_layers\)"),
    "a layer too many": (_manifest(num_layers=5), "can't be read .*4.self_attn"),
    "another linear layer": (_manifest(linears=["mlp.experts"]), "can't be read .*mlp.experts"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_river_is_refused(damage: str, saved: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(RiverFileError) as caught:
        River.load(saved)
    _assert_refused(caught.value, message, "build it again: river-llm build MODEL -o DIR$")


@pytest.mark.parametrize("config", [{"bits": 2}, {"group_size": 64}], ids=str)
def test_a_config_at_odds_with_the_tensors_is_refused(config: dict[str, int], saved: Path) -> None:
    _manifest(config=config)(saved)
    with pytest.raises(RiverFileError):
        River.load(saved)


@pytest.mark.parametrize("where", ["absent", "place"], ids=["no directory", "no river in it"])
def test_a_place_without_a_river_is_refused(where: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(RiverFileError) as caught:
        River.load(tmp_path / where)
    _assert_refused(caught.value, f"{where} holds no river.json; build .*: river-llm build MODEL")


@pytest.mark.parametrize("index", range(4))
def test_a_river_of_other_weights_is_refused(
    index: int, saved: Path, tiny_llama: PreTrainedModel
) -> None:
    tiny_llama.model.layers[index].mlp.up_proj.weight.data *= 1.01
    with pytest.raises(RiverFileError) as caught:
        River.load(saved).check_fits(decoder_layers(tiny_llama))
    _assert_refused(caught.value, "built for other weights", "river-llm build MODEL -o DIR$")


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 3}, {"num_hidden_layers": 5}], ids=str)
def test_a_river_of_another_model_is_refused(settings: dict[str, int], saved: Path) -> None:
    with pytest.raises(RiverFileError) as caught:
        River.load(saved).check_fits(decoder_layers(tiny_model("Llama", **settings)))
    _assert_refused(caught.value, r"another model \(llama, 4 layers", "river-llm build MODEL")
