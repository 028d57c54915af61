"""What the native engine says to wrong models, settings and tokens: one RiverError that says what
is wrong, and the cache stays as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_engines import Subject, random_tokens, subject_of
from tiny_models import ARCHITECTURES, REFUSED, VOCABULARY, tiny_model
from torch import Tensor

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverConfig,
    RiverError,
    RiverFileError,
    UnsupportedModelError,
)
from river_llm.engines import CpuEngine, make_engine

POLICY = ExitPolicy.fixed(2)
ids = torch.tensor
no_ids = torch.empty


@pytest.fixture
def subject() -> Subject:
    return subject_of("llama")


class TestModels:
    @pytest.mark.parametrize("architecture", ["Gemma2", "Mixtral", "GPT2", "GPTNeoX", "Mamba"])
    def test_an_architecture_that_it_does_not_know(
        self, subject: Subject, architecture: str
    ) -> None:
        settings = {**ARCHITECTURES, **{name: case[0] for name, case in REFUSED.items()}}
        model = tiny_model(architecture, **settings[architecture])
        with pytest.raises(UnsupportedModelError, match=r"knows llama, .*, not .*--engine torch$"):
            CpuEngine(model, subject.river, POLICY)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"hidden_act": "relu"}, "no activation 'relu'"),
            ({"num_attention_heads": 8}, "head_dim that is a multiple of 16, not 8"),
            ({"intermediate_size": 104}, "intermediate_size that is a multiple of 16, not 104"),
        ],
    )
    def test_a_llama_that_it_cannot_run(
        self, subject: Subject, settings: dict[str, Any], message: str
    ) -> None:
        model = tiny_model("Llama", **settings)
        with pytest.raises(UnsupportedModelError, match=f"{message}; take --engine torch"):
            CpuEngine(model, subject.river, POLICY)

    def test_a_river_of_another_model(self, subject: Subject) -> None:
        other = tiny_model("Llama", initializer_range=0.2)
        with pytest.raises(RiverFileError, match="built for other weights"):
            CpuEngine(other, subject.river, POLICY)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"backbone_bits": 4}, "the backbone has 4 bits"),
            ({"lm_head_bits": 32}, "the LM head has 32 bits"),
            ({"threads": -1}, "threads have to be 1 to 1024"),
            ({"threads": 2000}, "threads have to be 1 to 1024"),
            ({"kernels": "mmx"}, "no kernels named 'mmx'; it has .*portable"),
        ],
    )
    def test_settings_out_of_their_range(
        self, subject: Subject, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            subject.engine(**settings)

    def test_unknown_kernels_in_the_environment(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RIVER_LLM_CPU", "mmx")
        with pytest.raises(ConfigError, match="no kernels named 'mmx'"):
            subject.engine()

    def test_a_model_whose_weights_were_given_up_cannot_be_used_again(self) -> None:
        model = tiny_model("Llama", dtype=torch.bfloat16)
        river = River.build(model, RiverConfig(group_size=32, quantizer="rtn"))
        kept = CpuEngine(model, river, POLICY, threads=1)
        engine = CpuEngine(model, river, POLICY, threads=1, free_model=True)
        tokens = random_tokens(1, 5, seed=1)
        assert torch.equal(engine.prefill(tokens).logits, kept.prefill(tokens).logits)
        with pytest.raises(RuntimeError, match="meta"):
            model(tokens)
        with pytest.raises(RiverError, match=r"weights were given up.*load it again"):
            CpuEngine(model, river, POLICY)
        for choice in ("auto", "cpu", "torch"):
            with pytest.raises(RiverError):
                make_engine(model, river, POLICY, choice)
        assert engine.step_bytes(2, 5) == kept.step_bytes(2, 5)


WRONG_TOKENS: dict[str, tuple[str, Tensor, str]] = {
    "above the vocabulary": ("prefill", ids([[5, VOCABULARY]]), "token"),
    "negative": ("prefill", ids([[5, -1]]), "token"),
    "beyond 32 bits": ("prefill", ids([[5, 2**40]]), "token"),
    "wrapping to 5": ("prefill", ids([[5, 2**32 + 5]]), "token"),
    "late": ("prefill", ids([[5] * 80 + [VOCABULARY]]), "token"),
    "none": ("prefill", no_ids(1, 0, dtype=torch.long), r"\[1, 0\]"),
    "of no sequence": ("prefill", no_ids(0, 1, dtype=torch.long), r"\[0, 1\]"),
    "without a batch": ("prefill", ids([5, 6]), r"\[2\]"),
    "with a dimension more": ("prefill", ids([[[5, 6]]]), r"\[1, 1, 2\]"),
    "fractions": ("prefill", ids([[5.5]]), "float32"),
    "of two sequences": ("prefill", ids([[5], [6]]), "holds 1 sequences, not 2"),
    "to decode, above": ("decode", ids([VOCABULARY]), "token"),
    "to decode, negative": ("decode", ids([-1]), "token"),
    "to decode, beyond 32 bits": ("decode", ids([2**40]), "token"),
    "to decode, none": ("decode", no_ids(0, dtype=torch.long), r"\[0\]|not 0"),
    "to decode, a table": ("decode", ids([[5]]), r"\[1, 1\]"),
    "to decode, a scalar": ("decode", ids(5), r"\[\]"),
    "to decode, fractions": ("decode", ids([5.0]), "float32"),
    "to decode, of two": ("decode", ids([5, 6]), "holds 1 sequences, not 2"),
    "to verify, above": ("verify", ids([[5, VOCABULARY]]), "token"),
    "to verify, none": ("verify", no_ids(1, 0, dtype=torch.long), r"\[1, 0\]|no rows"),
    "to verify, a list": ("verify", ids([5]), r"\[1\]"),
    "to verify, of two": ("verify", ids([[5], [6]]), "holds 1 sequences, not 2"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_wrong_tokens_leave_the_cache_as_it_was(
    subject: Subject, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("river_llm.engines.cpu_engine._PREFILL_ROWS", 16)
    verb, tokens, message = WRONG_TOKENS[case]
    engine, untouched = subject.engine(POLICY), subject.engine(POLICY)
    prompt = random_tokens(1, 6, seed=2)
    for each in (engine, untouched):
        each.prefill(prompt)
    with pytest.raises(RiverError, match=message) as caught:
        getattr(engine, verb)(tokens)
    assert "\n" not in str(caught.value)
    assert engine.length == 6
    assert engine._core.length(0) == 6
    last = ids([7])
    assert torch.equal(engine.decode(last).logits, untouched.decode(last).logits)


@pytest.mark.parametrize(
    "tokens", [no_ids(1, 0, dtype=torch.long), no_ids(0, 1, dtype=torch.long), ids([[-1]])]
)
def test_wrong_first_tokens_leave_the_engine_ready(subject: Subject, tokens: Tensor) -> None:
    engine, other = subject.engine(POLICY), subject.engine(POLICY)
    with pytest.raises(RiverError):
        engine.prefill(tokens)
    assert engine.length == 0
    prompt = random_tokens(2, 6, seed=3)
    assert torch.equal(engine.prefill(prompt).logits, other.prefill(prompt).logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_of_any_whole_type_are_taken(subject: Subject, dtype: torch.dtype) -> None:
    engine, other = subject.engine(POLICY), subject.engine(POLICY)
    prompt = random_tokens(2, 6, seed=3)
    assert torch.equal(engine.prefill(prompt.to(dtype)).logits, other.prefill(prompt).logits)
    last = ids([7, 8])
    assert torch.equal(engine.decode(last.to(dtype)).logits, other.decode(last).logits)


PROMPT = ids([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
LEFT = ids([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


class TestPadding:
    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([[1, 1, 1, 0, 0], [1] * 5], "left"),
            ([[1, 0, 1, 1, 1], [1] * 5], "left"),
            ([[0] * 5, [1] * 5], "padding"),
            ([[1] * 4, [1] * 4], r"\[2, 4\]"),
            ([[1] * 5], r"\[1, 5\]"),
        ],
    )
    def test_it_stands_on_the_left(
        self, subject: Subject, mask: list[list[int]], message: str
    ) -> None:
        engine = subject.engine(POLICY)
        with pytest.raises(RiverError, match=message):
            engine.prefill(PROMPT, ids(mask).bool())
        assert engine.length == 0
        other = subject.engine(POLICY)
        assert torch.equal(engine.prefill(PROMPT).logits, other.prefill(PROMPT).logits)

    def test_it_stands_before_the_first_tokens_only(self, subject: Subject) -> None:
        engine = subject.engine(POLICY)
        engine.prefill(PROMPT)
        with pytest.raises(RiverError, match="padding"):
            engine.prefill(PROMPT, LEFT.bool())
        assert engine.length == 5
        engine.prefill(PROMPT, torch.ones_like(PROMPT, dtype=torch.bool))
        assert engine.length == 10

    @pytest.mark.parametrize("mask", [LEFT, torch.ones_like(LEFT)])
    def test_a_mask_of_whole_numbers_means_the_same(self, subject: Subject, mask: Tensor) -> None:
        """The attention mask of `transformers` has them. Truncation shows where tokens stand."""
        engine, other = subject.engine(POLICY), subject.engine(POLICY)
        engine.prefill(PROMPT, mask)
        other.prefill(PROMPT, mask.bool())
        for each in (engine, other):
            each.truncate(4)
        last = ids([13, 14])
        assert torch.equal(engine.decode(last).logits, other.decode(last).logits)

    def test_what_was_truncated_to_nothing_but_padding_goes_on(self, subject: Subject) -> None:
        engine, alone = subject.engine(POLICY), subject.engine(POLICY)
        engine.prefill(PROMPT, LEFT.bool())
        engine.truncate(1)
        more = ids([[5, 6], [7, 8]])
        step = engine.prefill(more)
        assert torch.equal(step.logits[0], alone.prefill(more[:1]).logits[0])
        last = ids([13, 14])
        assert torch.equal(engine.decode(last).logits[0], alone.decode(last[:1]).logits[0])


def test_a_negative_length_is_refused(subject: Subject) -> None:
    engine = subject.engine(POLICY)
    engine.prefill(PROMPT)
    with pytest.raises(RiverError, match="-1"):
        engine.truncate(-1)
    assert engine.length == 5


@pytest.mark.parametrize("kind", ["engine", "reference"])
class TestBothEngines:
    def test_a_depth_limit_that_no_layer_has_is_refused(self, subject: Subject, kind: str) -> None:
        engine = getattr(subject, kind)(POLICY)
        for limit in (-1, subject.num_layers + 1):
            with pytest.raises(ConfigError, match=f"the depth limit is {limit}, but the model"):
                engine.depth_limit = limit
        assert engine.depth_limit is None

    def test_a_rewind_needs_a_count_for_each_sequence(self, subject: Subject, kind: str) -> None:
        engine = getattr(subject, kind)(POLICY)
        engine.prefill(PROMPT)
        for counts in ([1], [1, 1, 1]):
            with pytest.raises(RiverError, match="the cache holds 2 sequences"):
                engine.rewind(counts)
        assert engine.length == 5

    def test_a_score_needs_a_count_for_each_sequence(self, subject: Subject, kind: str) -> None:
        engine = getattr(subject, kind)(POLICY)
        engine.prefill(PROMPT)
        for counts in ([1], [1, 1, 1], [3, 1], [-1, 1]):
            with pytest.raises(RiverError, match="give 0 to 2 for each of 2 sequences"):
                engine.score(ids([[7, 8], [9, 10]]), counts)
        with pytest.raises(RiverError, match="there is nothing to verify or score"):
            engine.verify(ids([[7, 8], [9, 10]]), [0, 0])
        assert engine.length == 5


class TestLogits:
    def test_are_gone_after_a_pass_that_fails(self, subject: Subject) -> None:
        engine = subject.engine(POLICY)
        step = engine.prefill(PROMPT[:1])
        with pytest.raises(RiverError):
            engine._forward([7], [5], [0.0] * subject.num_layers, [0])  # there is no sequence 5
        with pytest.raises(RiverError, match=r"look at them before the engine's next pass"):
            _ = step.logits

    def test_are_gone_after_the_next_pass(self, subject: Subject) -> None:
        engine = subject.engine(POLICY)
        steps = [engine.prefill(PROMPT[:1]), engine.decode(ids([7])), engine.decode(ids([8]))]
        for step in steps[:-1]:
            with pytest.raises(RiverError, match=r"look at them before the engine's next pass"):
                _ = step.logits
            assert int(step.best_tokens) >= 0
        assert int(steps[-1].logits.argmax()) == int(steps[-1].best_tokens)

    def test_that_were_looked_at_stay_what_they_are(self, subject: Subject) -> None:
        engine = subject.engine(POLICY)
        step = engine.prefill(PROMPT[:1])
        copy = step.logits.clone()
        engine.decode(ids([7]))
        engine.truncate(0)
        del engine
        assert torch.equal(step.logits, copy)

    def test_outlive_a_truncation_and_the_name_of_the_engine(self, subject: Subject) -> None:
        engine, other = subject.engine(POLICY), subject.engine(POLICY)
        step = engine.prefill(PROMPT)
        engine.truncate(2)
        del engine
        assert torch.equal(step.logits, other.prefill(PROMPT).logits)
