"""Which engine serves a model, why it isn't the native one, and what the command line says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from steps import append, begin
from stored_models import PROMPT, save_model
from tiny_models import ARCHITECTURES, tiny_model
from transformers import PreTrainedModel

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverConfig,
    RiverError,
    RiverLM,
    UnsupportedModelError,
)
from river_llm.config import EngineChoice, EngineConfig
from river_llm.engines import CpuEngine, TorchEngine, choice, make_engine
from river_llm.engines.choice import why_not_native

pytest.importorskip("river_llm._core", reason="the native engine was not built")

POLICY = ExitPolicy.fixed(2)
CONFIG = RiverConfig(group_size=32, quantizer="rtn")
NOTE = "river-llm: PyTorch computes: "
NOT_BUILT = "the native engine was not built, for want of a compiler"


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that found no compiler."""
    monkeypatch.setattr("river_llm.engines.native_core._core", None)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a tiny model."""
    monkeypatch.setenv("RIVER_LLM_CACHE", "off")
    return save_model(tmp_path / "model")


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = lambda *_: pytest.fail("a model is loaded")  # noqa: E731
    monkeypatch.setattr("river_llm.load.pretrained.load_backbone", loads)


def model_of(architecture: str = "Llama", **settings: Any) -> PreTrainedModel:
    settings = {"dtype": torch.bfloat16, **ARCHITECTURES[architecture], **settings}
    return tiny_model(architecture, **settings)


def engine_of(model: PreTrainedModel, choice: EngineChoice = "auto", **settings: Any) -> Any:
    return make_engine(model, River.build(model, CONFIG), EngineConfig(engine=choice, **settings))


UNSUITED: dict[str, tuple[str, dict[str, Any], str]] = {
    "float32": ("Llama", {"dtype": torch.float32}, "the model is in float32, not bfloat16"),
    "float16": ("Llama", {"dtype": torch.float16}, "the model is in float16, not bfloat16"),
    "an architecture": ("Gemma2", {}, "the native engine knows llama, .*, not gemma2$"),
    "GPT-2": ("GPT2", {}, "the native engine knows llama, .*, not gpt2$"),
    "an activation": ("Llama", {"hidden_act": "relu"}, "has no activation 'relu'$"),
    "a head dim": ("Llama", {"num_attention_heads": 8}, "a multiple of 16, not 8$"),
    "an inner width": ("Llama", {"intermediate_size": 104}, "a multiple of 16, not 104$"),
}


class TestWhyNotNative:
    @pytest.mark.parametrize("case", UNSUITED)
    def test_names_what_does_not_suit(self, case: str) -> None:
        architecture, settings, reason = UNSUITED[case]
        found = why_not_native(model_of(architecture, **settings))
        assert found is not None
        assert re.search(reason, found)

    def test_names_a_width_of_heads_for_8_bits(self) -> None:
        wide = model_of(head_dim=544)
        assert why_not_native(wide) is None
        reason = why_not_native(wide, kv_bits=8)
        assert reason is not None
        assert "heads of 512 dims at most in a KV cache of 8 bits, not 544" in reason
        engine, said = engine_of(wide, kv_bits=8)
        assert (engine.name, engine.kv_bits, said) == ("torch", 8, reason)

    def test_is_nothing_or_the_installation_or_the_device(
        self, request: pytest.FixtureRequest
    ) -> None:
        assert why_not_native(model_of()) is None
        assert why_not_native(model_of().to("meta")) == "the model is on meta"
        request.getfixturevalue("not_built")
        assert why_not_native(model_of()) == NOT_BUILT


class TestMakeEngine:
    def test_auto_takes_the_native_engine_where_it_can(self) -> None:
        engine, reason = engine_of(model_of())
        assert isinstance(engine, CpuEngine)
        assert reason is None
        assert isinstance(engine_of(model_of(dtype=torch.float32), "cpu")[0], CpuEngine)

    @pytest.mark.parametrize("case", ["float32", "an architecture", "GPT-2", "an activation"])
    def test_auto_falls_back_with_the_reason(self, case: str) -> None:
        architecture, settings, _ = UNSUITED[case]
        model = model_of(architecture, **settings)
        expected = why_not_native(model)
        engine, reason = engine_of(model)
        assert isinstance(engine, TorchEngine)
        assert reason == expected
        (sequence,) = begin(engine)
        assert append(engine, {sequence: [5, 6]}).logits.isfinite().all()
        assert engine_of(model_of(), "torch")[1] is None

    @pytest.mark.parametrize("case", ["an architecture", "GPT-2", "an activation", "a head dim"])
    def test_cpu_refuses_with_a_fix(self, case: str) -> None:
        architecture, settings, _ = UNSUITED[case]
        model = model_of(architecture, **settings)
        with pytest.raises(UnsupportedModelError, match=r"; take --engine torch$"):
            make_engine(model, River(CONFIG, [], "", "llama"), EngineConfig(engine="cpu"))

    @pytest.mark.usefixtures("not_built")
    def test_cpu_refuses_where_the_native_engine_was_not_built(self) -> None:
        with pytest.raises(RiverError, match=r"install g\+\+ 12 .* or take --engine torch$"):
            engine_of(model_of(), "cpu")

    @pytest.mark.parametrize("choice", ["auto", "cpu"])
    def test_settings_reach_the_native_engine(self, choice: EngineChoice) -> None:
        settings = {"threads": 2, "backbone_bits": 8, "lm_head_bits": 8, "kv_bits": 8}
        engine, _ = engine_of(model_of(), choice, **settings)
        assert {name: getattr(engine, name) for name in settings} == settings

    def test_threads_reach_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", taken.append)
        engine_of(model_of(), "torch", threads=3)
        engine_of(model_of(dtype=torch.float32), threads=4)
        engine_of(model_of(), "torch")
        assert taken == [3, 4]

    @pytest.mark.parametrize("bits", [{"backbone_bits": 8}, {"lm_head_bits": 8}])
    def test_8_bits_need_the_native_engine(self, bits: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=r"are for the native engine; take --engine cpu"):
            engine_of(model_of(), "torch", **bits)
        with pytest.raises(ConfigError, match="need the native engine: the model is in float32"):
            engine_of(model_of(dtype=torch.float32), **bits)


@pytest.mark.usefixtures("nothing_is_loaded")
class TestBeforeLoading:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"engine": "llama.cpp"}, "engine is 'llama.cpp'; it must be one of auto, cpu, torch"),
            ({"backbone_bits": 4}, "backbone_bits is 4; it must be one of 16, 8"),
            ({"engine": "torch", "lm_head_bits": 8}, "8 bits of backbone and LM head are for"),
            ({"offload": 2.5}, "offload is 2.5; give off, auto, a number of layers"),
            ({"river": True}, "river is True; give the folder of one, a River, or a RiverConfig"),
            ({"policy": "never"}, "policy is 'never'; give an ExitPolicy"),
        ],
    )
    def test_settings_that_no_engine_takes_are_refused(
        self, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            RiverLM.from_pretrained("absent", **settings)

    def test_more_threads_than_cores_are_told_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        choice.check_threads.cache_clear()
        monkeypatch.setattr(choice, "usable_threads", lambda: 2)
        for threads in (None, 2, 1000, 1000):
            choice.check_threads(threads)
        (record,) = caplog.records
        assert record.getMessage().endswith("or take 2 at most")

    @pytest.mark.usefixtures("not_built")
    def test_an_engine_that_was_not_built_is_refused(self) -> None:
        with pytest.raises(RiverError, match="native engine was not built"):
            RiverLM.from_pretrained("absent", engine="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "cpu"}, "has no activation 'relu'; take --engine torch$"),
        ({"engine": "cpu", "device": "meta"}, "needs the model on a CPU, not on meta$"),
        ({"lm_head_bits": 8}, "need the native engine: .* has no activation 'relu'$"),
    ],
    ids=["architecture", "device", "8 bits"],
)
def test_what_the_engine_cannot_run_is_refused_before_a_river_is_built(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIVER_LLM_CACHE", "off")  # or files are asked for
    loaded = model_of(hidden_act="relu").to(settings.get("device", "cpu")), None
    monkeypatch.setattr("river_llm.load.pretrained.load_backbone", lambda *_: loaded)
    monkeypatch.setattr(River, "build", lambda *_: pytest.fail("a river is built"))
    with pytest.raises(RiverError, match=message):
        RiverLM.from_pretrained("relu", CONFIG, POLICY, **settings)


class TestCommandLine:
    """`river-llm generate` says on stderr, in one line, that PyTorch serves in place of it."""

    @staticmethod
    def notes(*options: object) -> list[str]:
        arguments = ("--max-new-tokens", 1, "--group-size", 32, "--quantizer", "rtn", "--json")
        outcome = run("generate", PROMPT, *arguments, *options)
        assert outcome.exit_code == 0, outcome.stderr
        return [line for line in outcome.stderr.splitlines() if "PyTorch computes" in line]

    def test_of_dtypes_and_compilers(self, model: Path, request: pytest.FixtureRequest) -> None:
        reason = "the model is in float32, not bfloat16"
        assert self.notes("-m", model, "--dtype", "float32") == [NOTE + reason]
        assert self.notes("-m", model) == []
        assert self.notes("-m", model, "--engine", "torch", "--dtype", "float32") == []
        request.getfixturevalue("not_built")
        assert self.notes("-m", model) == [NOTE + NOT_BUILT]
        outcome = run("generate", PROMPT, "-m", model, "--engine", "cpu")
        outcome.check_fails(1, "g++ 12", "take --engine torch")
