"""Which engine serves a model, why it isn't the native one, and what the command line says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
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
from river_llm.engines import CpuEngine, EngineChoice, TorchEngine, make_engine
from river_llm.engines.choice import check_engine_options, why_not_native
from river_llm.store import ENVIRONMENT_VARIABLE

pytest.importorskip("river_llm._core", reason="the native engine was not built")
pytest_plugins = ["cli_models"]

POLICY = ExitPolicy.fixed(2)
CONFIG = RiverConfig(group_size=32, quantizer="rtn")
PROMPT = "Name three rivers."
NOTE = "river-llm: PyTorch computes: "


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that found no compiler."""
    monkeypatch.setattr("river_llm.engines.native_core._core", None)


def _model(architecture: str = "Llama", **settings: Any) -> PreTrainedModel:
    settings = {"dtype": torch.bfloat16, **ARCHITECTURES[architecture], **settings}
    return tiny_model(architecture, **settings)


def _engine(model: PreTrainedModel, choice: EngineChoice = "auto", **settings: Any) -> Any:
    return make_engine(model, River.build(model, CONFIG), POLICY, choice, **settings)


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
    def test_nothing_speaks_against_a_llama_in_bfloat16(self) -> None:
        assert why_not_native(_model()) is None

    @pytest.mark.parametrize("case", UNSUITED)
    def test_what_does_not_suit_it(self, case: str) -> None:
        architecture, settings, reason = UNSUITED[case]
        found = why_not_native(_model(architecture, **settings))
        assert found is not None
        assert re.search(reason, found)

    def test_another_device(self) -> None:
        assert why_not_native(_model().to("meta")) == "the model is on meta"

    @pytest.mark.usefixtures("not_built")
    def test_an_installation_without_a_compiler(self) -> None:
        reason = why_not_native(_model())
        assert reason == "the native engine was not built, for want of a compiler"


class TestMakeEngine:
    def test_auto_takes_the_native_engine_where_it_can(self) -> None:
        engine, reason = _engine(_model())
        assert isinstance(engine, CpuEngine)
        assert reason is None
        assert engine.policy == POLICY

    @pytest.mark.parametrize("case", ["float32", "an architecture", "GPT-2", "an activation"])
    def test_auto_falls_back_with_the_reason(self, case: str) -> None:
        architecture, settings, _ = UNSUITED[case]
        model = _model(architecture, **settings)
        expected = why_not_native(model)
        engine, reason = _engine(model)
        assert isinstance(engine, TorchEngine)
        assert reason == expected
        assert engine.prefill(torch.tensor([[5, 6]])).logits.isfinite().all()

    @pytest.mark.usefixtures("not_built")
    def test_auto_falls_back_where_the_native_engine_was_not_built(self) -> None:
        engine, reason = _engine(_model())
        assert isinstance(engine, TorchEngine)
        assert reason == "the native engine was not built, for want of a compiler"

    def test_torch_is_taken_without_a_reason(self) -> None:
        engine, reason = _engine(_model(), "torch")
        assert isinstance(engine, TorchEngine)
        assert reason is None

    def test_cpu_takes_a_model_in_float32(self) -> None:
        engine, reason = _engine(_model(dtype=torch.float32), "cpu")
        assert isinstance(engine, CpuEngine)
        assert reason is None

    @pytest.mark.parametrize("case", ["an architecture", "GPT-2", "an activation", "a head dim"])
    def test_cpu_refuses_with_a_mend(self, case: str) -> None:
        architecture, settings, _ = UNSUITED[case]
        model = _model(architecture, **settings)
        with pytest.raises(UnsupportedModelError, match=r"; take --engine torch$"):
            make_engine(model, River(CONFIG, [], "", "llama"), POLICY, "cpu")

    @pytest.mark.usefixtures("not_built")
    def test_cpu_refuses_where_the_native_engine_was_not_built(self) -> None:
        with pytest.raises(RiverError, match=r"install g\+\+ 12 .* or take --engine torch$"):
            _engine(_model(), "cpu")

    @pytest.mark.parametrize("choice", ["auto", "cpu"])
    def test_native_settings_reach_the_native_engine(self, choice: EngineChoice) -> None:
        settings = {"threads": 2, "backbone_bits": 8, "lm_head_bits": 8}
        engine, _ = _engine(_model(), choice, **settings)
        assert {name: getattr(engine, name) for name in settings} == settings

    def test_threads_reach_the_torch_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", taken.append)
        _engine(_model(), "torch", threads=3)
        _engine(_model(dtype=torch.float32), threads=4)
        _engine(_model(), "torch")
        assert taken == [3, 4]

    @pytest.mark.parametrize("bits", [{"backbone_bits": 8}, {"lm_head_bits": 8}])
    def test_8_bits_need_the_native_engine(self, bits: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=r"are for the native engine; take --engine cpu"):
            _engine(_model(), "torch", **bits)
        with pytest.raises(ConfigError, match="need the native engine: the model is in float32"):
            _engine(_model(dtype=torch.float32), **bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("llama.cpp", 16, 16), "engine is 'llama.cpp'; choose one of auto, cpu, torch"),
        (("auto", 4, 16), "the backbone has 4 bits; choose 16"),
        (("cpu", 16, 0), "the LM head has 0 bits; choose 16"),
        (("torch", 8, 16), "8 bits of the backbone are for the native engine"),
        (("torch", 16, 8), "8 bits of the LM head are for the native engine"),
    ],
)
def test_options_that_no_engine_takes_are_refused_before_loading(
    options: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine_options(*options)

    def load(*args: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("river_llm.pretrained.load_backbone", load)
    engine, backbone_bits, lm_head_bits = options
    bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
    with pytest.raises(ConfigError, match=message):
        RiverLM.from_pretrained("absent", engine=engine, **bits)


class TestRiverLM:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"engine": "cpu"}, "has no activation 'relu'; take --engine torch$"),
            ({"engine": "cpu", "device": "meta"}, "needs the model on a CPU, not on meta$"),
            ({"lm_head_bits": 8}, "need the native engine: .* has no activation 'relu'$"),
        ],
        ids=["architecture", "device", "8 bits"],
    )
    def test_what_the_native_engine_cannot_run_is_refused_before_a_river_is_built(
        self, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")  # or files are asked for
        loaded = _model(hidden_act="relu").to(settings.get("device", "cpu")), None
        monkeypatch.setattr("river_llm.pretrained.load_backbone", lambda *_: loaded)
        built: list[tuple[int, int]] = []
        with pytest.raises(RiverError, match=message):
            RiverLM.from_pretrained(
                "relu", CONFIG, POLICY, progress=lambda *done: built.append(done), **settings
            )
        assert built == []

    @pytest.mark.usefixtures("not_built")
    def test_an_engine_that_was_not_built_is_refused_before_loading(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*args: object) -> None:
            raise AssertionError("a model is loaded")

        monkeypatch.setattr("river_llm.pretrained.load_backbone", load)
        with pytest.raises(RiverError, match="native engine was not built"):
            RiverLM.from_pretrained("absent", engine="cpu")

    def test_without_a_compiler_the_torch_engine_answers(
        self, model: str, request: pytest.FixtureRequest
    ) -> None:
        native = RiverLM.from_pretrained(model, CONFIG, POLICY)
        assert native.engine.name == "cpu"
        assert native.fallback_reason is None
        request.getfixturevalue("not_built")
        lm = RiverLM.from_pretrained(model, CONFIG, POLICY)
        assert lm.engine.name == "torch"
        assert lm.fallback_reason == "the native engine was not built, for want of a compiler"
        assert len(lm.generate(PROMPT, max_new_tokens=3).tokens) == 3


class TestCommandLine:
    """`river-llm generate` says on stderr, in one line, that PyTorch serves in place of it."""

    @staticmethod
    def notes(*options: object) -> list[str]:
        arguments = ("--max-new-tokens", 1, "--group-size", 32, "--quantizer", "rtn", "--json")
        outcome = run("generate", PROMPT, *arguments, *options)
        assert outcome.exit_code == 0, outcome.stderr
        return [line for line in outcome.stderr.splitlines() if "PyTorch" in line]

    def test_of_another_dtype(self, model: str) -> None:
        reason = "the model is in float32, not bfloat16"
        assert self.notes("-m", model, "--dtype", "float32") == [NOTE + reason]

    @pytest.mark.usefixtures("not_built")
    def test_of_a_missing_compiler(self, model: str) -> None:
        reason = "the native engine was not built, for want of a compiler"
        assert self.notes("-m", model) == [NOTE + reason]

    def test_of_an_unsupported_model(self, model: str, tmp_path: Path) -> None:
        odd = shutil.copytree(model, tmp_path / "odd")
        config = json.loads((odd / "config.json").read_text())
        (odd / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
        reason = "the native engine has no activation 'relu'"
        assert self.notes("-m", odd) == [NOTE + reason]
        outcome = run("generate", PROMPT, "-m", odd, "--engine", "cpu")
        outcome.check_fails(1, f"{reason}; take --engine torch")

    def test_nothing_where_the_native_engine_serves_or_torch_was_asked_for(
        self, model: str
    ) -> None:
        assert self.notes("-m", model) == []
        assert self.notes("-m", model, "--engine", "torch") == []
        assert self.notes("-m", model, "--engine", "torch", "--dtype", "float32") == []

    def test_8_bits_are_refused_by_torch(self, model: str) -> None:
        for option in ("--backbone-bits", "--lm-head-bits"):
            outcome = run("generate", PROMPT, "-m", model, "--engine", "torch", option, 8)
            outcome.check_fails(1, "native engine; take --engine cpu")

    @pytest.mark.usefixtures("not_built")
    def test_the_native_engine_by_name_without_a_compiler(self, model: str) -> None:
        outcome = run("generate", PROMPT, "-m", model, "--engine", "cpu")
        outcome.check_fails(1, "g++ 12", "take --engine torch")
