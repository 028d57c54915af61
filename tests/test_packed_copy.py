"""Packed copies: a start from one is the start that wrote it, and never of another state."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_engines import CASES, KERNELS, Subject, long_subject, subject_of
from packed_models import (
    LENGTH,
    MIXED,
    PROMPT,
    check_same_lm,
    check_same_steps,
    check_same_tokenizer,
    check_same_weights,
    save_model,
    save_river,
    start,
    start_without_cache,
)
from safetensors.torch import load_file, save_file
from tiny_gguf import write_tiny_gguf
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from river_llm import ConfigError, ExitPolicy, River, RiverConfig, RiverFileError, RiverLM
from river_llm import packed_copy as packed_copy_module
from river_llm.cache import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    STAGING_PREFIX,
    CachedFolder,
    cached_folders,
    file_digest,
    folder_for,
)
from river_llm.config import BITS
from river_llm.engines import CpuEngine
from river_llm.errors import ModelLoadError
from river_llm.loading import load_backbone
from river_llm.packed_copy import PackedModel, keep_packed, packed_folder, read_packed
from river_llm.river import LEARNT_NAME

WIDTHS = list(itertools.product((16, 8), (16, 8)))  # of backbone and LM head
ROUNDED = RiverConfig(bits=3, group_size=32, quantizer="rtn")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    monkeypatch.delenv("RIVER_LLM_CPU", raising=False)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return save_model(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save_model(tmp_path_factory.mktemp("packed") / "tiny", seed=1)


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """The test's own."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every model that is loaded for an engine."""
    loaded: list[object] = []

    def load(name_or_path: Any, *arguments: Any) -> Any:
        loaded.append(name_or_path)
        return load_backbone(name_or_path, *arguments)

    monkeypatch.setattr("river_llm.pretrained.load_backbone", load)
    return loaded


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("river_llm.pretrained.load_backbone", refuse)


def starts_from_a_copy(loads: list[object], *arguments: Any, **options: Any) -> bool:
    """Start, see that it is a start from the files as they are now, and say how it went."""
    before = len(loads)
    lm = start(*arguments, **options)
    loaded = len(loads) - before
    check_same_lm(lm, start_without_cache(*arguments, **options))
    return loaded == 0


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != LEARNT_NAME
    }


def again(engine: CpuEngine, tmp_path: Path, **options: Any) -> CpuEngine:
    """The engine of a copy of this engine's."""
    folder = folder_for("packed", "tiny", tmp_path, "form", {})
    assert folder is not None
    keep_packed(folder, PackedModel(engine, character_tokenizer(), ROUNDED, frozenset()))
    packed = read_packed(folder, engine.policy, **{"threads": 1, **options})
    assert packed is not None
    assert packed.river_config == ROUNDED
    return packed.engine


def check_copied(subject: Subject, tmp_path: Path, **options: Any) -> None:
    engine = subject.engine(MIXED, **options)
    copied = again(engine, tmp_path)
    check_same_weights(copied, engine)
    for name in (
        "name",
        "device",
        "setting",
        "kernels",
        "threads",
        "num_layers",
        "context_length",
        "backbone_bits",
        "lm_head_bits",
        "kv_bits",
        "draft_head_bits",
        "draft_vocabularies",
        "policy",
        "record_similarities",
        "length",
    ):
        assert getattr(copied, name) == getattr(engine, name)
    for exit_layer, position in itertools.product((0, 2, 4), (1, 9, 100)):
        bytes_read = copied.step_bytes(exit_layer, position)
        assert bytes_read == engine.step_bytes(exit_layer, position)
    check_same_steps(copied, engine)
    tokenizer = character_tokenizer()
    answers = [
        RiverLM(one, tokenizer, subject.river.config).generate(
            PROMPT, raw=True, mode=mode, max_new_tokens=LENGTH
        )
        for one, mode in ((engine, "river"), (copied, "river"), (copied, "lossless"))
    ]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].exit_layers == answers[1].exit_layers
    engine.policy = ExitPolicy.never()
    exact = RiverLM(engine, tokenizer, subject.river.config)
    expected = exact.generate(PROMPT, raw=True, max_new_tokens=LENGTH)
    assert answers[2].tokens == expected.tokens


class TestAnEngine:
    @pytest.mark.parametrize("case", CASES)
    def test_of_a_copy_is_the_one_that_wrote_it(self, case: str, tmp_path: Path) -> None:
        check_copied(subject_of(case), tmp_path)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS)
    @pytest.mark.parametrize(
        "case",
        [
            "llama",
            "llama, tied head",
            "qwen2",
            "phi3, longrope",
            "gemma3_text",
            "gemma3_text, untied head",
        ],
    )
    def test_of_a_copy_has_the_widths_of_the_one_that_wrote_it(
        self, case: str, backbone_bits: int, lm_head_bits: int, tmp_path: Path
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        check_copied(subject_of(case), tmp_path, **bits)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
    def test_of_a_copy_has_its_river(self, bits: int, quantizer: Any, tmp_path: Path) -> None:
        config = RiverConfig(bits, 32, quantizer)
        check_copied(Subject(*CASES["llama"], config), tmp_path)

    @pytest.mark.parametrize("kernels", KERNELS)
    def test_may_have_other_kernels_than_the_one_that_wrote_it(
        self, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = subject_of("llama")
        written = subject.engine(MIXED)
        expected = subject.engine(MIXED, kernels=kernels)
        monkeypatch.setenv("RIVER_LLM_CPU", kernels)
        copied = again(written, tmp_path)
        assert copied.kernels == kernels
        check_same_weights(copied, expected)
        check_same_steps(copied, expected)

    def test_may_have_other_threads_and_policy(self, tmp_path: Path) -> None:
        subject = subject_of("llama")
        copied = again(subject.engine(MIXED), tmp_path, threads=2)
        assert copied.threads == 2
        check_same_steps(copied, subject.engine(MIXED, threads=2))
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        packed = read_packed(folder, ExitPolicy.fixed(2), threads=1)
        assert packed is not None
        assert packed.engine.policy == ExitPolicy.fixed(2)

    @pytest.mark.parametrize("fate", ["removed", "overwritten", "emptied"])
    @pytest.mark.parametrize("case", ["llama, tied head", "phi3, longrope", "gemma3_text"])
    def test_runs_on_whatever_becomes_of_its_copy(
        self, case: str, fate: str, cache: Path, tmp_path: Path
    ) -> None:
        engine = long_subject(case).engine(MIXED)
        copied = again(engine, tmp_path)
        for path in list(cache.glob("*/*")):
            if fate == "removed":
                path.unlink()
            else:
                with path.open("r+b") as opened:
                    size = len(opened.read())
                    opened.seek(0)
                    if fate == "emptied":
                        opened.truncate()
                    else:
                        opened.write(b"\xa5" * size)
        check_same_weights(copied, engine)
        check_same_steps(copied, engine)
        check_same_steps(copied, engine, prompt_length=2100)  # behind the angles that it had

    def test_with_a_tokeniser_that_cannot_be_read_again_has_no_copy(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Foreign(PreTrainedTokenizerFast):
            pass

        engine = subject_of("llama").engine()
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        plain = character_tokenizer()
        foreign = Foreign(tokenizer_object=plain.backend_tokenizer, eos_token="<end>")
        keep_packed(folder, PackedModel(engine, foreign, ROUNDED, frozenset()))
        assert list(cache.iterdir()) == []
        with monkeypatch.context() as patched:
            changed = character_tokenizer()
            changed.chat_template = "another one"
            patched.setattr(packed_copy_module, "_read_tokenizer", lambda *_: changed)
            keep_packed(folder, PackedModel(engine, plain, ROUNDED, frozenset()))
        assert list(cache.iterdir()) == []


class TestAStart:
    @pytest.mark.parametrize("river", ["none", "a config", "a folder"])
    @pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}])
    def test_reads_what_the_one_before_has_written(
        self, river: str, settings: dict[str, Any], tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", **settings)
        of_river: Any = None
        if river == "a config":
            of_river = ROUNDED
        elif river == "a folder":
            of_river = save_river(model, tmp_path / "river", ROUNDED)
        first = start(model, of_river)
        assert len(loads) == 1
        (folder,) = cached_folders()
        assert folder.is_whole()
        assert (folder.kind, folder.source) == ("packed", model)
        second = start(model, of_river)
        assert len(loads) == 1
        assert second.river_config == (RiverConfig() if river == "none" else ROUNDED)
        check_same_lm(second, first)
        assert starts_from_a_copy(loads, model, of_river)
        assert cached_folders() == [folder]

    def test_has_answers_that_leave_the_backbone_everywhere(
        self, model: Path, loads: list[object]
    ) -> None:
        start(model)
        lm = start(model)
        assert len(loads) == 1
        exits = {e for text in "abcdefgh" for e in lm.generate(text).exit_layers}
        assert len(exits) >= 3  # else the other tests see little of the river

    def test_takes_a_relative_path_and_a_link_for_the_same_model(
        self, model: Path, loads: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = start(model)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "tiny").symlink_to(model)
        for path in ("tiny", "./tiny", Path("place/tiny")):
            lm = start(path)
            assert len(loads) == 1
            check_same_weights(lm.engine, first.engine)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS)
    def test_has_the_bits_that_are_asked_for(
        self, model: Path, loads: list[object], backbone_bits: int, lm_head_bits: int
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        for others in WIDTHS:
            start(model, backbone_bits=others[0], lm_head_bits=others[1])
        assert len(loads) == len(cached_folders()) == len(WIDTHS)
        assert starts_from_a_copy(loads, model, **bits)

    def test_keeps_the_copies_of_several_rivers(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        same_settings = RiverConfig(bits=4, group_size=32)
        rivers = [
            None,
            ROUNDED,
            RiverConfig(bits=4),
            RiverConfig(bits=4, quantizer="rtn"),
            same_settings,
            save_river(model, tmp_path / "one", same_settings),
            save_river(model, tmp_path / "two", ROUNDED),
        ]
        for river in rivers:
            start(model, river)
        assert len(loads) == len(cached_folders()) == len(rivers) - 1  # the third is the default
        for river in rivers:
            assert starts_from_a_copy(loads, model, river)

    def test_keeps_what_it_learns_about_drafts_beside_the_river(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED)
        first = start(model, river)
        first.generate(PROMPT, mode="lossless", max_new_tokens=LENGTH)
        learnt = json.loads((river / "drafts.json").read_text())
        second = start(model, river)
        second.generate(PROMPT, mode="lossless", max_new_tokens=LENGTH)
        assert len(loads) == 1  # what is learnt is no other river
        learnt_again = json.loads((river / "drafts.json").read_text())
        assert learnt_again["entries"].keys() == learnt["entries"].keys()
        assert learnt_again != learnt

    def test_ends_answers_where_the_model_does(self, tmp_path: Path, loads: list[object]) -> None:
        model = save_model(tmp_path / "tiny")
        tokens = start_without_cache(model).generate(PROMPT, max_new_tokens=LENGTH).tokens
        ends = {"eos_token_id": [tokens[5], 96], "_from_model_config": False}
        (model / "generation_config.json").write_text(json.dumps(ends))
        for _ in range(2):
            lm = start(model)
            assert lm.stop_tokens == {tokens[5], 96}
            result = lm.generate(PROMPT, max_new_tokens=LENGTH)
            assert result.tokens == tokens[: tokens.index(tokens[5]) + 1]
        assert len(loads) == 2  # the one without a cache, and the first with

    def test_has_a_real_tokeniser_and_all_that_it_does(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", tokenizer=tokenizer, hidden_size=64)
        start(model)
        lm = start(model)
        assert len(loads) == 1
        expected = load_backbone(model)[1]
        check_same_tokenizer(lm.tokenizer, expected)
        texts = ["Où est la rivière ?", "\N{SNOWMAN}\N{VARIATION SELECTOR-16}", "  def f():\n\t1"]
        batch = {"padding": True, "return_tensors": "pt"}
        for text in texts:
            assert lm.tokenizer.decode(lm.tokenizer(text).input_ids) == text
        ids, expected_ids = lm.tokenizer(texts, **batch), expected(texts, **batch)
        assert torch.equal(ids.input_ids, expected_ids.input_ids)
        assert torch.equal(ids.attention_mask, expected_ids.attention_mask)

    def test_keeps_the_settings_of_a_tokeniser(self, tmp_path: Path, loads: list[object]) -> None:
        plain = character_tokenizer()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
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
        lm = start(model)
        assert not lm.tokenizer.chat_template
        assert lm.tokenizer.padding_side == "left"
        assert lm.tokenizer.tokenize("a river<tool>") == ["a", "Ġ", "river", "<tool>"]

    def test_from_a_gguf_file_reads_its_copy_too(
        self, tmp_path: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, river = write_tiny_gguf(tmp_path / "tiny.gguf"), RiverConfig(group_size=32)
        first = start(file, river)
        assert sorted(folder.kind for folder in cached_folders()) == ["converted", "packed"]
        assert {folder.source for folder in cached_folders()} == {file}
        check_same_weights(start(file, river).engine, first.engine)
        assert len(loads) == 1
        assert starts_from_a_copy(loads, file, river)
        write_tiny_gguf(file, seed=1)
        assert not starts_from_a_copy(loads, file, river)
        assert len(cached_folders()) == 2
        template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
        file.with_name("chat_template.jinja").write_text(template)
        assert not starts_from_a_copy(loads, file, river)
        assert len(cached_folders()) == 2

    def test_refuses_what_it_refuses_without_a_copy(self, model: Path, tmp_path: Path) -> None:
        start(model)
        with pytest.raises(RiverFileError, match=r"holds no river\.json"):
            start(model, tmp_path / "absent")
        with pytest.raises(ModelLoadError, match="there is no file or directory"):
            start(tmp_path / "absent")
        river = save_river(model, tmp_path / "river", ROUNDED)
        start(model, river)
        tensors = (river / "river.safetensors").read_bytes()
        (river / "river.safetensors").write_bytes(tensors[:-1])
        with pytest.raises(RiverFileError, match="cut short"):
            start(model, river)
        (river / "river.safetensors").unlink()
        with pytest.raises(RiverFileError):
            start(model, river)
        (model / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"no config\.json"):
            start(model)

    def test_refuses_a_river_of_other_weights(
        self, model: Path, other: Path, tmp_path: Path
    ) -> None:
        river = save_river(other, tmp_path / "river", ROUNDED)
        start(other, river)
        for _ in range(2):
            with pytest.raises(RiverFileError, match="built for other weights"):
                start(model, river)


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

    def test_of_the_rivers_weights_alone_is_noticed(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED)
        start(model, river)
        path = river / "river.safetensors"
        tensors = load_file(path)
        tensors["1.self_attn.q_proj.scales"] *= 2
        save_file(tensors, path, {"format": "pt"})
        assert not starts_from_a_copy(loads, model, river)
        assert starts_from_a_copy(loads, model, river)

    def test_of_the_releases_is_noticed(
        self, model: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        for name, value in (
            ("river_llm.__version__", "0.0.0"),
            ("transformers.__version__", "0.0.0"),
            ("river_llm.packed_copy.FORMAT_VERSION", 10_000),
            ("river_llm.packed_copy.weight_layout", lambda: 10_000),
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


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        path = directory / name
        content = path.read_bytes()
        assert change(content) != content
        path.write_bytes(change(content))

    return rewrite


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _flip(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        index = int(place * (len(content) - 1))
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return flip


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _rewrite("weights.bin", lambda content: content[:-1]),
    "weights with more behind": _rewrite("weights.bin", lambda content: content + b"1"),
    "no bytes of weights": _rewrite("weights.bin", lambda content: b""),
    "weights of zeros": _rewrite("weights.bin", lambda content: bytes(len(content))),
    "the first bit of weights": _rewrite("weights.bin", _flip(0)),
    "a bit of weights": _rewrite("weights.bin", _flip(0.6)),
    "the last bit of weights": _rewrite("weights.bin", _flip(1)),
    "no weights": _unlink("weights.bin"),
    "an embedding cut short": _rewrite("embedding.bin", lambda content: content[:-2]),
    "no embedding": _unlink("embedding.bin"),
    "no description": _unlink("packed.json"),
    "half a description": _rewrite("packed.json", lambda content: content[:200]),
    "another description": _rewrite("packed.json", lambda content: b"[]"),
    "a description of other numbers": _rewrite(
        "packed.json", lambda content: content.replace(b'"window": 0', b'"window": 4')
    ),
    "no parts": _unlink("parts.safetensors"),
    "parts cut short": _rewrite("parts.safetensors", lambda content: content[:-4]),
    "a bit of parts": _rewrite("parts.safetensors", _flip(0.9)),
    "no tokeniser": _unlink("tokenizer.json"),
    "half a tokeniser": _rewrite("tokenizer.json", lambda content: content[:500]),
    "no settings of the tokeniser": _unlink("tokenizer_config.json"),
    "no chat template": _unlink("chat_template.jinja"),
    "no manifest": _unlink(MANIFEST_NAME),
    "an empty manifest": _rewrite(MANIFEST_NAME, lambda content: b""),
    "half a manifest": _rewrite(MANIFEST_NAME, lambda content: content[:100]),
    "another manifest": _rewrite(MANIFEST_NAME, lambda content: b"[]"),
    "a manifest of no object": _rewrite(MANIFEST_NAME, lambda content: b'{"files": 5}'),
    "a manifest in no encoding": _rewrite(MANIFEST_NAME, lambda content: b"\xff\xfe\x00"),
    "no files at all": lambda directory: [path.unlink() for path in directory.iterdir()] and None,
}

# What is_whole can't see once the manifest says so: whoever reads sees it.
UNSEEN = [
    "weights cut short",
    "weights with more behind",
    "no bytes of weights",
    "no weights",
    "an embedding cut short",
    "no embedding",
    "no description",
    "half a description",
    "another description",
    "no parts",
    "parts cut short",
    "no tokeniser",
    "half a tokeniser",
]


class TestADamagedCopy:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_made_anew(self, damage: str, model: Path, loads: list[object]) -> None:
        start(model)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        DAMAGES[damage](folder.directory)
        assert not folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert files_of(folder.directory) == whole
        assert starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("damage", UNSEEN)
    def test_is_made_anew_where_its_manifest_says_that_it_is_whole(
        self, damage: str, model: Path, loads: list[object]
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        DAMAGES[damage](folder.directory)
        manifest = json.loads((folder.directory / MANIFEST_NAME).read_text())
        manifest["files"] = {
            path.name: file_digest(path)
            for path in folder.directory.iterdir()
            if path.name != MANIFEST_NAME
        }
        (folder.directory / MANIFEST_NAME).write_text(json.dumps(manifest))
        assert folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert files_of(folder.directory) == whole

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_is_seen_by_any_bit_of_any_file(self, saved: Path, data: st.DataObject) -> None:
        if not cached_folders():
            start(saved)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        name = data.draw(st.sampled_from(sorted(set(whole) - {MANIFEST_NAME})))
        bit = data.draw(st.integers(0, 8 * len(whole[name]) - 1))
        changed = bytearray(whole[name])
        changed[bit // 8] ^= 1 << bit % 8
        (folder.directory / name).write_bytes(changed)
        assert not folder.is_whole()
        assert read_packed(folder, MIXED) is None
        (folder.directory / name).write_bytes(whole[name])
        assert folder.is_whole()

    def test_of_another_model_under_its_name_is_not_read(
        self, model: Path, other: Path, loads: list[object]
    ) -> None:
        start(model)
        start(other)
        ours, theirs = sorted(cached_folders(), key=lambda folder: folder.source != model)
        for name in ("weights.bin", "embedding.bin"):
            shutil.copy(theirs.directory / name, ours.directory / name)
        assert not starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("fate", ["removed", "cut short"])
    def test_while_it_is_read_does_no_harm(
        self, model: Path, loads: list[object], fate: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        read_into = packed_copy_module._read_into

        def read_after(array: Any, path: Path) -> None:
            if fate == "removed":
                shutil.rmtree(path.parent)
            else:
                os.truncate(path, 1000)
            read_into(array, path)

        with monkeypatch.context() as patched:
            patched.setattr(packed_copy_module, "_read_into", read_after)
            lm = start(model)
        assert len(loads) == 2
        check_same_lm(lm, start_without_cache(model))
        assert starts_from_a_copy(loads, model)


class TestAnErrorBesideTheCopy:
    def test_of_the_processor_leaves_it(
        self, model: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        with monkeypatch.context() as patched:
            patched.setenv("RIVER_LLM_CPU", "nonsense")
            with pytest.raises(ConfigError, match="nonsense") as raised:
                start(model)
            assert "\n" not in str(raised.value)
            run("generate", PROMPT, "-m", model).check_fails(1, "nonsense")
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("place", ["CpuEngine.of_packed", "load_file", "_read_into"])
    def test_of_memory_or_the_user_leaves_it(
        self,
        model: Path,
        loads: list[object],
        error: BaseException,
        place: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        start(model)
        (folder,) = cached_folders()
        with monkeypatch.context() as patched:
            patched.setattr(f"river_llm.packed_copy.{place}", fail)
            with pytest.raises(type(error)):
                start(model)
            outcome = run("generate", PROMPT, "-m", model)
            if isinstance(error, MemoryError):
                outcome.check_fails(1, "not enough memory")
            else:
                assert (outcome.exit_code, outcome.stdout) == (130, "")
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    def test_of_a_setting_leaves_it(self, model: Path, loads: list[object]) -> None:
        start(model)
        for options in ({"threads": -1}, {"backbone_bits": 7}, {"engine": "gpu"}):
            with pytest.raises(ConfigError):
                start(model, **options)
        with pytest.raises(ConfigError):
            start(model, policy=ExitPolicy.fixed(99))
        assert starts_from_a_copy(loads, model)


class TestWithoutACache:
    @pytest.mark.parametrize(
        "reason", ["off", "no space", "no folder", "no permission", "full at last", "no core"]
    )
    def test_a_start_loads_the_model(
        self,
        model: Path,
        cache: Path,
        loads: list[object],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if reason == "off":
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        elif reason == "no space":
            usage = type("Usage", (), {"free": 1000})
            monkeypatch.setattr("river_llm.cache.shutil.disk_usage", lambda _: usage)
        elif reason == "no folder":
            cache.write_text("a file where the folder should be")
        elif reason == "no permission":

            def refuse(*_: object, **__: object) -> str:
                raise PermissionError(errno.EACCES, "read-only file system")

            monkeypatch.setattr("river_llm.cache.tempfile.mkdtemp", refuse)
        elif reason == "full at last":

            def fill(arrays: object, path: Path) -> None:
                path.write_bytes(b"123")
                raise OSError(errno.ENOSPC, "no space left on device")

            monkeypatch.setattr(packed_copy_module, "save_file", fill)
        else:
            monkeypatch.setattr(packed_copy_module, "weight_layout", lambda: None)
        for _ in range(2):
            assert not starts_from_a_copy(loads, model)
        if reason == "no folder":
            assert cache.read_text() == "a file where the folder should be"
        else:
            assert not cache.exists() or list(cache.iterdir()) == []

    def test_an_older_copy_stays_where_a_new_one_cannot_be_written(
        self, model: Path, other: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        start(other)
        kept = cached_folders()
        usage = type("Usage", (), {"free": 1000})
        with monkeypatch.context() as patched:
            patched.setattr("river_llm.cache.shutil.disk_usage", lambda _: usage)
            start(model, ROUNDED)
        assert cached_folders() == kept
        assert starts_from_a_copy(loads, model)


_SCRIPT = """
import json, os, signal, sys
from river_llm import RiverLM

model, fate = sys.argv[1:]
if fate == "killed":
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
lm = RiverLM.from_pretrained(model, device="cpu", threads=1)
result = lm.generate("A river's name?", max_new_tokens=16)
heavy = [name for name in ("transformers.modeling_utils", "river_llm.gguf") if name in sys.modules]
print(json.dumps({"tokens": result.tokens, "exits": result.exit_layers, "heavy": heavy}))
"""


def _process(model: Path, fate: str = "whole") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(model), fate],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(output)
    return answer


def _answer(model: Path) -> dict[str, Any]:
    lm = start_without_cache(model, policy=None)
    result = lm.generate(PROMPT, max_new_tokens=16)
    return {"tokens": result.tokens, "exits": result.exit_layers}


class TestProcesses:
    def test_that_start_at_once_answer_alike_and_the_next_needs_no_model_of_transformers(
        self, model: Path, cache: Path
    ) -> None:
        expected = _answer(model)
        for process in [_process(model), _process(model)]:
            answer = _end(process)
            assert {name: answer[name] for name in expected} == expected
        (folder,) = cached_folders()
        assert folder.is_whole()
        assert list(cache.iterdir()) == [folder.directory]
        assert _end(_process(model)) == {**expected, "heavy": []}

    def test_that_are_killed_while_they_write_leave_nothing_that_is_read(
        self, model: Path, cache: Path, loads: list[object]
    ) -> None:
        process = _process(model, "killed")
        process.communicate(timeout=120)
        assert process.returncode == -9
        (staging,) = cache.iterdir()
        assert staging.name.startswith(STAGING_PREFIX)
        assert (staging / MANIFEST_NAME).exists()  # it was all but done
        assert cached_folders() == []
        assert not starts_from_a_copy(loads, model)
        assert staging.exists()  # for all we know it is being written
        os.utime(staging, (0, 0))
        start(model, ROUNDED)
        assert not staging.exists()
        assert starts_from_a_copy(loads, model)


class TestCachedFolder:
    def test_that_another_process_has_written_meanwhile_stays(
        self, cache: Path, tmp_path: Path
    ) -> None:
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None

        def write(text: str) -> Callable[[Path], object]:
            return lambda directory: (directory / "text").write_text(text)

        def write_late(directory: Path) -> None:
            folder.keep(10, write("first"))
            write("second")(directory)

        folder.keep(10, write_late)
        assert folder.is_whole()
        assert (folder.directory / "text").read_text() == "first"
        assert list(cache.iterdir()) == [folder.directory]

    def test_is_another_for_whatever_it_is_made_from(self, tmp_path: Path) -> None:
        made = [
            folder_for(*arguments)
            for arguments in (
                ("packed", "tiny", tmp_path, "form", {"a": 1}),
                ("packed", "tiny", tmp_path, "form", {"a": 2}),
                ("packed", "tiny", tmp_path, "form", {"b": 1}),
                ("packed", "tiny", tmp_path, "other", {"a": 1}),
                ("packed", "large", tmp_path, "form", {"a": 1}),
            )
        ]
        assert len({folder.directory for folder in made if folder is not None}) == 5
        same = folder_for("packed", "tiny", tmp_path, "form", {"a": 1})
        assert same == made[0]

    def test_is_found_again_by_its_manifest(self, tmp_path: Path) -> None:
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        folder.keep(10, lambda directory: np.arange(4).tofile(directory / "numbers"))
        assert CachedFolder.at(folder.directory) == folder
        assert folder.num_bytes == sum(path.stat().st_size for path in folder.directory.iterdir())
