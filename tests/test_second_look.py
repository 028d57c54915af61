"""A second look: unsure tokens run again through the backbone, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lossless_lm import CONTEXT, PROMPTS, RANDOM, both_engines, lm_on, overflowing_subject
from native_engines import Subject, engine_of, random_tokens
from steps import append, begin, cached_states
from torch import Tensor
from toy_engine import ToyEngine

from river_llm import ConfigError, ExitPolicy, River, RiverLM, SamplingConfig, attach_river
from river_llm.engines import Engine, Step, StepResult
from river_llm.engines.native_model import RopeBoundary
from river_llm.errors import LogitsError
from river_llm.generate import Generator, Request
from river_llm.generate.second_look import run_step, tokens_before
from river_llm.river.residency import OffloadConfig, ResidencyPlan

LOOK = 0.6  # at some tokens of the tiny model
TAU = 0.75  # by which some of them leave
POLICIES = [
    ExitPolicy.fixed(1),
    ExitPolicy.always(prefill="backbone"),
    ExitPolicy.similarity(TAU),
    ExitPolicy.similarity(TAU, batch="minimum"),
]
PREFILLS = [ExitPolicy.fixed(2, prefill=rule) for rule in ("river", "sequence", "token")]
any_policy = pytest.mark.parametrize("policy", POLICIES, ids=ExitPolicy.describe)
greedy_and_sampled = pytest.mark.parametrize("settings", [{}, RANDOM], ids=["greedy", "sampled"])


def looking(policy: ExitPolicy, margin: float = LOOK) -> ExitPolicy:
    return replace(policy, second_look=margin)


def plain_margin(logits: Tensor) -> float:
    """By the definition."""
    if not math.isfinite(float(logits.max())):
        return math.nan
    first, second = logits.double().softmax(-1).sort(descending=True).values[:2].tolist()
    return 1 - second / first


def plain_answer(
    engine: Engine, prompt: Sequence[int], policy: ExitPolicy, count: int
) -> tuple[list[int], list[int], list[bool]]:
    """Greedy tokens, their exit layers and whether there was a second look, step by step."""
    (sequence,) = begin(engine, [len(prompt)])
    thresholds = policy.prefill_thresholds(engine.num_layers)
    groups = [0] * len(prompt) if policy.prefill == "sequence" else ()
    step = append(engine, {sequence: prompt}, thresholds, mean_groups=groups)
    tokens, exit_layers, looks = [], [], []
    text = list(prompt)
    for _ in range(count):
        logits, exit_layer = step.logits[-1], int(step.exit_layers[-1])
        looks.append(exit_layer < engine.num_layers and plain_margin(logits) <= LOOK)
        if looks[-1]:
            start = max(len(prompt), len(text) - 8) if len(text) > len(prompt) else len(prompt) - 1
            engine.truncate(sequence, start)
            for token in text[start:]:
                step = append(engine, {sequence: [token]})
            logits, exit_layer = step.logits[-1], engine.num_layers
        tokens.append(int(logits.argmax()))
        exit_layers.append(exit_layer)
        text.append(tokens[-1])
        step = append(engine, {sequence: text[-1:]}, policy)
    engine.drop_sequence(sequence)
    return tokens, exit_layers, looks


@both_engines
class TestAnswers:
    @greedy_and_sampled
    @any_policy
    def test_are_the_backbones_where_every_token_runs_again(
        self, kind: str, policy: ExitPolicy, settings: dict[str, Any]
    ) -> None:
        lm = lm_on(kind, policy=looking(policy, 1.0))
        settings = {"raw": True, "max_new_tokens": 12, **settings}
        found = lm.generate_batch(PROMPTS, **settings)
        expected = lm.generate_batch(PROMPTS, policy=ExitPolicy.never(), **settings)
        for one, other in zip(found, expected, strict=True):
            assert one.tokens == other.tokens
            assert one.exit_layers == other.exit_layers
            assert other.second_looks is None
            assert one.second_looks is not None
            # the first comes of the prompt, which stayed
            assert one.second_looks == 11 or (policy.kind == "similarity" and one.second_looks < 11)

    @greedy_and_sampled
    @any_policy
    def test_are_those_without_where_no_margin_is_so_small(
        self, kind: str, policy: ExitPolicy, settings: dict[str, Any]
    ) -> None:
        lm = lm_on(kind)
        settings = {"raw": True, "max_new_tokens": 12, **settings}
        found = lm.generate(PROMPTS[0], policy=looking(policy, 1e-9), **settings)
        expected = lm.generate(PROMPTS[0], policy=policy, **settings)
        assert (found.tokens, found.exit_layers) == (expected.tokens, expected.exit_layers)
        assert found.second_looks == 0

    @pytest.mark.parametrize("policy", [*POLICIES, *PREFILLS])
    def test_are_those_of_single_steps(self, kind: str, policy: ExitPolicy) -> None:
        lm = lm_on(kind, policy=looking(policy))
        counts = []
        for prompt in PROMPTS:
            ids = lm.tokenizer(prompt).input_ids
            found = lm.generate(prompt, raw=True, max_new_tokens=12)
            lm.forget_cache()
            tokens, exit_layers, looks = plain_answer(lm.engine, ids, looking(policy), 12)
            assert (found.tokens, found.exit_layers) == (tokens, exit_layers)
            assert found.second_looks == sum(looks)
            counts.append(sum(looks))
        assert 0 < sum(counts) < 12 * len(PROMPTS)

    @greedy_and_sampled
    @pytest.mark.parametrize("policy", POLICIES[:3], ids=ExitPolicy.describe)
    def test_are_alike_alone_and_in_a_batch(
        self, kind: str, policy: ExitPolicy, settings: dict[str, Any]
    ) -> None:
        lm = lm_on(kind, policy=looking(policy))
        settings = {"raw": True, "max_new_tokens": 12, **settings}
        together = lm.generate_batch(PROMPTS[:1] * 2 + PROMPTS[1:], **settings)
        alone = lm.generate(PROMPTS[0], **settings)
        for name in ("tokens", "exit_layers", "second_looks"):
            assert getattr(together[0], name) == getattr(alone, name), name

    def test_of_a_river_without_numbers_are_the_backbones(self, kind: str) -> None:
        policy = ExitPolicy.always(prefill="backbone", second_look=1e-9)
        lm = lm_on(kind, overflowing_subject(), policy)
        found = lm.generate(PROMPTS[0], raw=True, max_new_tokens=6)
        expected = lm.generate(PROMPTS[0], raw=True, max_new_tokens=6, policy=ExitPolicy.never())
        assert found.tokens == expected.tokens

    def test_stream_the_count_so_far(self, kind: str) -> None:
        lm = lm_on(kind, policy=ExitPolicy.fixed(1, second_look=1.0))
        found = list(lm.stream(PROMPTS[0], raw=True, max_new_tokens=4))
        assert [response.second_looks for response in found] == [0, 1, 2, 3]
        assert [response.mean_exit_layer for response in found] == [4] * 4

    def test_a_longer_prompt_takes_over_what_reading_it_gives(self, kind: str) -> None:
        """The last token of a prompt, which may have run again, is none of it."""
        lm = lm_on(kind, policy=ExitPolicy.always(second_look=1.0))
        lm.generate(PROMPTS[0], raw=True, max_new_tokens=4, reuse_cache=True)
        longer = PROMPTS[0] + PROMPTS[2]
        found = lm.generate(longer, raw=True, max_new_tokens=6, reuse_cache=True)
        assert found.cached_prompt_tokens == len(lm.tokenizer(PROMPTS[0]).input_ids) - 1
        assert found.tokens == lm.generate(longer, raw=True, max_new_tokens=6).tokens


def test_keys_and_values_are_overwritten_by_exact_ones() -> None:
    """Of the token and of those before it."""
    engine = lm_on("cpu").engine
    ran, expected = begin(engine, [0, 0])
    tokens = random_tokens(10, seed=1)
    thresholds = torch.tensor(ExitPolicy.fixed(1).thresholds(engine.num_layers))
    for sequence in (ran, expected):
        append(engine, {sequence: tokens[:2]}, thresholds)
    for end, look in enumerate([None, 1.0, None, None, 1.0, None, None, 1.0], start=3):
        step = Step([tokens[end - 1]], [ran], thresholds, [0])
        before = [tokens_before(engine, tokens, end, 2)]
        result, again = run_step(engine, step, [look], before)
        found = result.logits
        exact = append(engine, {expected: [tokens[end - 1]]})
        assert again == ({} if look is None else {0: 1})
        assert look is None or torch.equal(found, exact.logits)
    assert torch.equal(cached_states(engine, ran), cached_states(engine, expected))  # type: ignore[arg-type]


def test_up_to_seven_tokens_run_again_with_one() -> None:
    engine, text = ToyEngine(), list(range(20))
    assert tokens_before(engine, text, 20) == text[12:19]
    assert tokens_before(engine, text, 5) == text[:4]
    assert tokens_before(engine, text, 20, 17) == [17, 18]
    assert tokens_before(engine, text, 20, 20) == []
    engine.rope_boundary = RopeBoundary(15, keep_changing=False)  # type: ignore[assignment]
    assert tokens_before(engine, text, 15) == text[7:14]
    assert tokens_before(engine, text, 16) == []  # its angles are others


def test_rows_that_stay_or_are_not_asked_for_run_once() -> None:
    engine = ToyEngine()
    first, second, third = begin(engine, [0] * 3)
    thresholds = torch.full((3, 4), -math.inf)
    thresholds[1] = math.inf
    step = Step([5, 6, 7], [first, second, third], thresholds, range(3))
    result, again = run_step(engine, step, [1.0, 1.0, None])
    assert again == {0: 0}
    assert result.exit_layers.tolist() == [4, 4, 0]
    assert [len(one.tokens) for one in engine.steps] == [3, 1]
    whole, others = ToyEngine(), ToyEngine()
    for other in (whole, others):
        begin(other, [0] * 3)
    rows = [append(whole, {0: [5], 1: [6]}).logits, others.forward(step).logits[2:]]
    assert torch.equal(result.logits, torch.cat(rows))
    assert torch.equal(result.best_tokens, torch.cat(rows).argmax(-1))


def test_margins_are_taken_where_somebody_asks_for_them() -> None:
    engine = ToyEngine()
    (sequence,) = begin(engine)
    step = Step([5], [sequence], torch.full((4,), -math.inf), [0])
    run_step(engine, step, [None])
    run_step(engine, step, [1.0])
    assert [one.record_margins for one in engine.steps] == [False, True, False]


numbers = st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, math.inf, -math.inf, math.nan])


@given(st.lists(st.lists(numbers, min_size=7, max_size=7), min_size=1, max_size=4))
def test_margins_are_those_of_the_softmax(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    expected = [plain_margin(row) for row in logits]
    found = StepResult(logits, torch.zeros(len(rows))).margins.tolist()
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_margins_are_those_of_its_logits(case: str, threads: int) -> None:
    engine = engine_of(case, threads=threads)
    tokens = random_tokens(40, seed=3)
    wanted = range(1, 40, 2)
    for policy in (ExitPolicy.never(), ExitPolicy.always()):
        (sequence,) = begin(engine)
        step = append(engine, {sequence: tokens}, policy, record_margins=True, logit_rows=wanted)
        expected = [plain_margin(row) for row in step.logits]
        assert step.margins.tolist() == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 0.3


@both_engines
def test_margins_of_what_is_no_number_are_none(kind: str) -> None:
    engine = lm_on(kind, overflowing_subject()).engine
    (sequence,) = begin(engine)
    step = append(engine, {sequence: [5, 6]}, ExitPolicy.always(), record_margins=True)
    assert all(map(math.isnan, step.margins.tolist()))


@both_engines
def test_a_look_that_gives_no_numbers_ends_its_own_answer_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
    monkeypatch.setattr(River, "check_fits", lambda *_: None)
    subject.model.model.layers[2].mlp.down_proj.weight.data.fill_(math.nan)  # of the backbone
    lm, policy = lm_on(kind, subject), ExitPolicy.always()
    expected = lm.generate(PROMPTS[0], raw=True, max_new_tokens=6, policy=policy).tokens
    ids, generator = lm.tokenizer(PROMPTS[0]).input_ids, Generator(lm.engine)
    requests = [
        Request(ids, lm.tokenizer, SamplingConfig(max_new_tokens=6), one)
        for one in (policy, looking(policy, 1.0))
    ]
    for request in requests:
        generator.add(request)
    while not generator.is_idle:
        generator.step()
    assert isinstance(requests[1].error, LogitsError)
    assert requests[0].tokens[len(ids) :] == expected


class TestRefused:
    def test_where_the_depth_is_limited(self) -> None:
        lm = lm_on("cpu")
        lm.engine.depth_limit = 2  # type: ignore[attr-defined]
        message = "a second look runs the whole backbone; it can't go with no_miss"
        policy = ExitPolicy.fixed(1, second_look=0.5)
        with pytest.raises(ConfigError, match=message):
            lm.policy = policy
        with pytest.raises(ConfigError, match=message):
            lm.generate("a", policy=policy)
        with pytest.raises(ConfigError, match=message):
            RiverLM(lm.engine, lm.tokenizer, lm.river_config, policy=policy)

    def test_on_a_models_own_generate(self) -> None:
        attached = lm_on("torch").engine.attached  # type: ignore[attr-defined]
        policy = ExitPolicy.fixed(1, second_look=0.5)
        with pytest.raises(ConfigError, match="a second look runs a token twice"):
            attached.policy = policy
        with pytest.raises(ConfigError, match="take RiverLM for it"):
            attach_river(overflowing_subject().model, policy=policy)


def test_all_layers_stay_until_tokens_are_seen() -> None:
    plans = [
        ResidencyPlan(OffloadConfig("auto"), [10] * 4, 5, ExitPolicy.fixed(1, second_look=look))
        for look in (None, 0.1)
    ]
    assert [plan.resident for plan in plans] == [1, 4]
