"""Prompt caches: an answer that begins with one is the answer to the whole prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_lm import MIXED, both_engines
from native_engines import CASES, cached_states, random_tokens, subject_of
from prompt_caches import (
    CONTEXT,
    DOCUMENT,
    QUESTIONS,
    RANDOM,
    ask,
    lm_with,
    save,
)
from river_llm.sampling import SamplingConfig
from safetensors.torch import load_file
from tiny_lm import character_tokenizer

from river_llm import (
    ConfigError,
    ContextFullError,
    Conversation,
    ExitPolicy,
    PromptCacheError,
    RiverError,
    RiverLM,
)
from river_llm.config import Mode
from river_llm.engines.native_model import AngleLimit

RULES: list[tuple[ExitPolicy, Mode]] = [
    (ExitPolicy.never(), "river"),
    (MIXED, "river"),
    (ExitPolicy.similarity(0.9, prefill="river"), "river"),
    (ExitPolicy.similarity(0.9, prefill="token"), "river"),
    (ExitPolicy.always(), "river"),
    (MIXED, "lossless"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


class TestAnAnswer:
    @both_engines
    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=["greedy", "sampled"])
    @pytest.mark.parametrize(("policy", "mode"), RULES, ids=str)
    def test_is_that_of_the_whole_prompt(
        self, kind: str, policy: ExitPolicy, mode: Mode, sampling: dict[str, Any], path: Path
    ) -> None:
        options = {"mode": mode, "max_new_tokens": 24, **sampling}
        first = lm_with(kind, policy)
        assert save(first, path, **options) == len(DOCUMENT + QUESTIONS[0])
        lm = lm_with(kind, policy)
        expected = ask(lm, DOCUMENT + QUESTIONS[1], **options)
        states = cached_states(lm.engine)
        assert lm.load_prompt_cache(path, mode) == len(DOCUMENT + QUESTIONS[0])
        assert lm.engine.length == len(DOCUMENT + QUESTIONS[0])
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True, **options)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert result.tokens == expected.tokens
        assert result.text == expected.text
        assert result.exit_layers == expected.exit_layers
        if kind == "cpu":
            assert torch.equal(cached_states(lm.engine), states)
        else:
            torch.testing.assert_close(cached_states(lm.engine), states)

    def test_has_tokens_that_depend_on_the_prompts_beginning(self) -> None:
        """Else the tests above would see nothing."""
        lm = lm_with("cpu", ExitPolicy.never())
        answers = {
            tuple(ask(lm, text + QUESTIONS[1], max_new_tokens=24, **RANDOM).tokens)
            for text in (DOCUMENT, DOCUMENT.replace("mills", "farms"), "", DOCUMENT[:-1])
        }
        assert len(answers) == 4

    @both_engines
    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_is_that_of_the_whole_prompt_wherever_texts_part(
        self, kind: str, path: Path, data: st.DataObject
    ) -> None:
        """Around the borders of pages too."""
        lengths = st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 127, 128, 129]))
        policy, mode = data.draw(st.sampled_from(RULES))
        kept, length = data.draw(lengths), data.draw(lengths)
        common = data.draw(st.integers(0, min(kept, length)))
        (saved,), (new,) = (
            random_tokens(1, n, seed).tolist() for n, seed in ((kept, 1), (length, 2))
        )
        new[:common] = saved[:common]
        sampling = SamplingConfig(max_new_tokens=6, **data.draw(st.sampled_from([{}, RANDOM])))

        def answer(lm: RiverLM, tokens: list[int], reuse: bool) -> tuple[list[int], int]:
            responses = list(lm.stream_tokens(tokens, sampling, reuse, mode=mode))
            return [r.token for r in responses], responses[0].cached_prompt_tokens

        lm = lm_with(kind, policy)
        answer(lm, saved, False)
        path.unlink(missing_ok=True)
        assert lm.save_prompt_cache(path, kept) == kept
        lm = lm_with(kind, policy)
        assert lm.load_prompt_cache(path, mode) == kept
        tokens, cached = answer(lm, new, True)
        whole = lm_with(kind, policy)
        assert tokens == answer(whole, new, False)[0]
        assert min(common, length - 1) <= cached <= length - 1
        if kind == "cpu":
            assert torch.equal(cached_states(lm.engine), cached_states(whole.engine))

    @pytest.mark.parametrize("case", CASES)
    def test_is_that_of_the_whole_prompt_on_every_architecture(self, case: str, path: Path) -> None:
        subject = subject_of(case)

        def lm() -> RiverLM:
            engine = subject.engine(ExitPolicy.fixed(2))
            return RiverLM(engine, character_tokenizer(), subject.river.config)

        save(lm(), path)
        loaded, whole = lm(), lm()
        loaded.load_prompt_cache(path)
        result = ask(loaded, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert result.tokens == ask(whole, DOCUMENT + QUESTIONS[1]).tokens
        assert torch.equal(cached_states(loaded.engine), cached_states(whole.engine))

    @both_engines
    def test_may_be_asked_for_again_and_again(self, kind: str, path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        for question in [*QUESTIONS, QUESTIONS[0]]:
            expected = ask(lm_with(kind), DOCUMENT + question)
            lm.load_prompt_cache(path)
            for _ in range(2):
                result = ask(lm, DOCUMENT + question, reuse=True)
                assert result.cached_prompt_tokens >= len(DOCUMENT)
                assert result.tokens == expected.tokens

    @both_engines
    def test_of_a_stream_or_chat_may_begin_with_it_too(self, kind: str, path: Path) -> None:
        messages = [{"role": "user", "content": DOCUMENT + QUESTIONS[1]}]
        lm = lm_with(kind)
        expected = lm.chat(messages, max_new_tokens=8)
        lm.chat(DOCUMENT + QUESTIONS[0], max_new_tokens=8)
        lm.save_prompt_cache(path)
        common = len(f"u:{DOCUMENT}")
        lm.load_prompt_cache(path)
        result = lm.chat(messages, max_new_tokens=8, reuse_cache=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, common)
        lm.load_prompt_cache(path)
        responses = list(lm.stream(messages, max_new_tokens=8, reuse_cache=True))
        assert [response.token for response in responses] == expected.tokens
        assert {response.cached_prompt_tokens for response in responses} == {common}
        lm.load_prompt_cache(path)
        responses = list(Conversation(lm, max_new_tokens=8).stream(DOCUMENT + QUESTIONS[1]))
        assert [response.token for response in responses] == expected.tokens
        assert {response.cached_prompt_tokens for response in responses} == {common}

    @both_engines
    def test_takes_nothing_without_being_told(self, kind: str, path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        lm.load_prompt_cache(path)
        assert ask(lm, DOCUMENT + QUESTIONS[0]).cached_prompt_tokens == 0

    @both_engines
    def test_outlives_its_file(self, kind: str, path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        expected = ask(lm, DOCUMENT + QUESTIONS[1])
        lm.load_prompt_cache(path)
        with path.open("r+b") as opened:
            opened.write(b"\xa5" * path.stat().st_size)
        assert ask(lm, DOCUMENT + QUESTIONS[1], reuse=True).tokens == expected.tokens

    def test_runs_beside_an_old_stream_that_is_told_so(self, path: Path) -> None:
        lm = lm_with("cpu")
        save(lm, path)
        expected = ask(lm, DOCUMENT + QUESTIONS[1])
        stream = lm.stream("Hello", raw=True)
        next(stream)
        lm.load_prompt_cache(path)
        with pytest.raises(RiverError, match="another answer was begun"):
            next(stream)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert result.tokens == expected.tokens


class TestWhatIsKept:
    @both_engines
    @pytest.mark.parametrize(
        ("policy", "mode", "is_all"),
        [
            (ExitPolicy.never(), "river", True),
            (ExitPolicy.always(), "river", True),
            (ExitPolicy.fixed(2, prefill="token"), "river", True),
            (MIXED, "lossless", True),
            (MIXED, "river", False),
            (ExitPolicy.never(prefill="river"), "river", False),
        ],
        ids=str,
    )
    def test_is_the_prompt_and_an_answer_that_a_prompt_would_read_likewise(
        self, kind: str, policy: ExitPolicy, mode: Mode, is_all: bool, path: Path
    ) -> None:
        lm = lm_with(kind, policy)
        result = ask(lm, DOCUMENT, mode=mode)
        text = [*lm.tokenizer(DOCUMENT).input_ids, *result.tokens]
        kept = lm.save_prompt_cache(path)
        assert kept == (lm.engine.length if is_all else len(DOCUMENT))
        assert lm.prompt_cache_tokens == text[:kept]
        assert kept >= len(DOCUMENT) + 4 * is_all
        sampling = SamplingConfig(max_new_tokens=8)
        text += lm.tokenizer("!").input_ids
        expected = list(lm.stream_tokens(text, sampling, mode=mode))
        lm.load_prompt_cache(path, mode)
        responses = list(lm.stream_tokens(text, sampling, True, mode=mode))
        assert responses[0].cached_prompt_tokens == kept
        assert [r.token for r in responses] == [r.token for r in expected]

    @both_engines
    def test_has_no_trace_of_what_came_after(self, kind: str, path: Path, tmp_path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path, DOCUMENT, max_new_tokens=1)
        for length in (20, 100):
            ask(lm, DOCUMENT + "x" * length, max_new_tokens=length)
            other = tmp_path / f"{length}.safetensors"
            assert lm.save_prompt_cache(other, len(DOCUMENT)) == len(DOCUMENT)
            ours, alone = load_file(other), load_file(path)
            assert ours.keys() == alone.keys()
            for name, part in alone.items():
                if kind == "cpu":
                    assert torch.equal(ours[name], part)
                else:  # the rounding of PyTorch's products changes with their length
                    torch.testing.assert_close(ours[name], part)

    @both_engines
    def test_grows_with_a_loaded_beginning(self, kind: str, path: Path, tmp_path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        lm.load_prompt_cache(path)
        assert ask(lm, DOCUMENT * 3, reuse=True).cached_prompt_tokens == len(DOCUMENT)
        longer = tmp_path / "longer.safetensors"
        assert lm.save_prompt_cache(longer) == len(DOCUMENT * 3)
        lm = lm_with(kind)
        assert lm.load_prompt_cache(longer) == len(DOCUMENT * 3)
        result = ask(lm, DOCUMENT * 3 + "?", reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT * 3)
        assert result.tokens == ask(lm_with(kind), DOCUMENT * 3 + "?").tokens

    def test_of_a_chat_ends_where_exits_wrote_an_answer(self, path: Path) -> None:
        lm = lm_with("cpu")
        conversation = Conversation(lm, max_new_tokens=5)
        for question in QUESTIONS:
            for _ in conversation.stream(question):
                pass
        assert lm.save_prompt_cache(path) == len(f"u:{QUESTIONS[0]}\na:")
        lm = lm_with("cpu")
        conversation = Conversation(lm, mode="lossless", max_new_tokens=5)
        for question in QUESTIONS:
            for _ in conversation.stream(question):
                pass
        assert lm.save_prompt_cache(path) > len(f"u:{QUESTIONS[0]}\na:{QUESTIONS[1]}")

    def test_is_nothing_where_the_cache_holds_no_single_text(self, path: Path) -> None:
        lm = lm_with("cpu")
        uses: list[Callable[[], object]] = [
            lambda: None,
            lambda: lm.generate_batch(["Two", "at once"], max_new_tokens=3),
            lambda: (ask(lm, "Hello"), lm.engine.truncate(2)),
        ]
        for use in uses:
            use()
            assert lm.prompt_cache_tokens == []
            with pytest.raises(PromptCacheError, match="holds no single text to write"):
                lm.save_prompt_cache(path)
        assert not path.exists()
        for prefilled in (torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5]])):
            lm.engine.truncate(0)
            lm.engine.prefill(prefilled)
            with pytest.raises(RiverError, match="no single sequence of 2 tokens"):
                lm.engine.read_cache(2)

    @both_engines
    def test_is_nothing_where_the_prompt_left_as_a_whole(self, kind: str, path: Path) -> None:
        lm = lm_with(kind, ExitPolicy.similarity(0.5, prefill="sequence"))
        ask(lm, DOCUMENT)
        with pytest.raises(PromptCacheError, match='another prefill rule than "sequence"'):
            lm.save_prompt_cache(path)
        assert not path.exists()

    def test_ends_where_the_policy_changed_within_an_answer(self, path: Path) -> None:
        lm = lm_with("cpu", ExitPolicy.never())
        stream = lm.stream(DOCUMENT, raw=True, max_new_tokens=8)
        next(stream)
        lm.policy = ExitPolicy.fixed(1)
        assert len(list(stream)) == 7
        assert lm.save_prompt_cache(path) == len(DOCUMENT)

    @both_engines
    def test_is_as_much_as_is_asked_for(self, kind: str, path: Path) -> None:
        lm = lm_with(kind)
        ask(lm, DOCUMENT)
        for length, kept in (
            (1, 1),
            (20, 20),
            (len(DOCUMENT), len(DOCUMENT)),
            (500, len(DOCUMENT)),
        ):
            assert lm.save_prompt_cache(path, length) == kept
            assert lm_with(kind).load_prompt_cache(path) == kept
        for length in (0, -1):
            with pytest.raises(ConfigError, match=f"is {length}; it must be 1 or more"):
                lm.save_prompt_cache(path, length)

    @both_engines
    def test_stays_in_memory_when_an_answer_fails_before_its_first_token(
        self, kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_with(kind)
        save(lm, path)
        expected = ask(lm, DOCUMENT + QUESTIONS[1])
        lm.load_prompt_cache(path)
        with pytest.raises(ContextFullError):
            ask(lm, DOCUMENT + "x" * CONTEXT, reuse=True)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        for name in ("prefill", "truncate"):
            with monkeypatch.context() as patched:
                patched.setattr(lm.engine, name, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    ask(lm, DOCUMENT + "x", reuse=True)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))


class TestAnglesThatChange:
    """A tiny longrope model, whose angles are others in texts of more than 16 tokens."""

    @both_engines
    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        saved=st.integers(2, 24),
        length=st.integers(3, 24),
        answered=st.integers(1, 20),
        mode=st.sampled_from(["river", "lossless"]),
    )
    def test_are_those_of_the_whole_prompt(
        self, kind: str, path: Path, saved: int, length: int, answered: int, mode: Mode
    ) -> None:
        text = random_tokens(1, 24, 1).tolist()[0]
        lm = longrope(kind)
        for _ in lm.stream_tokens(text[:saved], SamplingConfig(answered), mode=mode):
            pass
        path.unlink(missing_ok=True)
        kept = lm.save_prompt_cache(path)
        assert kept >= saved
        whole = longrope(kind)
        sampling = SamplingConfig(max_new_tokens=6)
        expected = [r.token for r in whole.stream_tokens(text[:length], sampling, mode=mode)]
        lm = longrope(kind)
        lm.load_prompt_cache(path, mode)
        responses = list(lm.stream_tokens(text[:length], sampling, True, mode=mode))
        assert [response.token for response in responses] == expected
        cached = responses[0].cached_prompt_tokens
        assert cached >= min(saved, length - 1) if (saved > 16) == (length > 16) else cached == 0
        states, wanted = cached_states(lm.engine), cached_states(whole.engine)
        torch.testing.assert_close(
            states, wanted, **({"rtol": 0, "atol": 0} if kind == "cpu" else {})
        )

    @both_engines
    def test_would_be_wrong_if_nobody_looked(
        self, kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = random_tokens(1, 24, 1).tolist()[0]
        lm = longrope(kind)
        list(lm.stream_tokens(text[:12], SamplingConfig(1)))
        lm.save_prompt_cache(path)
        list(lm.stream_tokens(text, SamplingConfig(1)))
        expected = cached_states(lm.engine)
        lm.load_prompt_cache(path)
        monkeypatch.setattr(lm.engine, "angle_limit", AngleLimit(100, keep_changing=False))
        (response,) = lm.stream_tokens(text, SamplingConfig(1), True)
        assert response.cached_prompt_tokens == 12
        assert float((cached_states(lm.engine) - expected).abs().max()) > 0.1


def longrope(kind: str) -> RiverLM:
    subject = subject_of("phi3, longrope")
    policy = ExitPolicy.never()
    engine = subject.reference(policy) if kind == "torch" else subject.engine(policy)
    return RiverLM(engine, character_tokenizer(), subject.river.config)
