"""Variants along one answer, on an engine that follows a script and on tiny models."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lossless_lm import NUM_LAYERS, PROMPTS, lm_on
from tiny_lm import character_tokenizer
from toy_engine import ToyEngine

from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.comparison import compare_variants
from river_llm.engines.step import Step, StepResult

PROMPT = [7, 8, 9]
ANSWER = [3, 1, 4, 1, 5]
NEVER, ALWAYS, FIXED = ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(2)
VARIANTS = {"backbone": NEVER, "full 4-bit": ALWAYS, "River": FIXED}
# By the number of layers that decoded tokens run: the argmax after the prompt and after each token
# but the last of the answer.
SCRIPT = {4: [3, 1, 4, 1, 5], 0: [2, 1, 0, 0, 5], 2: [3, 1, 4, 0, 5]}


class ScriptedEngine(ToyEngine):
    """Answers by `SCRIPT`, whatever it is given.

    Attributes:
        now: the time on its clock; a prompt takes 100 seconds, a decoded token `seconds[layers]`.
        order: the layers that each decoded token ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.seconds = dict.fromkeys(SCRIPT, 1.0)
        self.order: list[int] = []
        self._first: int | None = None

    def forward(self, step: Step) -> StepResult:
        result = super().forward(step)
        (sequence,) = set(step.sequences)
        place = self.length(sequence) - len(PROMPT)
        layers = int(result.exit_layers[0])
        if place:
            self.now += self.seconds[layers]
            self.order.append(layers)
            assert step.tokens == [ANSWER[place - 1]]
        else:
            self.now += 100
            self._first = None
        logits = torch.zeros(1, self.vocab_size)
        # the prompt of the backbone's rule says by itself nothing of who decodes
        logits[0, SCRIPT[layers][place]] = 1
        return StepResult(logits, result.exit_layers)


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> RiverLM:
    engine = ScriptedEngine()
    clock = SimpleNamespace(perf_counter=lambda: engine.now)
    monkeypatch.setattr("river_llm.comparison.time", clock)
    return RiverLM(engine, character_tokenizer(), RiverConfig())


def test_counts_agreement_layers_and_the_speed_of_decoding_alone(lm: RiverLM) -> None:
    """Four decodes in each round; their seconds change from round to round."""
    engine: Any = lm.engine
    seconds = {4: [4, 1, 8], 0: [1, 1, 1], 2: [0.5, 2, 0.25]}
    told: list[tuple[int, int]] = []

    def next_round(done: int, total: int) -> None:
        told.append((done, total))
        for layers, rounds in seconds.items():
            engine.seconds[layers] = rounds[min(done // 3, 2)]

    next_round(0, 9)
    results = compare_variants(lm, PROMPT, ANSWER, VARIANTS, rounds=3, progress=next_round)
    assert [result.name for result in results] == list(VARIANTS)
    assert [result.policy for result in results] == [
        "never leaves",
        "leaves at once",
        "exit after 2",
    ]
    assert [result.agreement for result in results] == [1, 2 / 5, 4 / 5]
    assert [result.mean_exit_layer for result in results] == [4, 0, 2]
    for result, rounds in zip(results, seconds.values(), strict=True):
        speeds = [1 / step for step in rounds]
        assert result.decode_tokens_per_second == statistics.median(speeds)
        assert (result.slowest, result.fastest) == (min(speeds), max(speeds))
    forth = [4, 0, 2]
    assert engine.order[::4] == [*forth, *forth[::-1], *forth]  # neither always comes first
    assert told == [(n, 9) for n in range(10)]
    assert engine.sequences() == []


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_lossless_mode_is_compared_with_the_others(kind: str) -> None:
    lm = lm_on(kind)
    prompt = lm.tokenizer(PROMPTS[0]).input_ids
    answer = lm.generate(PROMPTS[0], raw=True, policy=NEVER, max_new_tokens=16).tokens
    variants = {"lossless": None, **VARIANTS}
    results = compare_variants(lm, prompt, answer, variants, rounds=2)
    lossless, backbone, full, river = results
    assert lossless.agreement == backbone.agreement == 1
    assert full.agreement < 1
    layers = [result.mean_exit_layer for result in (lossless, backbone, full, river)]
    assert layers == [NUM_LAYERS, NUM_LAYERS, 0, 2]
    assert all(0 < result.slowest <= result.fastest for result in results)
    wrong = [*answer[:8], (answer[8] + 1) % 97, *answer[9:]]
    (result,) = compare_variants(lm, prompt, wrong, {"backbone": NEVER}, rounds=1)
    assert result.agreement < 1
