"""How much is drafted, and what of: it decides over speed alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_generator import answer, make, run
from toy_engine import NUM_LAYERS, Clock, DraftingEngine

from river_llm import DraftConfig
from river_llm.generate import Generator, Recorder
from river_llm.generate.ngrams import LONGEST_MATCH, NgramIndex

NO_NGRAMS = DraftConfig(ngram=False)
ALIKE, MOSTLY_ALIKE, USELESS = 0.5, 1.0, 300.0  # noise of the river


def seconds(
    patched: pytest.MonkeyPatch, noise: float, answers: int = 3, together: int = 1, **asked: Any
) -> tuple[float, Clock]:
    """That answers of 96 tokens in lossless mode take, over those that the backbone alone takes."""
    taken = []
    for is_lossless in (False, True):
        engine = Clock(patched, noise)
        generator = Generator(engine)
        for number in range(answers):
            policy = {"policy": None, "drafts": NO_NGRAMS, **asked} if is_lossless else {}
            run(
                generator,
                [
                    make([9, number, 7 * i], **{"max_new_tokens": 96, **policy})
                    for i in range(together)
                ],
            )
        taken.append(engine.now)
    return taken[1] / taken[0], engine


class TestDraftsOfTheRiver:
    def test_that_are_accepted_pay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ratio, engine = seconds(monkeypatch, ALIKE)
        assert ratio < 1 / 1.45  # drafts of six would bring 1.88, were all accepted
        assert max(engine.drafted) == 6
        assert seconds(monkeypatch, MOSTLY_ALIKE)[0] < 1 / 1.25

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=str)
    def test_that_never_are_cost_little_from_the_first_answer_on(
        self, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
    ) -> None:
        assert seconds(monkeypatch, USELESS, answers=1, **sampling)[0] < 1 / 0.95
        assert seconds(monkeypatch, USELESS, answers=5, **sampling)[0] < 1 / 0.96

    def test_that_cost_more_than_they_bring_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Clock, "drafted_token", 1.1)
        assert seconds(monkeypatch, ALIKE)[0] < 1 / 0.95

    @pytest.mark.parametrize("together", [2, 4])
    def test_count_for_all_that_step_together(
        self, monkeypatch: pytest.MonkeyPatch, together: int
    ) -> None:
        assert seconds(monkeypatch, ALIKE, together=together)[0] < 1 / 1.03
        monkeypatch.setattr(Clock, "row", 0.4)  # a step is as slow as its rows are many
        monkeypatch.setattr(Clock, "drafted_token", 1.0)
        assert seconds(monkeypatch, MOSTLY_ALIKE, together=together)[0] < 1 / 0.95

    def test_of_a_fixed_length_are_always_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fixed = DraftConfig(3, ngram=False)
        _, engine = seconds(monkeypatch, USELESS, answers=1, drafts=fixed)
        assert len(engine.drafted) >= 90
        assert set(engine.drafted[:-2]) == {3}

    def test_end_with_a_stop_token(self) -> None:
        plain = make(max_new_tokens=20)
        run(Generator(DraftingEngine()), [plain])
        stop = frozenset({answer(plain)[7]})
        engine = DraftingEngine()
        drafts = DraftConfig(5, NUM_LAYERS, 16, ngram=False)
        request = make(policy=None, drafts=drafts, max_new_tokens=20, stop_tokens=stop)
        run(Generator(engine), [request])
        assert all(token not in step.tokens[1:-1] for step in engine.steps for token in stop)
        assert answer(request) == answer(plain)[: answer(plain).index(next(iter(stop))) + 1]


class TestDraftsOfTheText:
    def test_are_made_where_it_repeats_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of tokens that hardly hang on what stands far before."""
        monkeypatch.setattr("toy_engine._random", lambda seed: _Repeating())
        ratio, engine = seconds(monkeypatch, USELESS, drafts=DraftConfig())
        assert ratio < 0.2
        recorder = Recorder(engine, make(policy=None))
        generator = Generator(engine)
        generator.add(recorder._request, recorder)
        run(generator)
        statistics = recorder.responses[-1].lossless
        assert statistics is not None
        assert statistics.ngram_tokens == statistics.accepted_tokens > 0

    def test_that_fail_cost_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(NgramIndex, "continuation", lambda _, text, most: (12, [3] * most))
        assert seconds(monkeypatch, USELESS, answers=1, drafts=DraftConfig())[0] < 1 / 0.93
        assert seconds(monkeypatch, USELESS, answers=5, drafts=DraftConfig())[0] < 1 / 0.94

    @given(
        text=st.lists(st.integers(0, 2), max_size=40),
        most=st.integers(0, 20),
        parts=st.lists(st.integers(0, 40), max_size=3),
    )
    def test_are_what_followed_the_last_occurrence_of_its_end(
        self, text: list[int], most: int, parts: list[int]
    ) -> None:
        index = NgramIndex()
        for part in sorted(parts):
            index.continuation(text[:part], 5)  # it follows the text as it grows
        match, tokens = index.continuation(text, most)
        ends = [end for end in range(2, len(text)) if text[end - 2 : end] == text[-2:]]
        if not ends or most == 0:
            assert (match, tokens) == (0, [])
            return
        place = ends[-1]
        length = max(n for n in range(2, place + 1) if text[place - n : place] == text[-n:])
        assert match == min(length, LONGEST_MATCH)
        whole = list(text)
        for _ in range(most):
            whole.append(whole[place + len(whole) - len(text)])
        assert tokens == whole[len(text) :]


class _Repeating:
    """Stands for random numbers: the token after each is the next one but four."""

    def standard_normal(self, count: int) -> Any:
        import numpy as np

        return np.eye(1, count, 5)[0]

    def random(self, count: int) -> list[float]:
        return [0.5] * count
