"""Answers from several threads at once: each is the one that it is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from native_engines import subject_of
from tiny_lm import character_tokenizer

from river_llm import ExitPolicy, GenerationResult, RiverLM
from river_llm.errors import RiverError

PROMPTS = ["one", "a longer one", "x", "the fourth of them"]


@pytest.fixture(params=["cpu", "torch"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    subject = subject_of("llama")
    make = subject.engine if request.param == "cpu" else subject.reference
    return RiverLM(make(ExitPolicy.similarity(0.7)), character_tokenizer(), subject.river.config)


def answer(lm: RiverLM, prompt: str, **settings: Any) -> list[int]:
    return lm.generate(prompt, raw=True, max_new_tokens=25, **settings).tokens


@pytest.mark.parametrize("settings", [{}, {"mode": "lossless"}], ids=["river", "lossless"])
def test_wait_for_each_other(lm: RiverLM, settings: dict[str, Any]) -> None:
    expected = [answer(lm, prompt, **settings) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        jobs = [pool.submit(answer, lm, prompt, **settings) for prompt in 5 * PROMPTS]
        assert [job.result(60) for job in jobs] == 5 * expected


def test_batches_wait_too(lm: RiverLM) -> None:
    def batch() -> list[GenerationResult]:
        return lm.generate_batch(PROMPTS, raw=True, max_new_tokens=25)

    expected = [row.tokens for row in batch()]
    alone = answer(lm, PROMPTS[1])
    with ThreadPoolExecutor(4) as pool:
        singles = [pool.submit(answer, lm, PROMPTS[1]) for _ in range(4)]
        batches = [pool.submit(batch) for _ in range(4)]
        assert [job.result(60) for job in singles] == 4 * [alone]
        assert [[row.tokens for row in job.result(60)] for job in batches] == 4 * [expected]


def _wrong(lm: RiverLM) -> Iterator[Callable[[], object]]:
    yield lambda: lm.generate("", raw=True)
    yield lambda: lm.generate("x", raw=True, temperature=-1)
    yield lambda: lm.stream("x" * 999, raw=True, mode="nonsense")  # type: ignore[arg-type]


def test_a_call_that_is_refused_harms_no_other(lm: RiverLM) -> None:
    expected = answer(lm, PROMPTS[0])
    stream = lm.stream(PROMPTS[0], raw=True, max_new_tokens=25)
    tokens = [next(stream).token for _ in range(5)]
    with ThreadPoolExecutor(1) as pool:
        for call in _wrong(lm):
            with pytest.raises(RiverError):
                pool.submit(call).result(60)
    assert tokens + [response.token for response in stream] == expected


def test_a_stream_takes_its_turn_beside_answers(lm: RiverLM) -> None:
    """Each of its steps waits, and tells that another answer was begun."""
    expected = answer(lm, PROMPTS[0])
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            stream = lm.stream(PROMPTS[1], raw=True, max_new_tokens=25)
            next(stream)
            job = pool.submit(answer, lm, PROMPTS[0])
            with suppress(RiverError):
                list(stream)
            assert job.result(60) == expected


def test_a_stream_that_is_dropped_waits_for_nobody(lm: RiverLM) -> None:
    expected = answer(lm, PROMPTS[0])
    stream = lm.stream(PROMPTS[1], raw=True, max_new_tokens=25)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        held, go_on = Event(), Event()

        def hold() -> None:
            with lm._turn:
                held.set()
                go_on.wait(60)

        job = pool.submit(hold)
        held.wait(60)
        stream.close()  # type: ignore[attr-defined]
        go_on.set()
        job.result(60)
    assert answer(lm, PROMPTS[0]) == expected


def test_prompt_caches_take_their_turn(lm: RiverLM, tmp_path: Path) -> None:
    expected = answer(lm, PROMPTS[0])
    assert lm.save_prompt_cache(tmp_path / "cache") == len(PROMPTS[0])
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(answer, lm, PROMPTS[0], mode="lossless") for _ in range(8)]
        loads = [pool.submit(lm.load_prompt_cache, tmp_path / "cache") for _ in range(8)]
        assert [job.result(60) for job in loads] == 8 * [len(PROMPTS[0])]
        lossless = [job.result(60) for job in answers]
    assert lossless == 8 * [lossless[0]]
    assert answer(lm, PROMPTS[0]) == expected


def test_a_stream_ends_where_another_thread_begins_an_answer(lm: RiverLM) -> None:
    expected = answer(lm, PROMPTS[0])
    stream = lm.stream(PROMPTS[1], raw=True, max_new_tokens=25)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, lm, PROMPTS[0]).result(60) == expected
    with pytest.raises(RiverError, match="another answer was begun"):
        list(stream)
    assert answer(lm, PROMPTS[0]) == expected
