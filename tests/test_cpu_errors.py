"""What the native engine says to wrong models, settings and steps: one RiverError that says what is
wrong, and it goes on as if nothing had been."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from native_engines import KERNELS, Subject, random_tokens, subject_of
from steps import append, begin, thresholds_of
from tiny_models import VOCABULARY, tiny_model

from river_llm import (
    ConfigError,
    River,
    RiverConfig,
    RiverError,
    RiverFileError,
)
from river_llm.config import EngineConfig
from river_llm.engines.choice import make_engine
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.step import Step

RTN = RiverConfig(group_size=32, quantizer="rtn")


@pytest.fixture
def subject() -> Subject:
    return subject_of("llama")


class TestModels:
    def test_a_river_of_another_model(self, subject: Subject) -> None:
        with pytest.raises(RiverFileError, match="built for other weights"):
            CpuEngine(tiny_model("Llama", initializer_range=0.2), subject.river)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"backbone_bits": 4}, "the backbone has 4 bits"),
            ({"lm_head_bits": 32}, "the LM head has 32 bits"),
            ({"kv_bits": 4}, "the KV cache has 4 bits"),
            ({"threads": -1}, "threads have to be 1 to 1024"),
            ({"threads": 2000}, "threads have to be 1 to 1024"),
            *(
                ({"kernels": name}, f"no kernels named '{name}'; it has {', '.join(KERNELS)}$")
                for name in ("mmx", "AVX2", "portable ", "auto")
            ),
        ],
    )
    def test_settings_out_of_their_range(
        self,
        subject: Subject,
        settings: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            subject.engine(**settings)
        if "kernels" in settings:
            monkeypatch.setenv("RIVER_LLM_CPU", settings["kernels"])
            with pytest.raises(ConfigError, match=message):
                subject.engine()

    def test_a_model_whose_weights_were_given_up_cannot_be_used_again(self) -> None:
        model = tiny_model("Llama", dtype=torch.bfloat16)
        river = River.build(model, RTN)
        kept = CpuEngine(model, river, threads=1)
        engine = CpuEngine(model, river, threads=1, free_model=True)
        tokens = random_tokens(5, seed=1)
        logits = [append(each, {begin(each)[0]: tokens}).logits for each in (engine, kept)]
        assert torch.equal(*logits)
        with pytest.raises(RuntimeError, match="meta"):
            model(torch.tensor([tokens]))
        for choice in ("auto", "cpu", "torch"):
            with pytest.raises(RiverError, match=r"weights were given up.*load it again"):
                make_engine(model, river, EngineConfig(engine=choice))
        assert engine.step_bytes(2, 5) == kept.step_bytes(2, 5)


class TestSteps:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": []}, "a step has no rows"),
            ({"tokens": [5, VOCABULARY]}, f"no token {VOCABULARY}: the model's embedding has"),
            ({"tokens": [5, -1]}, r"no token -1; .* \(-1 comes from logits that are no numbers\)"),
            ({"sequences": [0, 1]}, "no such sequence"),
            ({"thresholds": torch.zeros(3)}, "one threshold for each layer"),
        ],
    )
    def test_that_cannot_be_change_nothing(
        self, subject: Subject, changes: dict[str, Any], message: str
    ) -> None:
        engine, untouched = subject.engine(), subject.engine()
        for each in (engine, untouched):
            append(each, {begin(each)[0]: random_tokens(6, seed=2)})
        step = {"tokens": [5, 6], "sequences": [0, 0], "thresholds": thresholds_of(engine)}
        with pytest.raises(RiverError, match=message) as caught:
            engine.forward(Step(**{**step, "logit_rows": [1], **changes}))
        assert "\n" not in str(caught.value)
        assert engine.length(0) == 6
        assert torch.equal(append(engine, {0: [7]}).logits, append(untouched, {0: [7]}).logits)

    def test_take_thresholds_of_any_memory(self, subject: Subject) -> None:
        engine = subject.engine()
        own = torch.tensor([[2.0, 2, -2, 2]] * 3, dtype=torch.float64)
        for thresholds in (own, own.float().T.contiguous().T, own[:1].float().expand(3, 4)):
            step = append(engine, {begin(engine)[0]: [5, 6, 7]}, thresholds)
            assert step.exit_layers.tolist() == [2, 2, 2]

    @pytest.mark.parametrize("call", ["drop_sequence", "length", "truncate", "read_cache"])
    def test_of_sequences_that_there_are_not(self, subject: Subject, call: str) -> None:
        with pytest.raises(RiverError, match="no such sequence"):
            getattr(subject.engine(), call)(0, *[0] * (call in ("truncate", "read_cache")))

    def test_below_a_depth_that_there_is_not(self, subject: Subject) -> None:
        engine = subject.engine()
        with pytest.raises(ConfigError, match="the depth limit is 5, but the model"):
            engine.depth_limit = 5
        assert engine.depth_limit is None

    def test_pages_of_another_form_leave_the_sequence_empty(self, subject: Subject) -> None:
        engine = subject.engine()
        append(engine, {begin(engine)[0]: [5, 6, 7]})
        pages = engine.read_cache(0, 3)
        (page,) = pages.values()
        for tensors, length in (
            ({"page.000000": page.short()}, 3),
            ({"page.000000": page[1:].clone()}, 3),
            ({"keys": page}, 3),
            (pages, 65),
        ):
            other = engine.add_sequence()
            append(engine, {other: [8, 9]})
            with pytest.raises(RiverError):
                engine.write_cache(other, tensors, length)
            assert engine.length(other) in (0, 2)
        with pytest.raises(RiverError, match="don't fit the model's context"):
            engine.write_cache(0, pages, 129)
        assert engine.length(0) == 3


class TestLogits:
    def test_are_gone_after_the_next_pass(self, subject: Subject) -> None:
        """Also one that failed; what was looked at stays."""
        engine = subject.engine()
        begin(engine)
        first, second = append(engine, {0: [5, 6]}), append(engine, {0: [7]})
        kept = second.logits.clone()
        with pytest.raises(RiverError, match="look at them before the engine's next pass"):
            _ = first.logits
        assert int(first.best_tokens[0]) >= 0
        third = append(engine, {0: [8]})
        with pytest.raises(RiverError):
            append(engine, {0: [7]}, logit_rows=[3])
        with pytest.raises(RiverError, match="look at them before the engine's next pass"):
            _ = third.logits
        assert torch.equal(second.logits, kept)

    def test_outlive_a_truncation_and_the_name_of_the_engine(self, subject: Subject) -> None:
        engine = subject.engine()
        begin(engine)
        step = append(engine, {0: [5, 6]})
        engine.truncate(0, 1)
        gone = weakref.ref(engine)
        del engine
        assert gone() is not None  # for its logits
        assert torch.equal(step.logits.argmax(-1), step.best_tokens)
        assert gone() is None
