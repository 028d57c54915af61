"""Packed copies are never read of another state than that which wrote them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import (
    ROUNDED,
    save_model,
    save_river,
    start,
    start_without_cache,
    starts_from_a_copy,
)
from safetensors.torch import load_file, save_file

from river_llm import ExitPolicy, River, RiverConfig
from river_llm.errors import RiverFileError
from river_llm.load.model import load_backbone
from river_llm.load.repacked_weights import packed_folder
from river_llm.store import cached_folders


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("river_llm.pretrained.load_backbone", refuse)


def _other_weights(model: Path, other: Path) -> None:
    shutil.copy(other / "model.safetensors", model)


def _weights_of_the_same_time(model: Path, other: Path) -> None:
    times = (model / "model.safetensors").stat()
    shutil.copy(other / "model.safetensors", model)
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


def _one_weight(model: Path, other: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][7, 7] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _shards(model: Path, other: Path) -> None:
    """The other weights in files of other names: the first one's are not read any more."""
    (model / "model.safetensors").unlink()
    loaded, _ = load_backbone(other)
    loaded.save_pretrained(model, max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1


def _change_json(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    def change(model: Path, other: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))

    return change


def _other_template(model: Path, other: Path) -> None:
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    (model / "chat_template.jinja").write_text(template)


def _no_template(model: Path, other: Path) -> None:
    (model / "chat_template.jinja").unlink()


def _other_tokeniser(model: Path, other: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(content))


CHANGES: dict[str, Callable[[Path, Path], None]] = {
    "other weights": _other_weights,
    "other weights of the same time": _weights_of_the_same_time,
    "one weight": _one_weight,
    "weights in shards": _shards,
    "the epsilon of norms": _change_json("config.json", rms_norm_eps=0.1),
    "the context": _change_json("config.json", max_position_embeddings=64),
    "rotary frequencies": _change_json(
        "config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    ),
    "the activation": _change_json("config.json", hidden_act="gelu_pytorch_tanh"),
    "stop tokens": _change_json("generation_config.json", eos_token_id=[5, 6]),
    "the end of a text": _change_json("tokenizer_config.json", eos_token="~"),
    "a chat template": _other_template,
    "no chat template": _no_template,
    "the tokeniser": _other_tokeniser,
}


class TestAChange:
    @pytest.mark.parametrize("change", CHANGES)
    def test_of_the_models_files_is_noticed(
        self, change: str, model: Path, other: Path, loads: list[object]
    ) -> None:
        start(model)
        (before,) = cached_folders()
        CHANGES[change](model, other)
        assert not starts_from_a_copy(loads, model)
        (after,) = cached_folders()  # that of the earlier state is gone
        assert after != before
        assert not before.directory.exists()
        assert starts_from_a_copy(loads, model)

    def test_of_any_tensor_is_noticed_in_a_large_file(self, tmp_path: Path) -> None:
        model = save_model(tmp_path / "tiny", vocab_size=20_000)
        path = model / "model.safetensors"
        weights = load_file(path)
        before = packed_folder(model, None, 16, 16)
        unseen = []
        for name, weight in weights.items():
            save_file({**weights, name: -weight}, path, {"format": "pt"})
            if packed_folder(model, None, 16, 16) == before:
                unseen.append(name)
        assert unseen == []

    def test_of_any_scales_is_noticed_in_a_large_river(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 256, "num_hidden_layers": 12}
        river = save_river(save_model(tmp_path / "tiny", **sizes), tmp_path / "river", ROUNDED)
        path = river / "river.safetensors"
        tensors = load_file(path)
        before = River.identity(river)
        unseen = []
        for name in [name for name in tensors if name.endswith("q_proj.scales")]:
            save_file({**tensors, name: 2 * tensors[name]}, path, {"format": "pt"})
            if River.identity(river) == before:
                unseen.append(name)
        assert unseen == []

    def test_back_again_is_noticed_too(
        self, model: Path, saved: Path, other: Path, loads: list[object]
    ) -> None:
        start(model)
        _other_weights(model, other)
        start(model)
        _other_weights(model, saved)
        assert not starts_from_a_copy(loads, model)

    def test_of_the_river_at_its_place_is_noticed(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = tmp_path / "river"
        for config in (
            RiverConfig(bits=4, group_size=32),
            RiverConfig(bits=4, group_size=64),
            RiverConfig(bits=4, group_size=64, quantizer="rtn"),
            RiverConfig(bits=3, group_size=64, quantizer="rtn"),
        ):
            save_river(model, river, config)
            assert not starts_from_a_copy(loads, model, river)
            assert start(model, river).river_config == config
            assert starts_from_a_copy(loads, model, river)

    def test_of_the_rivers_weights_alone_is_refused(self, model: Path, tmp_path: Path) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED)
        start(model, river)
        path = river / "river.safetensors"
        tensors = load_file(path)
        tensors["1.self_attn.q_proj.scales"] *= 2
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(RiverFileError, match="is damaged"):
            start(model, river)

    def test_of_the_releases_is_noticed(
        self, model: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        for name, value in (
            ("river_llm.__version__", "0.0.0"),
            ("transformers.__version__", "0.0.0"),
            ("river_llm.load.repacked_weights.FORMAT_VERSION", 10_000),
            ("river_llm.load.repacked_weights.weight_layout", lambda: 10_000),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(name, value)
                before = len(loads)
                start(model)
                assert len(loads) == before + 1

    @pytest.mark.parametrize(
        "options",
        [
            {"dtype": torch.float32},
            {"dtype": torch.float16},
            {"engine": "torch"},
            {"trust_remote_code": True},
            {"engine": "torch", "dtype": torch.float32},
        ],
        ids=str,
    )
    def test_of_what_no_copy_holds_loads_the_model(
        self, model: Path, loads: list[object], cache: Path, options: dict[str, Any]
    ) -> None:
        start(model)
        kept = sorted(cache.rglob("*"))
        assert not starts_from_a_copy(loads, model, **options)
        assert sorted(cache.rglob("*")) == kept
        assert starts_from_a_copy(loads, model)

    def test_of_the_device_loads_the_model(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        refuse_to_load(monkeypatch)
        start(model)
        for device in ("meta", torch.device("meta")):
            with pytest.raises(AssertionError, match="the model is loaded"):
                start(model, device=device)
        start(model, device=torch.device("cpu"))

    def test_to_a_river_in_memory_loads_the_model(
        self, model: Path, loads: list[object], cache: Path
    ) -> None:
        start(model)
        kept = sorted(cache.rglob("*"))
        river = River.build(load_backbone(model)[0], ROUNDED)
        assert not starts_from_a_copy(loads, model, river)
        assert sorted(cache.rglob("*")) == kept

    def test_of_threads_policy_and_engines_name_is_none(
        self, model: Path, loads: list[object]
    ) -> None:
        start(model)
        for options in ({"threads": 2}, {"policy": ExitPolicy.fixed(2)}, {"engine": "cpu"}):
            assert starts_from_a_copy(loads, model, **options)

    def test_of_other_files_beside_the_model_is_none(
        self, model: Path, loads: list[object]
    ) -> None:
        start(model)
        (model / "README.md").write_text("a river")
        (model / "runs").mkdir()
        assert starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("odd", ["a folder", "a broken link"])
    def test_to_odd_things_beside_the_model_does_no_harm(
        self, model: Path, loads: list[object], odd: str
    ) -> None:
        path = model / "odd.json"
        if odd == "a folder":
            path.mkdir()
        else:
            path.symlink_to(model / "absent.json")
        start_without_cache(model)
        start(model)
        assert starts_from_a_copy(loads, model)

    def test_of_the_place_of_a_model_is_harmless(
        self, model: Path, other: Path, loads: list[object], tmp_path: Path
    ) -> None:
        start(model)
        model.rename(tmp_path / "elsewhere")
        assert start(tmp_path / "elsewhere").tokenizer.name_or_path == str(tmp_path / "elsewhere")
        shutil.copytree(other, model)
        assert not starts_from_a_copy(loads, model)
        starts_from_a_copy(loads, tmp_path / "elsewhere")

    def test_that_removes_the_model_removes_its_copy_with_the_next_one_that_is_kept(
        self, model: Path, other: Path
    ) -> None:
        start(model)
        shutil.rmtree(model)
        start(other)
        assert [folder.source for folder in cached_folders()] == [other]
