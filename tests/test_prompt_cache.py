"""Prompt caches: an answer that begins with one is the answer to the whole prompt, and a file of
anything else is refused."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_lm import MIXED, both_engines, subject_with
from native_engines import CASES, MIXED_WIDTHS, Subject, random_tokens, subject_of
from prompt_caches import (
    CONTEXT,
    DOCUMENT,
    QUESTIONS,
    RANDOM,
    ask,
    check_refused,
    lm_with,
    other_subject,
    save,
    token_ids_of,
)
from steps import cached_states
from tiny_lm import character_tokenizer, sharpened

from river_llm import (
    ConfigError,
    ContextFullError,
    ExitPolicy,
    PromptCacheError,
    River,
    RiverConfig,
    RiverLM,
    attach_river,
)
from river_llm.config import SamplingConfig
from river_llm.engines import TorchEngine

POLICIES = [
    None,
    ExitPolicy.never(),
    MIXED,
    ExitPolicy.similarity(0.9, prefill="river"),
    ExitPolicy.similarity(0.9, prefill="token"),
    ExitPolicy.always(),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


class TestAnAnswer:
    @both_engines
    @settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_is_that_of_the_whole_prompt_wherever_texts_part(
        self, kind: str, path: Path, data: st.DataObject
    ) -> None:
        """Around the borders of pages too; on the native engine bit for bit."""
        lengths = st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 127, 128, 129]))
        policy = data.draw(st.sampled_from(POLICIES))
        kept, length = data.draw(lengths), data.draw(lengths)
        common = data.draw(st.integers(0, min(kept, length)))
        saved, new = random_tokens(kept, 1), random_tokens(length, 2)
        new[:common] = saved[:common]
        sampling = SamplingConfig(max_new_tokens=6, **data.draw(st.sampled_from([{}, RANDOM])))

        def answer(lm: RiverLM, tokens: list[int], reuse: bool) -> tuple[list[Any], int]:
            responses = list(lm.stream_tokens(tokens, sampling, reuse))
            found = [(r.token, r.exit_layer) for r in responses]
            return found, responses[0].cached_prompt_tokens

        lm = lm_with(kind, policy)
        answer(lm, saved, False)
        path.unlink(missing_ok=True)
        assert lm.save_prompt_cache(path, kept) == kept
        lm = lm_with(kind, policy)
        assert lm.load_prompt_cache(path) == kept
        tokens, cached = answer(lm, new, True)
        whole = lm_with(kind, policy)
        assert tokens == answer(whole, new, False)[0]
        assert min(common, length - 1) <= cached <= length - 1
        if kind == "cpu":
            states = [cached_states(one.engine, *one.engine.sequences()) for one in (lm, whole)]
            assert torch.equal(*states)

    @pytest.mark.parametrize("case", CASES)
    def test_is_that_of_the_whole_prompt_on_every_architecture(self, case: str, path: Path) -> None:
        save(lm_with("cpu", ExitPolicy.fixed(2), subject_of(case)), path)
        loaded, whole = (lm_with("cpu", ExitPolicy.fixed(2), subject_of(case)) for _ in range(2))
        loaded.load_prompt_cache(path)
        result = ask(loaded, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert result.tokens == ask(whole, DOCUMENT + QUESTIONS[1]).tokens
        states = [cached_states(one.engine, *one.engine.sequences()) for one in (loaded, whole)]
        assert torch.equal(*states)

    @both_engines
    def test_may_be_asked_for_again_and_in_any_way(self, kind: str, path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        for question in [*QUESTIONS, QUESTIONS[0]]:
            expected = ask(lm_with(kind), DOCUMENT + question)
            lm.load_prompt_cache(path)
            for _ in range(2):
                result = ask(lm, DOCUMENT + question, reuse=True)
                assert result.cached_prompt_tokens >= len(DOCUMENT)
                assert result.tokens == expected.tokens
        assert ask(lm, DOCUMENT + QUESTIONS[0]).cached_prompt_tokens == 0  # without being told
        path.write_bytes(b"\xa5" * path.stat().st_size)  # it outlives its file
        assert ask(lm, DOCUMENT + QUESTIONS[0], reuse=True).cached_prompt_tokens >= len(DOCUMENT)


class TestWhatIsKept:
    @both_engines
    @pytest.mark.parametrize(
        ("policy", "is_all"),
        [
            (None, True),
            (ExitPolicy.never(), True),
            (ExitPolicy.always(), True),
            (ExitPolicy.fixed(2, prefill="token"), True),
            (MIXED, False),
            (ExitPolicy.never(prefill="river"), False),
        ],
        ids=str,
    )
    def test_is_the_prompt_and_an_answer_that_a_prompt_would_read_likewise(
        self, kind: str, policy: ExitPolicy | None, is_all: bool, path: Path
    ) -> None:
        lm = lm_with(kind, policy)
        result = ask(lm, DOCUMENT)
        text = [*lm.tokenizer(DOCUMENT).input_ids, *result.tokens]
        kept = lm.save_prompt_cache(path)
        assert kept == (len(text) - 1 if is_all else len(DOCUMENT))
        assert lm.prompt_cache_tokens == text[:kept]
        sampling = SamplingConfig(max_new_tokens=8)
        text += lm.tokenizer("!").input_ids
        expected = list(lm.stream_tokens(text, sampling))
        lm.load_prompt_cache(path)
        responses = list(lm.stream_tokens(text, sampling, True))
        assert responses[0].cached_prompt_tokens == kept
        assert [r.token for r in responses] == [r.token for r in expected]

    @both_engines
    def test_grows_with_a_loaded_beginning(self, kind: str, path: Path, tmp_path: Path) -> None:
        lm = lm_with(kind)
        save(lm, path)
        lm.load_prompt_cache(path)
        assert ask(lm, DOCUMENT * 3, reuse=True).cached_prompt_tokens == len(DOCUMENT)
        longer = tmp_path / "longer.safetensors"
        assert lm.save_prompt_cache(longer) == len(DOCUMENT * 3)
        assert lm.save_prompt_cache(longer, 20) == lm_with(kind).load_prompt_cache(longer) == 20

    def test_is_nothing_where_there_is_no_text_or_none_of_each_token(self, path: Path) -> None:
        lm = lm_with("cpu")
        lm.generate_batch(["Two", "at once"], max_new_tokens=3)
        assert lm.prompt_cache_tokens == []
        with pytest.raises(PromptCacheError, match="holds no text that could"):
            lm.save_prompt_cache(path)
        ask(lm, DOCUMENT, policy=ExitPolicy.similarity(0.5, prefill="sequence"))
        with pytest.raises(PromptCacheError, match="another prefill rule"):
            lm.save_prompt_cache(path)
        with pytest.raises(ConfigError, match="is 0; it must be 1 or more"):
            lm.save_prompt_cache(path, 0)
        assert not path.exists()

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

        with monkeypatch.context() as patched:
            patched.setattr(lm.engine, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ask(lm, DOCUMENT + "x", reuse=True)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))


class TestARun:
    """Whose tokens would be others refuses the file."""

    @both_engines
    def test_by_another_prefill_rule(self, kind: str, path: Path) -> None:
        written = [None, ExitPolicy.always(), ExitPolicy.similarity(0.9, prefill="token")]
        for number, policy in enumerate(written):
            save(lm_with(kind, policy), file := path.with_name(str(number)))
            for other in (*written[:number], *written[number + 1 :]):
                check_refused(lm_with(kind, other), file, "otherwise than", "prefill rule")
        for policy in (ExitPolicy.never(), ExitPolicy.always(prefill="backbone")):
            lm = lm_with(kind, policy)
            expected = ask(lm, DOCUMENT + QUESTIONS[1])
            lm.load_prompt_cache(path.with_name("0"))
            result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
            assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))

    @both_engines
    @pytest.mark.parametrize("river", [RiverConfig(bits=3, group_size=32), MIXED_WIDTHS], ids=str)
    def test_with_another_river_unless_nothing_ran_through_it(
        self, river: RiverConfig, kind: str, path: Path
    ) -> None:
        other = other_subject(river=river)
        save(lm_with(kind, ExitPolicy.always()), path)
        check_refused(lm_with(kind, ExitPolicy.always(), other), path, "another river")
        save(lm_with(kind, MIXED), backbone := path.with_suffix(".backbone"))
        lm = lm_with(kind, MIXED, other)
        assert lm.load_prompt_cache(backbone) == len(DOCUMENT + QUESTIONS[0])

    @both_engines
    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
            {"rms_norm_eps": 1e-4},
            {"num_hidden_layers": 3},
            {"vocab_size": 60},
        ],
        ids=str,
    )
    def test_of_another_model(self, kind: str, changes: dict[str, Any], path: Path) -> None:
        save(lm_with(kind), path)
        with pytest.raises(PromptCacheError, match="another model"):
            lm_with(kind, subject=other_subject(**changes)).load_prompt_cache(path)

    @both_engines
    @pytest.mark.parametrize(
        "weight",
        ["layers.2.self_attn.v_proj", "layers.3.input_layernorm", "embed_tokens"],
    )
    def test_with_other_weights(self, kind: str, weight: str, path: Path) -> None:
        """Of tokens that the text has, if it is the embedding."""
        save(lm_with(kind), path)
        absent = sorted(set(range(97)) - set(token_ids_of(DOCUMENT + QUESTIONS[0])))
        is_embedding = weight == "embed_tokens"
        for rows in [absent, [token_ids_of(DOCUMENT)[5]]] if is_embedding else [...]:
            subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
            sharpened(subject.model)
            subject.model.get_parameter(f"model.{weight}.weight").data[rows] *= 1.5
            subject.river = River.build(subject.model, subject.river.config)
            lm = lm_with(kind, subject=subject)
            if rows is absent:
                assert lm.load_prompt_cache(path) == len(DOCUMENT + QUESTIONS[0])
            else:
                check_refused(lm, path, "another model")

    def test_on_another_engine_or_setting(self, path: Path) -> None:
        subject = subject_with(CONTEXT)

        def lm(**settings: Any) -> RiverLM:
            engine = subject.engine(**settings)
            return RiverLM(engine, character_tokenizer(), subject.river.config, policy=MIXED)

        attached = attach_river(copy.deepcopy(subject.model), subject.river)
        rounded = RiverLM(TorchEngine(attached), lm().tokenizer, attached.config, policy=MIXED)
        runs = {
            "engine (cpu": (lm(), lm_with("torch")),
            "engine (torch": (lm_with("torch"), lm()),
            "dtype (float32, this run has bfloat16)": (lm_with("torch"), rounded),
            "KV cache bits (16, this run has 8)": (lm(), lm(kv_bits=8)),
            "KV cache bits (8, this run has 16)": (lm(kv_bits=8), lm()),
            "backbone bits (16, this run has 8)": (lm(), lm(backbone_bits=8)),
            "kernels (portable": (lm(kernels="portable"), lm()),
        }
        if lm().engine.kernels == "portable":
            del runs["kernels (portable"]
        for number, (part, (written, read)) in enumerate(runs.items()):
            save(written, file := path.with_name(str(number)))
            check_refused(read, file, part, "take the same, or give another file")
        head = lm(lm_head_bits=8)  # the LM head decides over no key or value
        save(lm(), path)
        assert head.load_prompt_cache(path) == len(DOCUMENT + QUESTIONS[0])

    def test_of_another_version(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(lm_with("cpu"), path)
        monkeypatch.setattr("river_llm.__version__", "0.0.9")
        check_refused(lm_with("cpu"), path, "another version", "this run has 0.0.9")


class TestDamage:
    @both_engines
    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_of_any_byte_is_noticed(self, kind: str, path: Path, data: st.DataObject) -> None:
        content = _small_file(kind)
        header = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(
            st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1))
        )
        changed = bytearray(content)
        changed[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        lm = lm_with(kind)
        try:
            lm.load_prompt_cache(path)
        except PromptCacheError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert lm.engine.sequences() == []
        else:
            assert changed[place : place + 1].isspace()  # that fills the header up
            assert lm.prompt_cache_tokens == token_ids_of("A river?")

    def test_of_its_length_and_what_is_no_cache_is_noticed(self, tmp_path: Path) -> None:
        content = _small_file("cpu")
        damaged = [content[: int(share * len(content))] for share in (0, 0.001, 0.1, 0.5, 0.999)]
        for content_ in (*damaged, content + b"more", b"Dear diary, this is no prompt cache."):
            (tmp_path / "prompt").write_bytes(content_)
            check_refused(lm_with("cpu"), tmp_path / "prompt", "damaged", "give another")
        subject_with(CONTEXT).river.save(tmp_path / "river")
        for name, part in {
            "missing": "there is no prompt cache",
            ".": "is no file",
            "river/river.safetensors": "another file",
        }.items():
            check_refused(lm_with("cpu"), tmp_path / name, part)


@cache
def _small_file(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        save(lm_with(kind), Path(directory) / "prompt", "A river?")
        return (Path(directory) / "prompt").read_bytes()


class TestWriting:
    def test_replaces_an_older_file_and_keeps_its_permissions(self, path: Path) -> None:
        lm = lm_with("cpu")
        (link := path.with_name("link")).symlink_to(path)
        (other := path.with_name("other")).touch()
        save(lm, link)
        assert path.stat().st_mode == other.stat().st_mode
        path.chmod(0o640)
        save(lm, link, DOCUMENT * 2)
        assert path.stat().st_mode & 0o777 == 0o640
        assert link.is_symlink()
        assert lm.load_prompt_cache(path) == len(DOCUMENT * 2)
        assert {entry.name for entry in path.parent.iterdir()} == {path.name, "link", "other"}

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_that_ends_early_leaves_the_old_file(
        self, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_with("cpu")
        save(lm, path)
        before = path.read_bytes()
        ask(lm, DOCUMENT * 2)
        with monkeypatch.context() as patched:

            def fail(*_: object) -> None:
                raise error

            patched.setattr("river_llm.generate.prompt_cache.save_file", fail)
            wanted = PromptCacheError if isinstance(error, OSError) else KeyboardInterrupt
            with pytest.raises(wanted, match="No space left" if error.args else None):
                lm.save_prompt_cache(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        assert lm.save_prompt_cache(path) == len(DOCUMENT * 2)  # nothing is lost

    def test_never_replaces_what_is_no_prompt_cache_or_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_with("cpu")
        save(lm, kept := tmp_path / "kept")
        (notes := tmp_path / "notes.txt").write_text("Dear diary")
        for place in (notes, tmp_path):
            with pytest.raises(PromptCacheError, match="is no prompt cache"):
                lm.save_prompt_cache(place)
        assert notes.read_text() == "Dear diary"
        with pytest.raises(PromptCacheError, match="there is no folder "):
            lm.save_prompt_cache(tmp_path / "nowhere" / "prompt")
        monkeypatch.setattr("os.access", lambda place, _: Path(place).is_dir())
        with pytest.raises(PromptCacheError, match="is read-only"):
            lm.save_prompt_cache(kept)
