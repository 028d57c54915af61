"""Settings that `RiverLM.from_pretrained` refuses before it loads anything, and those that it takes
with a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from tiny_lm import character_tokenizer
from transformers import PreTrainedModel

from river_llm import ConfigError, ExitPolicy, RiverConfig, RiverLM
from river_llm.engines import choice
from river_llm.load.model import load_backbone

CONFIG = RiverConfig(group_size=32, quantizer="rtn")


@pytest.fixture
def _no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise AssertionError("a model is loaded")

    for name in ("load_backbone", "packed_folder"):
        monkeypatch.setattr(f"river_llm.pretrained.{name}", load)


@pytest.fixture
def directory(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A model directory, its weights in float32."""
    tiny_llama.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return tmp_path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a policy's name": ({"policy": "never"}, "policy is 'never'; give an ExitPolicy"),
    "no policy": ({"policy": False}, "policy is False; give an ExitPolicy"),
    "no river": (
        {"river": True},
        "river is True; give the folder of one, a River, or a RiverConfig",
    ),
    "part of a layer": ({"offload": 2.5}, "offload is 2.5; give off, auto, a number of layers"),
    "offload true": ({"offload": True}, "offload is True; give off, auto"),
    "int8": (
        {"dtype": torch.int8},
        r"dtype is torch.int8; choose one of torch.bfloat16, .*16, .*32",
    ),
    "a dtype's name": ({"dtype": "float32"}, "dtype is 'float32'; choose one of torch.bfloat16"),
    "no thread": ({"threads": 0}, "threads is 0; it must be a whole number from 1 to 1024"),
    "too many threads": ({"threads": 1025}, "threads is 1025; it must be a whole number from 1"),
    "half a thread": ({"threads": 2.5}, "threads is 2.5; it must be a whole number"),
    "threads true": ({"threads": True}, "threads is True; it must be a whole number"),
}


@pytest.mark.usefixtures("_no_load")
@pytest.mark.parametrize("engine", ["auto", "cpu", "torch"])
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], message: str, engine: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        RiverLM.from_pretrained("absent", engine=engine, **settings)


class TestDtype:
    @pytest.mark.usefixtures("_no_load")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_other_than_bfloat16_is_not_for_the_native_engine(self, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        wanted = f"computes in bfloat16, not in {name}; leave the dtype out, or take --engine torch"
        with pytest.raises(ConfigError, match=wanted):
            RiverLM.from_pretrained("absent", dtype=dtype, engine="cpu")

    def test_of_the_command_line_too(self, directory: Path) -> None:
        options = ("--engine", "cpu", "--dtype", "float32", "-m", directory)
        run("generate", "Hi", *options).check_fails(1, "computes in bfloat16, not in float32")

    def test_left_out_rounds_a_checkpoint_in_float32(self, directory: Path) -> None:
        lm = RiverLM.from_pretrained(directory, CONFIG, engine="cpu")
        assert lm.engine.name == "cpu"
        assert len(lm.generate("Hi", max_new_tokens=3).tokens) == 3

    def test_is_one_that_weights_can_be_loaded_in(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"dtype is torch\.int8; choose one of"):
            load_backbone(tmp_path, torch.int8)


class TestThreads:
    @pytest.fixture(autouse=True)
    def _forgetful(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice._warn_of_many.cache_clear()
        monkeypatch.setattr(choice, "usable_threads", lambda: 2)

    def test_more_than_cores_are_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(3):
            choice.check_threads(1000)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            "1000 threads share the 2 cores that this process may use, and wait for each other; "
            "leave the threads out, or take 2 at most"
        )

    @pytest.mark.parametrize("threads", [None, 1, 2])
    def test_as_many_as_cores_are_nothing_to_tell(
        self, threads: int | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        choice.check_threads(threads)
        assert caplog.records == []


class TestOffload:
    def test_a_number_is_a_number_of_layers(self, directory: Path) -> None:
        lm = RiverLM.from_pretrained(directory, CONFIG, offload=2, engine="torch")
        assert lm.residency is not None
        assert lm.residency.resident == 2

    def test_no_miss_goes_with_a_number(self, directory: Path) -> None:
        settings: dict[str, Any] = {"offload": 1, "no_miss": True, "engine": "torch"}
        lm = RiverLM.from_pretrained(directory, CONFIG, ExitPolicy.never(), **settings)
        assert set(lm.generate("Hi", max_new_tokens=4).exit_layers) == {1}


@pytest.mark.parametrize("policy", [None, "never", 0.9])
def test_a_policy_that_is_none_leaves_the_one_before(
    make_lm: Callable[..., RiverLM], policy: Any
) -> None:
    lm = make_lm()
    before = lm.policy
    with pytest.raises(ConfigError, match=r"exit policy is .*; give an ExitPolicy"):
        lm.policy = policy
    assert lm.policy == before
