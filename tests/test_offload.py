"""Backbone layers that are evicted and come back: the same answers, whatever stays in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from stored_models import PROMPT, save_model, start, start_without_cache

from river_llm import ExitPolicy, RiverLM
from river_llm.errors import ConfigError, PromptCacheError, RiverError
from river_llm.memory import resident_memory_bytes
from river_llm.river.residency import OffloadConfig
from river_llm.store import cached_folders

LAYERS = 4


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved tiny model, and a cache of the test's own."""
    monkeypatch.setenv("RIVER_LLM_CACHE", str(tmp_path / "cache"))
    return save_model(tmp_path / "model")


def answer(lm: RiverLM, **settings: Any) -> list[int]:
    return lm.generate(PROMPT, **{"max_new_tokens": 40, **settings}).tokens


class TestRiverLM:
    @pytest.mark.parametrize("offload", ["0", "2", "auto", OffloadConfig("layers", layers=4)])
    def test_answers_the_same_from_the_first_start_on(self, offload: Any, model: Path) -> None:
        expected = answer(start_without_cache(model))
        backbones = answer(start_without_cache(model, policy=ExitPolicy.never()))
        for _ in range(2):  # packed now, and from the packed copy
            lm = start(model, offload=offload)
            assert lm.residency is not None
            assert lm.engine.resident_layers == lm.residency.resident
            assert answer(lm) == expected
            assert answer(lm, policy=None) == backbones

    def test_keeps_what_a_budget_holds(self, model: Path) -> None:
        engine = start(model).engine
        budget = engine.rest_bytes + 2 * engine.layer_bytes[0] + 5
        lm = start(model, offload=OffloadConfig("budget", max_bytes=budget))
        assert lm.engine.resident_layers == 2
        weights = lm.engine._core.weight_bytes  # type: ignore[attr-defined]
        assert weights < engine._core.weight_bytes - engine.layer_bytes[0]  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="alone take"):
            start(model, offload=OffloadConfig("budget", max_bytes=10))
        assert [folder.is_whole() for folder in cached_folders()] == [True]

    def test_of_auto_learns_how_deep_tokens_go(self, model: Path) -> None:
        lm = start(model, offload="auto", policy=ExitPolicy.similarity(-1.0, first_layer=2))
        assert lm.residency is not None
        assert lm.engine.resident_layers == LAYERS
        result = lm.generate(PROMPT, max_new_tokens=80)
        assert lm.engine.resident_layers == 2
        assert result.offload is not None
        assert result.offload.resident_layers == 2
        assert answer(lm) == answer(start_without_cache(model, policy=lm.policy))

    def test_reports_the_cost_of_each_answer(self, model: Path) -> None:
        lm = start(model, offload="1", policy=ExitPolicy.never())
        first, second = (lm.generate(PROMPT, max_new_tokens=5).offload for _ in range(2))
        assert first is not None
        assert second is not None
        assert first.misses == second.misses == 3 * 5  # the prompt and four steps
        assert first.bytes_read == 15 * lm.engine.layer_bytes[0]
        assert start(model).generate(PROMPT, max_new_tokens=5).offload is None

    def test_without_misses_caps_the_depth(self, model: Path) -> None:
        lm = start(model, offload="2", no_miss=True, policy=ExitPolicy.never())
        result = lm.generate(PROMPT, max_new_tokens=6)
        assert set(result.exit_layers) == {2}
        assert result.offload is not None
        assert result.offload.misses == 0
        assert result.offload.depth_capped == result.prompt_tokens + 5
        with pytest.raises(ConfigError, match="whole backbone"):
            lm.generate(PROMPT, policy=None)

    def test_shares_prompt_caches_with_whatever_stays(self, model: Path, tmp_path: Path) -> None:
        lm, file = start(model), tmp_path / "prompt.safetensors"
        expected = answer(lm)
        lm.save_prompt_cache(file)
        offloaded = start(model, offload="1")
        assert offloaded.load_prompt_cache(file) > 0
        assert answer(offloaded) == expected
        offloaded.save_prompt_cache(file)
        assert lm.load_prompt_cache(file) > 0
        limited = start(model, offload="1", no_miss=True)
        with pytest.raises(PromptCacheError, match="depth limit"):
            limited.load_prompt_cache(file)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"no_miss": True}, "no_miss goes with offload"),
            ({"offload": "5"}, "the model has 4"),
        ],
    )
    def test_refuses_what_makes_no_plan(
        self, settings: dict[str, Any], message: str, model: Path
    ) -> None:
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                start(model, **settings)
            start(model)

    def test_needs_the_packed_copy(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="RIVER_LLM_CACHE=off"):
            start_without_cache(model, offload="1")
        monkeypatch.setattr(
            "river_llm.load.repacked_weights.CachedFolder.keep",
            lambda *_: None,  # a full disk
        )
        with pytest.raises(RiverError, match="could not be written"):
            start(model, offload="1")


class TestCommand:
    def test_says_what_offloading_cost(self, model: Path) -> None:
        generate = ["generate", PROMPT, "-m", model, "-n", 3]
        offloaded = [*generate, "--offload", "1", "--policy", "never"]
        assert run(*generate, "--json").json["offload"] is None
        output = run(*offloaded, "--json").json
        assert output["offload"]["resident_layers"] == 1
        assert output["offload"]["misses"] == 9
        words = run(*offloaded, "--no-miss").stderr
        for said in ("offloading: 1 of 4 layers stay", "1 layers in memory", "tokens capped"):
            assert said in words

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--offload", "most"], "give off, auto"),
            (["--no-miss", "--offload", "off"], "--no-miss goes with offload"),
            (["--no-miss", "--offload", "1"], "leave out --no-miss"),
            (["--no-miss", "--offload", "1", "--compare"], "leave out --no-miss"),
        ],
    )
    def test_refuses_contradictions(self, options: list[str], message: str, model: Path) -> None:
        run("generate", PROMPT, "-m", model, *options).check_fails(2, message)


class TestMemory:
    def test_does_not_grow_over_many_answers(self, model: Path) -> None:
        lm = start(model, offload="1")
        for _ in range(20):
            answer(lm, max_new_tokens=8)
        before = resident_memory_bytes()
        for _ in range(200):
            answer(lm, max_new_tokens=8)
        assert resident_memory_bytes() <= 1.02 * before

    def test_of_less_than_the_backbone_is_enough(self, run_limited: Callable[[str], str]) -> None:
        """Address space for the river and the head, and not for all layers of SmolLM2."""
        assert run_limited("off") == "not enough memory"
        assert run_limited("0") == run_limited("1") != ""


@pytest.fixture
def run_limited() -> Callable[[str], str]:
    """The real model's answer in a process that may take 300 MB more than Python and its libraries
    do, with layers offloaded so."""
    lm = RiverLM.from_pretrained("smollm2", device="cpu", threads=1)  # see that it is in the cache
    del lm

    def run(offload: str) -> str:
        process = subprocess.run(
            [sys.executable, "-c", _LIMITED, offload], capture_output=True, text=True, timeout=120
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    return run


_LIMITED = """
import re, resource, sys
import torch
from pathlib import Path
from river_llm import ExitPolicy, RiverLM
import river_llm.engines.cpu, tokenizers, transformers

torch.set_num_threads(1)
size = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
limit = size + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    lm = RiverLM.from_pretrained(
        "smollm2", policy=ExitPolicy.fixed(2), device="cpu", threads=1, offload=sys.argv[1]
    )
    print(lm.generate("Why is the sky blue?", max_new_tokens=8).tokens)
except MemoryError:
    print("not enough memory")
"""
