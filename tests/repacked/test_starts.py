"""A start from repacked weights is the start that wrote them, and never one of another state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import (
    PROMPT,
    ROUNDED,
    WIDTHS,
    check_same_lm,
    check_same_tokenizer,
    save_model,
    save_river,
    start,
    start_without_cache,
    starts_from_a_copy,
)
from tiny_gguf import write_tiny_gguf
from tiny_lm import character_tokenizer
from tiny_models import mixed_bits
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from river_llm import ExitPolicy, River, RiverConfig, RiverError, RiverFileError
from river_llm.errors import ModelLoadError
from river_llm.load import repacked_weights
from river_llm.load.model import load_backbone
from river_llm.load.repacked_weights import packed_folder
from river_llm.store import (
    STAGING_PREFIX,
    cached_folders,
)


class TestAStart:
    @pytest.mark.parametrize("river", [None, ROUNDED, "folder"])
    @pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}])
    def test_reads_what_the_one_before_has_written(
        self, river: Any, sizes: dict[str, Any], tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", **sizes)
        if river == "folder":
            river = save_river(model, tmp_path / "river", ROUNDED)
        first = start(model, river)
        (folder,) = cached_folders()
        assert (folder.kind, folder.source) == ("repacked", model)
        second = start(model, river)
        assert len(loads) == 1
        check_same_lm(second, first)
        assert starts_from_a_copy(loads, model, river)
        assert cached_folders() == [folder]
        exits = {e for text in "abcdefgh" for e in second.generate(text).exit_layers}
        assert len(exits) >= 3  # else these tests see little of the river

    def test_takes_a_relative_path_and_a_link_for_the_same_model(
        self, model: Path, loads: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(model)
        for path in ("tiny", "./tiny", Path("link")):
            start(path)
        assert len(loads) == 1

    def test_has_the_river_and_the_bits_that_are_asked_for(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        same_settings = RiverConfig(bits=4, group_size=32)
        rivers = [
            None,
            ROUNDED,
            RiverConfig(bits=4, quantizer="rtn"),
            same_settings,
            save_river(model, tmp_path / "one", same_settings),
            save_river(model, tmp_path / "two", ROUNDED),
        ]
        variants: list[tuple[Any, dict[str, Any]]] = [(river, {}) for river in rivers]
        variants += [(None, {"backbone_bits": b, "lm_head_bits": h}) for b, h in WIDTHS[1:]]
        for river, bits in variants:
            start(model, river, **bits)
        assert len(loads) == len(cached_folders()) == len(variants)
        for river, bits in variants:
            assert starts_from_a_copy(loads, model, river, **bits)

    def test_has_a_real_tokenizer_and_all_that_it_does(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", tokenizer=tokenizer, hidden_size=64)
        start(model)
        lm = start(model)
        assert len(loads) == 1
        expected = load_backbone(model)[1]
        check_same_tokenizer(lm.tokenizer, expected)
        for text in ("Où est ?", "\N{SNOWMAN}\N{VARIATION SELECTOR-16}", "  def f():\n\t1"):
            assert lm.tokenizer.decode(lm.tokenizer(text).input_ids) == text

    def test_keeps_the_settings_of_a_tokenizer(self, tmp_path: Path, loads: list[object]) -> None:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=character_tokenizer().backend_tokenizer,
            eos_token="<end>",
            bos_token="<begin>",
            additional_special_tokens=["<tool>"],
            padding_side="left",
            model_max_length=77,
        )
        tokenizer.add_tokens(["river"])
        model = save_model(tmp_path / "tiny", tokenizer=tokenizer)
        start(model)
        assert starts_from_a_copy(loads, model)

    def test_of_a_gguf_file(self, tmp_path: Path, loads: list[object]) -> None:
        file, river = write_tiny_gguf(tmp_path / "tiny.gguf"), RiverConfig(group_size=32)
        start(file, river)
        assert starts_from_a_copy(loads, file, river)
        write_tiny_gguf(file, seed=1)
        assert not starts_from_a_copy(loads, file, river)
        file.with_name("chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        assert not starts_from_a_copy(loads, file, river)
        assert sorted(folder.kind for folder in cached_folders()) == ["converted", "repacked"]

    def test_refuses_what_it_refuses_without_a_copy(
        self, model: Path, other: Path, tmp_path: Path
    ) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED)
        start(model, river)
        with pytest.raises(RiverFileError, match="built for other weights"):
            start(other, river)
        with pytest.raises(RiverFileError, match=r"holds no river\.json"):
            start(model, tmp_path / "absent")
        with pytest.raises(ModelLoadError, match="there is no file or directory"):
            start(tmp_path / "absent")
        tensors = (river / "river.safetensors").read_bytes()
        (river / "river.safetensors").write_bytes(tensors[:-1])
        with pytest.raises(RiverFileError, match="cut short"):
            start(model, river)
        (model / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"no config\.json"):
            start(model)

    def test_without_the_core_or_a_place_for_it_loads_the_model(
        self, model: Path, loads: list[object], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.touch()
        assert not starts_from_a_copy(loads, model)
        cache.unlink()
        monkeypatch.setattr(repacked_weights, "weight_layout", lambda: None)
        assert not starts_from_a_copy(loads, model)
        assert not cache.exists()


_SCRIPT = """
import json, os, signal, sys
from river_llm import RiverLM

model, fate = sys.argv[1:]
if fate == "killed":
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
lm = RiverLM.from_pretrained(model, device="cpu", threads=1)
result = lm.generate("A river's name?", max_new_tokens=16)
heavy = sys.modules.keys() & {"transformers.modeling_utils"}
print(json.dumps([result.tokens, sorted(heavy)]))
"""


def _process(model: Path, fate: str = "whole") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(model), fate],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_that_start_at_once_or_are_killed_do_no_harm(model: Path, cache: Path) -> None:
    killed = _process(model, "killed")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (staging,) = cache.iterdir()
    assert staging.name.startswith(STAGING_PREFIX)
    assert cached_folders() == []
    shutil.rmtree(staging)
    expected = start_without_cache(model, policy=None).generate(PROMPT, max_new_tokens=16).tokens
    for process in [_process(model), _process(model)]:
        assert json.loads(process.communicate(timeout=120)[0])[0] == expected
    (folder,) = cached_folders()
    assert folder.is_whole()
    assert list(cache.iterdir()) == [folder.directory]
    # and the next one needs no model of transformers
    assert json.loads(_process(model).communicate(timeout=120)[0]) == [expected, []]


TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
Change = Callable[[Path, Path], object]


def _other_weights(model: Path, other: Path) -> None:
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
    load_backbone(other)[0].save_pretrained(model, max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1


def _json(name: str, **changes: Any) -> Change:
    def change(model: Path, other: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))

    return change


def _other_tokenizer(model: Path, other: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(content))


CHANGES: dict[str, Change] = {
    "other weights of the same time": _other_weights,
    "one weight": _one_weight,
    "weights in shards": _shards,
    "the epsilon of norms": _json("config.json", rms_norm_eps=0.1),
    "stop tokens": _json("generation_config.json", eos_token_id=[5, 6]),
    "the end of a text": _json("tokenizer_config.json", eos_token="~"),
    "a chat template": lambda model, _: (model / "chat_template.jinja").write_text(TEMPLATE),
    "no chat template": lambda model, _: (model / "chat_template.jinja").unlink(),
    "the tokenizer": _other_tokenizer,
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
        (after,) = cached_folders()  # in place of that of the earlier state
        assert after != before
        assert starts_from_a_copy(loads, model)

    def test_of_any_tensor_is_noticed_in_a_large_file(self, tmp_path: Path) -> None:
        model = save_model(tmp_path / "tiny", vocab_size=20_000)
        sizes = {"hidden_size": 256, "num_hidden_layers": 12}
        river = save_river(save_model(tmp_path / "deep", **sizes), tmp_path / "river", ROUNDED)
        for path, names, look in (
            (model / "model.safetensors", "", lambda: packed_folder(model, None, 16, 16)),
            (river / "river.safetensors", "q_proj.scales", lambda: River.identity(river)),
        ):
            tensors, before = load_file(path), look()
            for name in filter(lambda name: name.endswith(names), tensors):
                save_file({**tensors, name: -tensors[name]}, path, {"format": "pt"})
                assert look() != before, name

    def test_of_the_river_at_its_place_is_noticed(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = tmp_path / "river"
        mixed = mixed_bits(load_backbone(model)[0])
        for config, bits in (
            (RiverConfig(bits=4, group_size=32), None),
            (RiverConfig(bits=4), None),
            (ROUNDED, None),
            (RiverConfig("auto", 32, "rtn"), mixed),
            (RiverConfig("auto", 32, "rtn"), mixed[::-1]),
        ):
            save_river(model, river, config, bits)
            assert not starts_from_a_copy(loads, model, river)
            assert starts_from_a_copy(loads, model, river)
        tensors = load_file(river / "river.safetensors")
        tensors["1.self_attn.q_proj.scales"] *= 2
        save_file(tensors, river / "river.safetensors", {"format": "pt"})
        with pytest.raises(RiverFileError, match="is damaged"):
            start(model, river)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("river_llm.__version__", "0.0.0"),
            ("river_llm.load.repacked_weights.transformers.__version__", "0.0.0"),
            ("river_llm.load.repacked_weights.FORMAT_VERSION", 10_000),
            ("river_llm.load.repacked_weights.weight_layout", lambda: 10_000),
        ],
    )
    def test_of_a_release_is_noticed(
        self,
        name: str,
        value: Any,
        model: Path,
        loads: list[object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        start(model)
        monkeypatch.setattr(name, value)
        start(model)
        assert len(loads) == 2

    def test_of_what_no_copy_holds_loads_the_model(
        self, model: Path, loads: list[object], cache: Path
    ) -> None:
        start(model)
        kept = sorted(cache.rglob("*"))
        for options in (
            {"dtype": torch.float32},
            {"dtype": torch.float16},
            {"engine": "torch"},
            {"trust_remote_code": True},
            {"river": River.build(load_backbone(model)[0], ROUNDED)},
        ):
            assert not starts_from_a_copy(loads, model, **options)
        before = len(loads)
        with pytest.raises(RiverError, match="are not in memory"):
            start(model, device="meta")
        assert len(loads) == before + 1
        assert sorted(cache.rglob("*")) == kept

    def test_of_other_things_is_none(self, model: Path, loads: list[object]) -> None:
        start(model)
        (model / "README.md").write_text("a river")
        (model / "folder.json").mkdir()
        (model / "link.json").symlink_to(model / "absent.json")
        for options in ({"threads": 2}, {"policy": ExitPolicy.fixed(2)}, {"engine": "cpu"}):
            assert starts_from_a_copy(loads, model, **options)

    def test_of_a_models_place_is_harmless(
        self, model: Path, other: Path, loads: list[object], tmp_path: Path
    ) -> None:
        start(model)
        model.rename(tmp_path / "elsewhere")
        assert start(tmp_path / "elsewhere").tokenizer.name_or_path == str(tmp_path / "elsewhere")
        shutil.copytree(other, model)
        assert not starts_from_a_copy(loads, model)
