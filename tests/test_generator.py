"""The loop: requests join, step together and leave, and none notices the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import character_tokenizer
from toy_engine import NUM_LAYERS, VOCABULARY, DraftingEngine, ToyEngine

from river_llm import ConfigError, ContextFullError, DraftConfig, ExitPolicy, RiverError
from river_llm.config import SamplingConfig
from river_llm.errors import LogitsError
from river_llm.generate import Generator, Recorder, Request, StepEvent

TOKENIZER = character_tokenizer()
NEVER = ExitPolicy.never()
POLICIES = [
    None,
    NEVER,
    ExitPolicy.always(),
    ExitPolicy.similarity(0.6),
    ExitPolicy.similarity(0.6, prefill="token"),
    ExitPolicy.fixed(2, prefill="sequence"),
    ExitPolicy.fixed(2, second_look=0.9),
    ExitPolicy.similarity(0.6, prefill="token", second_look=0.9),
]
SAMPLING = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    {"repetition_penalty": 1.3},
]
DRAFTS = [
    DraftConfig(),
    DraftConfig(3),
    DraftConfig(4, NUM_LAYERS, ngram=False),
    DraftConfig(2, 1, 16),
]


def make(
    prompt: Sequence[int] = (5, 6, 7),
    policy: ExitPolicy | None = NEVER,
    drafts: DraftConfig | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    index: int = 0,
    **sampling: Any,
) -> Request:
    settings = SamplingConfig(**{"max_new_tokens": 8, "seed": 3, **sampling})
    return Request(
        prompt, TOKENIZER, settings, policy, drafts=drafts, stop_tokens=stop_tokens, index=index
    )


def run(generator: Generator, requests: Sequence[Request] = ()) -> list[StepEvent]:
    """Add requests, and step until all have ended."""
    for request in requests:
        generator.add(request)
    events = []
    while not generator.is_idle:
        events.append(generator.step())
    return events


def answer(request: Request) -> list[int]:
    return request.tokens[request.prompt_length :]


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Of a request."""
    policy = draw(st.sampled_from(POLICIES))
    return {
        # of few tokens, so that the text repeats itself
        "prompt": draw(st.lists(st.integers(3, 7), min_size=1, max_size=20)),
        "policy": policy,
        "drafts": draw(st.sampled_from(DRAFTS)) if policy is None else None,
        "stop_tokens": draw(st.sampled_from([frozenset(), frozenset(range(20, 30))])),
        "max_new_tokens": draw(st.integers(1, 16)),
        **draw(st.sampled_from(SAMPLING)),
    }


class TestRequests:
    @given(
        asked=st.lists(st.tuples(arguments(), st.integers(0, 9)), min_size=1, max_size=4),
        cancelled=st.integers(0, 12),
        engine=st.sampled_from([ToyEngine, DraftingEngine]),
    )
    def test_are_answered_alike_alone_and_in_any_company(
        self, asked: list[tuple[dict[str, Any], int]], cancelled: int, engine: type[ToyEngine]
    ) -> None:
        """Whoever joins, leaves or is cancelled beside them, and whatever is drafted."""
        generator = Generator(engine())
        requests = [(make(**settings), join) for settings, join in asked]
        other = make([9, 9, 9, 9], None, max_new_tokens=30)
        generator.add(other)
        for number in range(100):
            for request, join in requests:
                if join == number:
                    generator.add(request)
            if number == cancelled:
                generator.cancel(other)
            generator.remove_cancelled()
            if not generator.is_idle:
                generator.step()
        assert generator.engine.sequences() == []
        for request, (settings, _) in zip((r for r, _ in requests), asked, strict=True):
            policy = settings["policy"] or NEVER
            alone = make(**{**settings, "policy": policy, "drafts": None})
            run(Generator(ToyEngine()), [alone])
            assert answer(request) == answer(alone)
            assert request.exit_layers == alone.exit_layers
            assert request.finish_reason == alone.finish_reason

    def test_that_are_cancelled_leave_the_engine(self) -> None:
        generator = Generator(ToyEngine(prefill_rows=4))
        prompt, decoding = make(range(3, 20)), make()
        generator.add(prompt)
        generator.add(decoding)
        for _ in range(4):
            generator.step()
        generator.cancel(prompt)
        generator.cancel(prompt)
        generator.remove_cancelled()
        assert generator.engine.sequences() == [decoding.sequence]
        assert prompt.finish_reason == "interrupted"
        generator.cancel(decoding)
        generator.remove_cancelled()
        assert generator.is_idle
        assert generator.engine.sequences() == []

    def test_may_hand_on_their_sequence(self) -> None:
        generator = Generator(ToyEngine())
        kept: list[tuple[int, int]] = []

        def keep(request: Request) -> None:
            kept.append((request.sequence, generator.engine.length(request.sequence)))

        first = make(
            policy=None, drafts=DraftConfig(4, NUM_LAYERS), stop_tokens=frozenset(range(40))
        )
        generator.add(first, keep=keep)
        run(generator)
        ((sequence, length),) = kept
        assert length == len(first.tokens) - 1
        second = make([*first.tokens, 8], None)
        generator.add(second, sequence=sequence)
        assert second.cached_tokens == length
        events = run(generator)
        assert events[0].outcomes[second].prompt_tokens == 2
        alone = make([*first.tokens, 8])
        run(Generator(ToyEngine()), [alone])
        assert answer(second) == answer(alone)
        assert generator.engine.sequences() == []


class TestPrompts:
    def test_run_in_parts_between_others_tokens(self) -> None:
        generator = Generator(ToyEngine(prefill_rows=4))
        first, second = make(max_new_tokens=20), make(range(10))
        generator.add(first)
        generator.step()
        generator.add(second)
        run(generator)
        rows = [len(step.tokens) for step in generator.engine.steps]
        assert rows[:7] == [3, 1, 4, 1, 4, 1, 2]
        assert rows[7:15] == [2] * 7 + [1]

    @pytest.mark.parametrize(
        ("policy", "least"),
        [
            (None, math.inf),
            (ExitPolicy.fixed(2), math.inf),
            (ExitPolicy.always(), -math.inf),
            (ExitPolicy.similarity(0.25, prefill="token"), 0.25),
        ],
    )
    def test_leave_by_the_prefill_rule_and_answers_by_the_policy(
        self, policy: ExitPolicy | None, least: float
    ) -> None:
        generator = Generator(ToyEngine())
        run(generator, [make(policy=policy)])
        prompt, decoded, *_ = generator.engine.steps
        assert float(prompt.thresholds[-1]) == least
        expected = (policy or NEVER).thresholds(NUM_LAYERS)
        assert decoded.thresholds.tolist() == pytest.approx(list(expected))
        assert not prompt.mean_groups
        assert not prompt.minimum_groups

    def test_and_answers_leave_together_by_the_minimum(self) -> None:
        generator = Generator(ToyEngine(prefill_rows=None))
        by_token = ExitPolicy.similarity(0.5, prefill="token", batch="minimum")
        whole = ExitPolicy.similarity(0.5, prefill="sequence", batch="minimum")
        requests = [make(range(3), by_token), make(range(2), by_token), make(range(2), whole)]
        run(generator, [*requests, make(range(3), whole), make(range(2))])
        prompt, decoded, *_ = generator.engine.steps
        assert prompt.minimum_groups == [0, 1, 2, 1, 2, *[3] * 5, 4, 5]
        assert prompt.mean_groups == [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 8]
        assert decoded.minimum_groups == [0, 0, 1, 1, 2]


class TestEnds:
    def test_are_told(self) -> None:
        whole = make(temperature=1.5, max_new_tokens=12)
        run(Generator(ToyEngine()), [whole])
        text = TOKENIZER.decode(answer(whole))
        stop = frozenset({answer(whole)[4]})
        cases = {
            "length": make(temperature=1.5, max_new_tokens=5),
            "stop": make(temperature=1.5, stop_tokens=stop),
            "context": make(range(60), temperature=1.5, max_new_tokens=50),
        }
        run(Generator(ToyEngine()), list(cases.values()))
        for reason, request in cases.items():
            assert request.finish_reason == reason
            assert len(answer(request)) == 5
        by_string = make(temperature=1.5, max_new_tokens=12, stop=text[3:6])
        recorder = Recorder(ToyEngine(), by_string)
        generator = Generator(ToyEngine())
        generator.add(by_string, recorder)
        run(generator)
        assert "".join(response.text for response in recorder.responses) == text[:3]
        assert (by_string.finish_reason, len(answer(by_string))) == ("stop", 6)


class TestErrors:
    def test_of_a_request_are_its_own(self) -> None:
        """Its logits are no numbers; the others go on."""
        engine = ToyEngine()
        requests = [make([5, 96]), make([8, 9]), make([8, 10], None)]
        alone = [make([8, 9]), make([8, 10])]
        for request in alone:
            run(Generator(ToyEngine()), [request])
        engine.broken = 96
        run(Generator(engine), requests)
        assert isinstance(requests[0].error, LogitsError)
        assert answer(requests[0]) == []
        assert [answer(request) for request in requests[1:]] == [answer(one) for one in alone]
        assert engine.sequences() == []

    def test_of_a_drafted_token_cost_the_draft_alone(self) -> None:
        """It reaches those before it on some engines; the step is tried again without it."""
        engine = DraftingEngine()
        plain = make(max_new_tokens=12)
        drafted = make(policy=None, drafts=DraftConfig(3, 0, ngram=False), max_new_tokens=12)
        run(Generator(ToyEngine()), [plain])
        forward = engine.forward

        def reaching(step: Any) -> Any:
            result = forward(step)
            if len(step.logit_rows) > 1 and len(engine.steps) % 2:
                result.logits.fill_(math.nan)
            return result

        engine.forward = reaching  # type: ignore[method-assign]
        run(Generator(engine), [drafted])
        assert answer(drafted) == answer(plain)

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, RiverError])
    @pytest.mark.parametrize("number", range(10))
    def test_of_a_step_leave_all_as_they_were(
        self, failure: type[BaseException], number: int
    ) -> None:
        engine = DraftingEngine(64, 4)
        generator = Generator(engine)
        policies = (NEVER, NEVER, POLICIES[3], ExitPolicy.always(second_look=1.0))
        requests = [
            make(),
            make(range(12), None, DraftConfig(3)),
            *(make([8], policy) for policy in policies[2:]),
        ]
        for request in requests:
            generator.add(request)
        countdown = iter(range(number, -1, -1))

        def fail() -> None:
            if next(countdown, None) == 0:
                raise failure

        engine.fail = fail
        with suppress(failure):
            for _ in range(number + 1):
                generator.step()
        run(generator)
        for request, policy in zip(requests, policies, strict=True):
            alone = make(request.tokens[: request.prompt_length], policy)
            run(Generator(ToyEngine()), [alone])
            assert answer(request) == answer(alone)
        assert engine.sequences() == []

    @pytest.mark.parametrize("number", range(12))
    def test_of_a_second_look_leave_it_to_the_next_step(self, number: int) -> None:
        policy = ExitPolicy.fixed(2, second_look=0.9)
        alone, request = make([8], policy), make([8], policy)
        run(Generator(ToyEngine()), [alone])
        engine = ToyEngine()
        generator = Generator(engine)
        countdown = iter(range(number, -1, -1))

        def fail() -> None:
            if next(countdown, None) == 0:
                raise KeyboardInterrupt

        engine.fail = fail
        with suppress(KeyboardInterrupt):
            run(generator, [request])
        run(generator)
        assert answer(request) == answer(alone)
        assert request.exit_layers == alone.exit_layers

    @pytest.mark.parametrize(
        ("request_", "error", "message"),
        [
            (make([]), ConfigError, "the prompt is empty"),
            (make(range(65)), ContextFullError, "has 65 tokens, the model's context holds 64"),
            (make([5, VOCABULARY]), RiverError, f"there is no token {VOCABULARY}"),
            (make(policy=ExitPolicy.fixed(5)), ConfigError, "the exit layer is 5"),
            (make(policy=None, drafts=DraftConfig(2, 5)), ConfigError, "exit layer is 5, but the"),
            (make(policy=None, drafts=DraftConfig(2, 0, 8)), ConfigError, "no LM head of 8 bits"),
        ],
    )
    def test_of_settings_come_before_anything_runs(
        self, request_: Request, error: type[RiverError], message: str
    ) -> None:
        generator = Generator(ToyEngine())
        with pytest.raises(error, match=message):
            generator.add(request_)
        assert generator.is_idle
        assert generator.engine.sequences() == []


def test_an_event_tells_what_a_step_has_brought() -> None:
    generator = Generator(DraftingEngine(64, 4))
    request = make(range(6), None, DraftConfig(3, NUM_LAYERS, 16, ngram=False), max_new_tokens=8)
    of_request: list[StepEvent] = []
    generator.add(request, of_request.append)
    events = run(generator)
    assert events == of_request
    outcomes = [event.outcomes[request] for event in events]
    assert [outcome.prompt_tokens for outcome in outcomes] == [4, 2, 0, 0]
    assert [len(outcome.tokens) for outcome in outcomes] == [0, 1, 4, 3]
    assert [(outcome.drafted, outcome.accepted) for outcome in outcomes[2:]] == [(3, 3), (2, 2)]
    assert [new.origin for new in outcomes[2].tokens] == ["river"] * 3 + ["backbone"]
    tokens = [new.token for outcome in outcomes for new in outcome.tokens]
    assert tokens == answer(request)
    assert all(event.start <= event.drafted_at <= event.end for event in events)
