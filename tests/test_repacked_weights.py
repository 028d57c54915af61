"""A start from repacked weights is the start that wrote them, and never one of another state."""

from __future__ import annotations

import itertools
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
from command_line import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_engines import CASES, KERNELS, Subject, long_subject, subject_of
from safetensors.torch import load_file, save_file
from stored_models import (
    LENGTH,
    MIXED,
    PROMPT,
    ROUNDED,
    WIDTHS,
    check_same_lm,
    check_same_steps,
    check_same_tokenizer,
    check_same_weights,
    save_model,
    save_river,
    start,
    start_without_cache,
    starts_from_a_copy,
)
from tiny_gguf import write_tiny_gguf
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from river_llm import ConfigError, ExitPolicy, River, RiverConfig, RiverError, RiverFileError
from river_llm.config import BITS
from river_llm.engines import CpuEngine
from river_llm.errors import ModelLoadError
from river_llm.load import repacked_weights
from river_llm.load.model import load_backbone
from river_llm.load.repacked_weights import PackedModel, keep_packed, packed_folder, read_packed
from river_llm.river.river import LEARNT_NAME
from river_llm.store import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    STAGING_PREFIX,
    CachedFolder,
    cached_folders,
    file_digest,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    monkeypatch.delenv("RIVER_LLM_CPU", raising=False)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return save_model(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save_model(tmp_path_factory.mktemp("saved") / "tiny", seed=1)


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

    monkeypatch.setattr("river_llm.load.pretrained.load_backbone", load)
    return loaded


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

    @pytest.mark.parametrize("is_saved", [False, True])
    def test_keeps_what_it_learns_about_drafts_beside_the_weights(
        self, is_saved: bool, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED) if is_saved else None
        learnt = []
        for _ in range(2):
            lm = start(model, river)
            lm.generate(PROMPT, mode="lossless", max_new_tokens=LENGTH)
            directory = river or cached_folders()[0].directory
            learnt.append(json.loads((directory / LEARNT_NAME).read_text()))
        assert len(loads) == 1  # what is learnt makes no other folder of it
        assert learnt[0]["entries"].keys() == learnt[1]["entries"].keys()
        assert learnt[0] != learnt[1]

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
        for config in (RiverConfig(bits=4, group_size=32), RiverConfig(bits=4), ROUNDED):
            save_river(model, river, config)
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


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        content = (directory / name).read_bytes()
        assert change(content) != content
        (directory / name).write_bytes(change(content))

    return rewrite


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


# What a manifest may not tell: whoever reads sees it.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _rewrite("weights.bin", lambda content: content[:-1]),
    "weights with more behind": _rewrite("weights.bin", lambda content: content + b"1"),
    "no weights": _unlink("weights.bin"),
    "an embedding cut short": _rewrite("embedding.bin", lambda content: content[:-2]),
    "no embedding": _unlink("embedding.bin"),
    "no description": _unlink("packed.json"),
    "half a description": _rewrite("packed.json", lambda content: content[:200]),
    "another description": _rewrite("packed.json", lambda content: b"[]"),
    "no parts": _unlink("parts.safetensors"),
    "parts cut short": _rewrite("parts.safetensors", lambda content: content[:-4]),
    "no tokenizer": _unlink("tokenizer.json"),
    "half a tokenizer": _rewrite("tokenizer.json", lambda content: content[:500]),
}


class TestADamagedCopy:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("is_told", [True, False])
    def test_is_made_anew(
        self, damage: str, is_told: bool, model: Path, loads: list[object]
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        DAMAGES[damage](folder.directory)
        assert not folder.is_whole()
        if not is_told:
            path = folder.directory / MANIFEST_NAME
            manifest = json.loads(path.read_text())
            files = [file for file in folder.directory.iterdir() if file != path]
            manifest["files"] = {file.name: file_digest(file) for file in files}
            path.write_text(json.dumps(manifest))
            assert folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_is_seen_by_any_bit_of_any_file(self, saved: Path, data: st.DataObject) -> None:
        if not cached_folders():
            start(saved)
        (folder,) = cached_folders()
        files = json.loads((folder.directory / MANIFEST_NAME).read_text())["files"]
        path = folder.directory / data.draw(st.sampled_from(sorted(files)))
        whole = path.read_bytes()
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert not folder.is_whole()
        assert read_packed(folder, MIXED) is None
        path.write_bytes(whole)
        assert folder.is_whole()

    @pytest.mark.parametrize("fate", ["removed", "cut short"])
    def test_while_it_is_read_does_no_harm(
        self, model: Path, loads: list[object], fate: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        read_into = repacked_weights._read_into

        def read_after(arrays: Any, path: Path, sizes: Any) -> None:
            shutil.rmtree(path.parent) if fate == "removed" else os.truncate(path, 1000)
            read_into(arrays, path, sizes)

        with monkeypatch.context() as patched:
            patched.setattr(repacked_weights, "_read_into", read_after)
            lm = start(model)
        assert len(loads) == 2
        check_same_lm(lm, start_without_cache(model))
        assert starts_from_a_copy(loads, model)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["CpuEngine.of_packed", "load_file", "_read_into"])
def test_an_error_of_memory_or_the_user_leaves_the_copy(
    model: Path, error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    start(model)
    (folder,) = cached_folders()
    monkeypatch.setattr(f"river_llm.load.repacked_weights.{place}", fail)
    with pytest.raises(type(error)):
        start(model)
    outcome = run("generate", PROMPT, "-m", model)
    if isinstance(error, MemoryError):
        outcome.check_fails(1, "not enough memory")
    else:
        assert (outcome.exit_code, outcome.stdout) == (130, "")
    assert folder.is_whole()


def test_an_error_of_a_setting_leaves_the_copy(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model)
    (folder,) = cached_folders()
    policy = {"policy": ExitPolicy.fixed(99)}
    for options in ({"threads": -1}, {"backbone_bits": 7}, {"engine": "gpu"}, policy):
        with pytest.raises(ConfigError):
            start(model, **options)
    monkeypatch.setenv("RIVER_LLM_CPU", "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        start(model)
    assert folder.is_whole()


def _folder(tmp_path: Path) -> CachedFolder:
    folder = CachedFolder.of("repacked", tmp_path, "form", {})
    assert folder is not None
    return folder


def again(engine: CpuEngine, tmp_path: Path, **options: Any) -> CpuEngine:
    """The engine of a copy of this engine's."""
    folder = _folder(tmp_path)
    keep_packed(folder, PackedModel(engine, character_tokenizer(), ROUNDED, frozenset()))
    packed = read_packed(folder, **{"policy": engine.policy, "threads": 1, **options})
    assert packed is not None
    assert packed.river_config == ROUNDED
    return packed.engine


def check_copied(subject: Subject, tmp_path: Path, **options: Any) -> None:
    engine = subject.engine(MIXED, **options)
    copied = again(engine, tmp_path)
    check_same_weights(copied, engine)
    for name in ("setting", "threads", "num_layers", "context_length", "policy"):
        assert getattr(copied, name) == getattr(engine, name)
    check_same_steps(copied, engine)


class TestAnEngine:
    @pytest.mark.parametrize("case", CASES)
    def test_of_a_copy_is_the_one_that_wrote_it(self, case: str, tmp_path: Path) -> None:
        check_copied(subject_of(case), tmp_path)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS[1:])
    @pytest.mark.parametrize("case", ["llama, tied head", "gemma3_text, untied head"])
    def test_of_a_copy_has_the_widths_of_the_one_that_wrote_it(
        self, case: str, backbone_bits: int, lm_head_bits: int, tmp_path: Path
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        check_copied(subject_of(case), tmp_path, **bits)

    @pytest.mark.parametrize(("bits", "quantizer"), itertools.product(BITS, ["hqq", "rtn"]))
    def test_of_a_copy_has_its_river(self, bits: int, quantizer: Any, tmp_path: Path) -> None:
        check_copied(Subject(*CASES["llama"], RiverConfig(bits, 32, quantizer)), tmp_path)

    @pytest.mark.parametrize("kernels", KERNELS)
    def test_may_have_other_kernels_threads_and_policy(
        self, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = subject_of("llama")
        written, policy = subject.engine(MIXED), ExitPolicy.fixed(2)
        monkeypatch.setenv("RIVER_LLM_CPU", kernels)
        copied = again(written, tmp_path, threads=2, policy=policy)
        assert (copied.kernels, copied.threads, copied.policy) == (kernels, 2, policy)
        check_same_steps(copied, subject.engine(MIXED, kernels=kernels))

    @pytest.mark.parametrize("fate", ["removed", "overwritten", "emptied"])
    @pytest.mark.parametrize("case", ["llama, tied head", "phi3, longrope"])
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
                    opened.truncate() if fate == "emptied" else opened.write(b"\xa5" * size)
        check_same_weights(copied, engine)
        check_same_steps(copied, engine, prompt_length=2100)  # behind the angles that it had

    def test_with_a_tokenizer_that_cannot_be_read_again_has_no_copy(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Foreign(PreTrainedTokenizerFast):
            pass

        engine = subject_of("llama").engine()
        plain = character_tokenizer()
        foreign = Foreign(tokenizer_object=plain.backend_tokenizer, eos_token="<end>")
        keep_packed(_folder(tmp_path), PackedModel(engine, foreign, ROUNDED, frozenset()))
        changed = character_tokenizer()
        changed.chat_template = "another one"
        monkeypatch.setattr(repacked_weights, "_read_tokenizer", lambda *_: changed)
        keep_packed(_folder(tmp_path), PackedModel(engine, plain, ROUNDED, frozenset()))
        assert list(cache.iterdir()) == []
