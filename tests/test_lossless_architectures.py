"""Lossless mode on every architecture of the native engine, beside the same engine alone."""

from __future__ import annotations

from typing import Any

import pytest
from native_engines import CASES, Subject
from tiny_lm import character_tokenizer, sharpened

from river_llm import DraftConfig, ExitPolicy, RiverLM

PROMPTS = ["y", "abcabcabcabc"]
DRAFTS = [DraftConfig(tokens=3, exit_layer=0), DraftConfig(tokens=5, exit_layer=1), DraftConfig()]
engines = pytest.mark.parametrize("engine", ["cpu", "torch"])


def _lm(subject: Subject, engine: str, stop_tokens: frozenset[int] = frozenset()) -> RiverLM:
    made: Any = subject.engine if engine == "cpu" else subject.reference
    engine_made = made(ExitPolicy.never())
    return RiverLM(engine_made, character_tokenizer(), subject.river.config, stop_tokens)


@pytest.mark.parametrize("name", CASES)
@engines
def test_has_the_tokens_of_the_backbone(name: str, engine: str) -> None:
    """Where angles depend on the length (longrope) too, to the end of the context."""
    model_type, settings = CASES[name]
    subject = Subject(model_type, {**settings, "max_position_embeddings": 64})
    sharpened(subject.model)
    lm = _lm(subject, engine)
    for i, prompt in enumerate(PROMPTS):
        for sampling in ({}, {"temperature": 1.0, "seed": i}):
            plain = lm.generate(prompt, raw=True, max_new_tokens=60, **sampling)
            for drafts in DRAFTS:
                found = lm.generate(
                    prompt, raw=True, max_new_tokens=60, mode="lossless", drafts=drafts, **sampling
                )
                assert found.tokens == plain.tokens


class TestBatchesWhoseAnglesChange:
    """Longrope: all sequences of a batch take other angles once the longest has 17 positions."""

    PROMPTS = ("y", "abcabcab", "a quick fox!")
    NEW_TOKENS = 24

    @pytest.fixture(scope="class")
    def subject(self) -> Subject:
        subject = Subject(*CASES["phi3, longrope"])
        sharpened(subject.model)
        return subject

    @engines
    def test_change_at_the_same_token_as_without_drafts(
        self, subject: Subject, engine: str
    ) -> None:
        free = self._tokens(_lm(subject, engine))
        longest = self.PROMPTS.index(max(self.PROMPTS, key=len))
        for place in (None, 1, 2):  # the longest sequence, whose length counts, may end before
            stop = frozenset() if place is None else frozenset({free[longest][place]})
            lm = _lm(subject, engine, stop)
            plain = self._tokens(lm)
            for drafts in DRAFTS:
                assert self._tokens(lm, mode="lossless", drafts=drafts) == plain

    @engines
    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_stay_what_they_are_when_the_one_over_the_limit_ends(
        self, subject: Subject, engine: str, place: int
    ) -> None:
        prompts = ["z" * 8, "y" * 20, "a quick fox"]

        def tokens(**settings: Any) -> list[list[int]]:
            rows = lm.generate_batch(prompts, raw=True, max_new_tokens=20, **settings)
            return [row.tokens for row in rows]

        lm = _lm(subject, engine)
        whole = tokens()
        lm = _lm(subject, engine, frozenset({whole[1][place]}))
        plain = tokens()
        assert len(plain[1]) <= place + 1
        for i in (0, 2):  # as long as they go on, the others are what they were beside it
            assert plain[i] == whole[i][: len(plain[i])]
        for drafts in DRAFTS:
            assert tokens(mode="lossless", drafts=drafts) == plain

    @engines
    def test_have_drafts_where_the_limit_lies_behind_or_is_not_reached(
        self, subject: Subject, engine: str
    ) -> None:
        lm = _lm(subject, engine)
        long = [prompt + "z" * 17 for prompt in self.PROMPTS]
        for prompts, new_tokens in ((long, self.NEW_TOKENS), (["y", "abcabc"], 10)):
            plain = lm.generate_batch(prompts, raw=True, max_new_tokens=new_tokens)
            drafted = lm.generate_batch(
                prompts, raw=True, max_new_tokens=new_tokens, mode="lossless", drafts=DRAFTS[0]
            )
            assert [result.tokens for result in drafted] == [result.tokens for result in plain]
            assert all(result.lossless.drafted_tokens > 0 for result in drafted if result.lossless)

    def _tokens(self, lm: RiverLM, **settings: Any) -> list[list[int]]:
        results = lm.generate_batch(
            list(self.PROMPTS), raw=True, max_new_tokens=self.NEW_TOKENS, **settings
        )
        return [result.tokens for result in results]
