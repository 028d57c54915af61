"""Answers from several threads at once: each is the one that it is alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from river_llm import ExitPolicy, RiverError, RiverLM

PROMPTS = ["one", "a longer one", "x", "the fourth of them"]
POLICIES = [None, ExitPolicy.similarity(0.7)]


def answer(lm: RiverLM, prompt: str, **settings: Any) -> list[int]:
    return lm.generate(prompt, raw=True, max_new_tokens=25, **settings).tokens


@pytest.mark.parametrize("policy", POLICIES, ids=["lossless", "river"])
def test_answers_streams_and_batches_run_side_by_side(
    make_lm: Callable[..., RiverLM], policy: ExitPolicy | None
) -> None:
    lm = make_lm()
    expected = [answer(lm, prompt, policy=policy) for prompt in PROMPTS]

    def batch() -> list[list[int]]:
        results = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=25, policy=policy)
        return [result.tokens for result in results]

    def stream(prompt: str) -> list[int]:
        responses = lm.stream(prompt, raw=True, max_new_tokens=25, policy=policy)
        return [response.token for response in responses]

    with ThreadPoolExecutor(6) as pool:
        singles = [pool.submit(answer, lm, one, policy=policy) for one in 3 * PROMPTS]
        streams = [pool.submit(stream, one) for one in PROMPTS]
        batches = [pool.submit(batch) for _ in range(2)]
        assert [job.result(60) for job in singles] == 3 * expected
        assert [job.result(60) for job in streams] == expected
        assert [job.result(60) for job in batches] == 2 * [expected]


def test_a_call_that_is_refused_harms_no_other(make_lm: Callable[..., RiverLM]) -> None:
    lm = make_lm()
    expected = answer(lm, PROMPTS[0])

    def refused(settings: dict[str, Any]) -> None:
        with suppress(RiverError):
            answer(lm, "", **settings)

    with ThreadPoolExecutor(4) as pool:
        wrong = [pool.submit(refused, one) for one in 6 * ({}, {"temperature": -1}, {"heat": 1})]
        right = [pool.submit(answer, lm, PROMPTS[0]) for _ in range(6)]
        assert [job.result(60) for job in right] == 6 * [expected]
        assert [job.result(60) for job in wrong] == 18 * [None]


def test_a_stream_that_is_dropped_waits_for_nobody(make_lm: Callable[..., RiverLM]) -> None:
    lm = make_lm()
    expected = answer(lm, PROMPTS[1])
    stream = lm.stream(PROMPTS[0], raw=True, max_new_tokens=25)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, lm, PROMPTS[1]).result(60) == expected
    del stream
    assert answer(lm, PROMPTS[1]) == expected
