"""What a prompt cache must have in common with the run that loads it; where it hasn't, one line
says what differs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lossless_lm import MIXED, both_engines, subject_with
from native_engines import Subject, cached_states, subject_of
from prompt_caches import (
    CONTEXT,
    DOCUMENT,
    QUESTIONS,
    ask,
    check_refused,
    lm_with,
    other_subject,
    save,
    token_ids_of,
)
from stored_models import save_model, start, start_without_cache
from tiny_lm import character_tokenizer, sharpened

from river_llm import (
    ExitPolicy,
    PromptCacheError,
    River,
    RiverConfig,
    RiverLM,
    attach_river,
)
from river_llm.engines import TorchEngine
from river_llm.prompt_cache import FORMAT_VERSION
from river_llm.store import ENVIRONMENT_VARIABLE, cached_folders


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


class TestAnotherRun:
    """What the file must have in common with the run that loads it."""

    @both_engines
    def test_may_have_another_river_if_the_backbone_read_the_prompt(
        self, kind: str, path: Path
    ) -> None:
        save(lm_with(kind), path)
        river = other_subject(river=RiverConfig(bits=3, group_size=32))
        lm = lm_with(kind, subject=river)
        expected = ask(lm, DOCUMENT + QUESTIONS[1])
        lm.load_prompt_cache(path)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))

    @both_engines
    @pytest.mark.parametrize("prefill", ["river", "token"])
    def test_with_another_river_is_refused_if_it_read_the_prompt(
        self, kind: str, prefill: Any, path: Path
    ) -> None:
        policy = ExitPolicy.similarity(0.9, prefill=prefill)
        save(lm_with(kind, policy), path)
        for config in (RiverConfig(bits=3, group_size=32), RiverConfig(4, 32, "rtn")):
            lm = lm_with(kind, policy, other_subject(river=config))
            check_refused(lm, path, "another river", "give another file")

    @both_engines
    def test_with_another_prefill_rule_is_refused(self, kind: str, path: Path) -> None:
        thresholds = [0.9, 0.8]
        policies = [
            ExitPolicy.never(),
            ExitPolicy.always(),
            *(ExitPolicy.similarity(tau, prefill="token") for tau in thresholds),
            ExitPolicy.similarity(0.9, prefill="sequence"),
        ]
        for written in policies[:-1]:
            path.unlink(missing_ok=True)
            save(lm_with(kind, written), path)
            for policy in policies:
                lm = lm_with(kind, policy)
                if policy == written:
                    lm.load_prompt_cache(path)
                else:
                    check_refused(lm, path, "otherwise than prompts of this run", "prefill rule")

    @both_engines
    def test_may_have_another_policy_with_the_same_prefill_rule(
        self, kind: str, path: Path
    ) -> None:
        save(lm_with(kind, ExitPolicy.fixed(1)), path)
        for policy in (ExitPolicy.never(), MIXED, ExitPolicy.always(prefill="backbone")):
            lm = lm_with(kind, policy)
            expected = ask(lm, DOCUMENT + QUESTIONS[1])
            lm.load_prompt_cache(path)
            result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
            assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))

    @both_engines
    def test_in_lossless_mode_takes_only_what_the_backbone_read(
        self, kind: str, path: Path
    ) -> None:
        save(lm_with(kind, ExitPolicy.always()), path)
        check_refused(lm_with(kind, ExitPolicy.always()), path, "otherwise", mode="lossless")
        path.unlink()
        save(lm_with(kind, MIXED), path)
        lm = lm_with(kind, ExitPolicy.always())
        expected = ask(lm, DOCUMENT + QUESTIONS[1], mode="lossless")
        lm.load_prompt_cache(path, "lossless")
        result = ask(lm, DOCUMENT + QUESTIONS[1], mode="lossless", reuse=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))

    @both_engines
    def test_that_changes_its_mode_or_policy_reads_the_whole_prompt(
        self, kind: str, path: Path
    ) -> None:
        lm = lm_with(kind, ExitPolicy.always())
        save(lm, path)
        lm.load_prompt_cache(path)
        result = ask(lm, DOCUMENT + QUESTIONS[1], mode="lossless", reuse=True)
        assert result.cached_prompt_tokens == 0
        lm.load_prompt_cache(path)
        lm.policy = ExitPolicy.never()
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == 0
        assert (
            result.tokens == ask(lm_with(kind, ExitPolicy.never()), DOCUMENT + QUESTIONS[1]).tokens
        )

    @pytest.mark.parametrize(("written", "read"), [("cpu", "torch"), ("torch", "cpu")])
    def test_on_another_engine_is_refused(self, written: str, read: str, path: Path) -> None:
        save(lm_with(written), path)
        check_refused(lm_with(read), path, f"engine {written}, this run has {read}")

    @both_engines
    @pytest.mark.parametrize(
        "changes",
        [
            {"initializer_range": 0.2},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {"rms_norm_eps": 1e-4},
            {"num_hidden_layers": 3},
            {"vocab_size": 60},
            {"attention_bias": True},
        ],
        ids=str,
    )
    def test_with_another_model_is_refused(
        self, kind: str, changes: dict[str, Any], path: Path
    ) -> None:
        save(lm_with(kind), path)
        lm = lm_with(
            kind, subject=Subject("Llama", {"max_position_embeddings": CONTEXT, **changes})
        )
        with pytest.raises(PromptCacheError, match="of another model, or of other weights"):
            lm.load_prompt_cache(path)

    @both_engines
    def test_with_other_angles_is_refused(self, kind: str, path: Path) -> None:
        def lm(**changes: float) -> RiverLM:
            rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0}
            rope |= {"original_max_position_embeddings": 32, **changes}
            return lm_with(kind, subject=other_subject(rope_parameters=rope))

        save(lm(), path)
        lm().load_prompt_cache(path)
        for changes in ({"factor": 5.0}, {"attention_factor": 1.25}):
            check_refused(lm(**changes), path, "of another model")

    @both_engines
    @pytest.mark.parametrize(
        "weight",
        [
            "model.layers.2.self_attn.v_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.3.input_layernorm.weight",
            "model.embed_tokens.weight",
        ],
    )
    def test_with_other_weights_is_refused(self, kind: str, weight: str, path: Path) -> None:
        save(lm_with(kind), path)
        subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
        sharpened(subject.model)
        values = subject.model.get_parameter(weight).data
        token = token_ids_of(DOCUMENT)[5]
        values[token if "embed" in weight else ...] *= 1.5
        subject.river = River.build(subject.model, subject.river.config)
        check_refused(lm_with(kind, subject=subject), path, "of another model")

    @both_engines
    def test_may_have_other_embeddings_of_tokens_that_the_text_lacks(
        self, kind: str, path: Path
    ) -> None:
        save(lm_with(kind), path)
        subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
        sharpened(subject.model)
        absent = set(range(97)) - set(token_ids_of(DOCUMENT + QUESTIONS[0]))
        subject.model.model.embed_tokens.weight.data[sorted(absent)] *= 1.5
        lm = lm_with(kind, subject=subject)
        prompt = DOCUMENT + "Who & how?"
        expected = ask(lm, prompt)
        lm.load_prompt_cache(path)
        result = ask(lm, prompt, reuse=True)
        assert result.tokens == expected.tokens
        assert result.cached_prompt_tokens >= len(DOCUMENT)

    def test_in_another_dtype_is_refused(self, path: Path, tmp_path: Path) -> None:
        subject = subject_with(CONTEXT)
        attached = attach_river(copy.deepcopy(subject.model), subject.river, policy=MIXED)
        lm = RiverLM(TorchEngine(attached), character_tokenizer(), subject.river.config)
        save(lm_with("torch"), path)
        check_refused(lm, path, "dtype float32, this run has bfloat16")
        path.unlink()
        save(lm, path)
        check_refused(lm_with("torch"), path, "dtype bfloat16, this run has float32")
        states = cached_states(lm.engine)[..., : len(DOCUMENT), :].clone()
        lm.load_prompt_cache(path)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert torch.equal(cached_states(lm.engine)[..., : len(DOCUMENT), :], states)

    def test_with_other_kernels_is_refused(self, path: Path) -> None:
        subject = subject_with(CONTEXT)

        def lm(kernels: str | None) -> RiverLM:
            engine = subject.engine(MIXED, kernels=kernels)
            return RiverLM(engine, character_tokenizer(), subject.river.config)

        save(lm("portable"), path)
        lm("portable").load_prompt_cache(path)
        best = lm(None)
        if best.engine.kernels != "portable":
            wanted = f"kernels portable, this run has {best.engine.kernels}"
            check_refused(best, path, wanted, "take the same, or give another file")

    @both_engines
    @pytest.mark.parametrize(("written", "read"), [(16, 8), (8, 16)])
    def test_with_a_cache_of_another_width_is_refused(
        self, kind: str, written: int, read: int, path: Path
    ) -> None:
        lm = lm_with(kind, kv_bits=written)
        save(lm, path)
        states = cached_states(lm.engine)[..., : len(DOCUMENT), :].clone()
        wanted = f"KV cache bits {written}, this run has {read}"
        check_refused(lm_with(kind, kv_bits=read), path, wanted, "take the same")
        lm = lm_with(kind, kv_bits=written)
        expected = ask(lm, DOCUMENT + QUESTIONS[1])
        lm.load_prompt_cache(path)
        result = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert (result.tokens, result.cached_prompt_tokens) == (expected.tokens, len(DOCUMENT))
        assert torch.equal(cached_states(lm.engine)[..., : len(DOCUMENT), :], states)

    @pytest.mark.parametrize("tied", [False, True])
    def test_may_have_another_lm_head_but_no_other_backbone(self, tied: bool, path: Path) -> None:
        subject = Subject(
            "Llama", {"max_position_embeddings": CONTEXT, "tie_word_embeddings": tied}
        )

        def lm(**bits: int) -> RiverLM:
            engine = subject.engine(MIXED, **bits)
            return RiverLM(engine, character_tokenizer(), subject.river.config)

        save(lm(), path)
        loaded, whole = lm(lm_head_bits=8), lm(lm_head_bits=8)
        loaded.load_prompt_cache(path)
        result = ask(loaded, DOCUMENT + QUESTIONS[1], reuse=True)
        assert result.cached_prompt_tokens == len(DOCUMENT)
        assert result.tokens == ask(whole, DOCUMENT + QUESTIONS[1]).tokens
        wanted = "backbone bits 16, this run has 8"
        check_refused(lm(backbone_bits=8), path, wanted)

    def test_of_another_version_is_refused(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(lm_with("cpu"), path)
        with monkeypatch.context() as patched:
            patched.setattr("river_llm.__version__", "0.0.9")
            check_refused(lm_with("cpu"), path, "this run has 0.0.9")
        monkeypatch.setattr("river_llm.prompt_cache.FORMAT_VERSION", 9)
        check_refused(
            lm_with("cpu"), path, f"format version {FORMAT_VERSION}, this release reads 9"
        )


class TestIdentity:
    @both_engines
    def test_is_the_same_for_the_same_model_loaded_again(self, kind: str) -> None:
        settings = {"max_position_embeddings": CONTEXT}
        engines = [lm_with(kind, subject=Subject("Llama", settings)).engine for _ in range(2)]
        identities = [engine.cache_identity([5, 6, 5]) for engine in engines]
        assert identities[0] == identities[1] == engines[0].cache_identity([6, 5])
        assert engines[0].cache_identity([5, 7])["model"] != identities[0]["model"]

    @both_engines
    def test_is_the_same_after_passes(self, kind: str) -> None:
        lm = lm_with(kind, subject=subject_of("phi3, longrope"))
        before = lm.engine.cache_identity([5])
        for mode in ("river", "lossless"):
            ask(lm, DOCUMENT, mode=mode)
            assert lm.engine.cache_identity([5]) == before

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "bits", [{}, {"lm_head_bits": 8}, {"backbone_bits": 8}, {"kv_bits": 8}], ids=str
    )
    def test_is_the_same_after_a_start_from_packed_weights(
        self, tied: bool, bits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
        model = save_model(tmp_path / "tiny", tie_word_embeddings=tied)
        expected = start_without_cache(model, **bits).engine.cache_identity(range(97))
        start(model, **bits)
        lm = start(model, **bits)
        assert cached_folders()
        assert lm.engine.cache_identity(range(97)) == expected
        path = tmp_path / "prompt"
        save(start_without_cache(model, **bits), path)
        result = ask(lm, DOCUMENT + QUESTIONS[1])
        lm.load_prompt_cache(path)
        again = ask(lm, DOCUMENT + QUESTIONS[1], reuse=True)
        assert (again.tokens, again.cached_prompt_tokens) == (result.tokens, len(DOCUMENT))
