"""Ctrl-C while the native engine runs: the cache holds what it held before, and it goes on."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

import pytest
import torch
from native_engines import Subject, random_tokens, subject_of
from torch import Tensor

from river_llm import ExitPolicy, RiverConfig
from river_llm.engines import CpuEngine
from river_llm.engines.native_model import RotaryTable

POLICY = ExitPolicy.fixed(2)
ids = torch.tensor


@pytest.fixture
def subject() -> Subject:
    return subject_of("llama")


class Interrupting:
    """The native core, where Ctrl-C comes while a pass runs: Python hears it when that returns."""

    def __init__(self, core: Any, passes: int) -> None:
        self._core = core
        self._passes = passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def forward(self, *args: Any) -> Any:
        result = self._core.forward(*args)
        self._passes -= 1
        if self._passes == 0:
            signal.raise_signal(signal.SIGINT)
        return result


@pytest.mark.parametrize("filled", [0, 6])
@pytest.mark.parametrize(
    ("verb", "tokens", "passes"),
    [
        ("prefill", ids([[5] * 40, [6] * 40]), 1),
        ("prefill", ids([[5] * 40, [6] * 40]), 3),
        ("decode", ids([5, 6]), 1),
        ("verify", ids([[5, 6], [7, 8]]), 1),
    ],
)
def test_in_a_pass_it_leaves_the_cache_as_it_was(
    subject: Subject,
    verb: str,
    tokens: Tensor,
    passes: int,
    filled: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("river_llm.engines.cpu_engine._PREFILL_ROWS", 16)
    engine, untouched = subject.engine(POLICY), subject.engine(POLICY)
    prompt = random_tokens(2, 6, seed=5)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False
    for each in (engine, untouched):
        if filled:
            each.prefill(prompt, mask)
    core = engine._core
    engine._core = Interrupting(core, passes)
    with pytest.raises(KeyboardInterrupt):
        getattr(engine, verb)(tokens)
    engine._core = core
    assert engine.length == filled
    for more in (tokens, tokens):
        step, expected = getattr(engine, verb)(more), getattr(untouched, verb)(more)
        assert torch.equal(step.logits, expected.logits)
    assert engine._core.length(0) == untouched._core.length(0)


def test_in_a_long_prefill_it_is_heard_between_the_passes() -> None:
    config = RiverConfig(group_size=32, quantizer="rtn")
    long_subject = Subject("Llama", {"max_position_embeddings": 32768}, config)
    engine, untouched = long_subject.engine(POLICY), long_subject.engine(POLICY)
    prompt = random_tokens(1, 30_000, seed=6)
    main = threading.get_ident()

    def interrupt() -> None:
        while not _tokens_in_cache(engine):
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(prompt)
    thread.join()
    assert engine.length == 0
    assert engine._passes < 30  # of 1024 tokens each
    step = engine.prefill(prompt[:, :9])
    assert torch.equal(step.logits, untouched.prefill(prompt[:, :9]).logits)


def test_before_a_pass_was_counted_it_leaves_nothing(subject: Subject) -> None:
    """The core may hold more than the engine counted: Ctrl-C can come between any two lines."""
    engine, untouched = subject.engine(POLICY), subject.engine(POLICY)
    prompt = random_tokens(2, 6, seed=7)
    for each in (engine, untouched):
        each.prefill(prompt)
    engine._core.forward([5, 6], [0, 1], [math.inf] * 4, [0, 1], [], [], False)
    last = ids([7, 8])
    assert torch.equal(engine.decode(last).logits, untouched.decode(last).logits)


def test_before_other_angles_were_set_it_leaves_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long contexts of Phi-3 turn all positions by other angles."""
    subject = subject_of("phi3, longrope")
    engine, untouched = subject.engine(POLICY), subject.engine(POLICY)
    prompt, more = random_tokens(1, 10, seed=8), random_tokens(1, 10, seed=9)
    for each in (engine, untouched):
        each.prefill(prompt)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RotaryTable, "angles", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(more)
    assert engine.length == 10
    assert torch.equal(engine.prefill(more).logits, untouched.prefill(more).logits)


def _tokens_in_cache(engine: CpuEngine) -> int:
    """What the native core has, while a prefill runs."""
    try:
        return engine._core.length(0)
    except ValueError:  # not even the sequence yet
        return 0
