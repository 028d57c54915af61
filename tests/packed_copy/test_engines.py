"""An engine of a packed copy is the one that wrote it, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from native_engines import CASES, KERNELS, Subject, long_subject, subject_of
from packed_models import (
    LENGTH,
    MIXED,
    PROMPT,
    ROUNDED,
    WIDTHS,
    check_same_steps,
    check_same_weights,
)
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerFast

from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.config import BITS
from river_llm.engines import CpuEngine
from river_llm.load import repacked_weights as packed_copy_module
from river_llm.load.repacked_weights import PackedModel, keep_packed, read_packed
from river_llm.store import folder_for


def again(engine: CpuEngine, tmp_path: Path, **options: Any) -> CpuEngine:
    """The engine of a copy of this engine's."""
    folder = folder_for("packed", "tiny", tmp_path, "form", {})
    assert folder is not None
    keep_packed(folder, PackedModel(engine, character_tokenizer(), ROUNDED, frozenset()))
    packed = read_packed(folder, engine.policy, **{"threads": 1, **options})
    assert packed is not None
    assert packed.river_config == ROUNDED
    return packed.engine


def check_copied(subject: Subject, tmp_path: Path, **options: Any) -> None:
    engine = subject.engine(MIXED, **options)
    copied = again(engine, tmp_path)
    check_same_weights(copied, engine)
    for name in (
        "name",
        "device",
        "setting",
        "kernels",
        "threads",
        "num_layers",
        "context_length",
        "backbone_bits",
        "lm_head_bits",
        "kv_bits",
        "draft_head_bits",
        "draft_vocabularies",
        "policy",
        "record_similarities",
        "length",
    ):
        assert getattr(copied, name) == getattr(engine, name)
    for exit_layer, position in itertools.product((0, 2, 4), (1, 9, 100)):
        bytes_read = copied.step_bytes(exit_layer, position)
        assert bytes_read == engine.step_bytes(exit_layer, position)
    check_same_steps(copied, engine)
    tokenizer = character_tokenizer()
    answers = [
        RiverLM(one, tokenizer, subject.river.config).generate(
            PROMPT, raw=True, mode=mode, max_new_tokens=LENGTH
        )
        for one, mode in ((engine, "river"), (copied, "river"), (copied, "lossless"))
    ]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].exit_layers == answers[1].exit_layers
    engine.policy = ExitPolicy.never()
    exact = RiverLM(engine, tokenizer, subject.river.config)
    expected = exact.generate(PROMPT, raw=True, max_new_tokens=LENGTH)
    assert answers[2].tokens == expected.tokens


class TestAnEngine:
    @pytest.mark.parametrize("case", CASES)
    def test_of_a_copy_is_the_one_that_wrote_it(self, case: str, tmp_path: Path) -> None:
        check_copied(subject_of(case), tmp_path)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS)
    @pytest.mark.parametrize(
        "case",
        [
            "llama",
            "llama, tied head",
            "qwen2",
            "phi3, longrope",
            "gemma3_text",
            "gemma3_text, untied head",
        ],
    )
    def test_of_a_copy_has_the_widths_of_the_one_that_wrote_it(
        self, case: str, backbone_bits: int, lm_head_bits: int, tmp_path: Path
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        check_copied(subject_of(case), tmp_path, **bits)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("quantizer", ["hqq", "rtn"])
    def test_of_a_copy_has_its_river(self, bits: int, quantizer: Any, tmp_path: Path) -> None:
        config = RiverConfig(bits, 32, quantizer)
        check_copied(Subject(*CASES["llama"], config), tmp_path)

    @pytest.mark.parametrize("kernels", KERNELS)
    def test_may_have_other_kernels_than_the_one_that_wrote_it(
        self, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = subject_of("llama")
        written = subject.engine(MIXED)
        expected = subject.engine(MIXED, kernels=kernels)
        monkeypatch.setenv("RIVER_LLM_CPU", kernels)
        copied = again(written, tmp_path)
        assert copied.kernels == kernels
        check_same_weights(copied, expected)
        check_same_steps(copied, expected)

    def test_may_have_other_threads_and_policy(self, tmp_path: Path) -> None:
        subject = subject_of("llama")
        copied = again(subject.engine(MIXED), tmp_path, threads=2)
        assert copied.threads == 2
        check_same_steps(copied, subject.engine(MIXED, threads=2))
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        packed = read_packed(folder, ExitPolicy.fixed(2), threads=1)
        assert packed is not None
        assert packed.engine.policy == ExitPolicy.fixed(2)

    @pytest.mark.parametrize("fate", ["removed", "overwritten", "emptied"])
    @pytest.mark.parametrize("case", ["llama, tied head", "phi3, longrope", "gemma3_text"])
    def test_runs_on_whatever_becomes_of_its_copy(
        self, case: str, fate: str, cache: Path, tmp_path: Path
    ) -> None:
        engine = long_subject(case).engine(MIXED)
        copied = again(engine, tmp_path)
        for path in list(cache.glob("*/*")):
            if fate == "removed":
                path.unlink()
            else:
                with path.open("r+b") as opened:
                    size = len(opened.read())
                    opened.seek(0)
                    if fate == "emptied":
                        opened.truncate()
                    else:
                        opened.write(b"\xa5" * size)
        check_same_weights(copied, engine)
        check_same_steps(copied, engine)
        check_same_steps(copied, engine, prompt_length=2100)  # behind the angles that it had

    def test_with_a_tokeniser_that_cannot_be_read_again_has_no_copy(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Foreign(PreTrainedTokenizerFast):
            pass

        engine = subject_of("llama").engine()
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        plain = character_tokenizer()
        foreign = Foreign(tokenizer_object=plain.backend_tokenizer, eos_token="<end>")
        keep_packed(folder, PackedModel(engine, foreign, ROUNDED, frozenset()))
        assert list(cache.iterdir()) == []
        with monkeypatch.context() as patched:
            changed = character_tokenizer()
            changed.chat_template = "another one"
            patched.setattr(packed_copy_module, "_read_tokenizer", lambda *_: changed)
            keep_packed(folder, PackedModel(engine, plain, ROUNDED, frozenset()))
        assert list(cache.iterdir()) == []
