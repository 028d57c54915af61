"""An engine of repacked weights is the one that wrote them, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from native_engines import CASES, KERNELS, Subject, long_subject, subject_of
from stored_models import (
    ROUNDED,
    WIDTHS,
    check_same_steps,
    check_same_weights,
)
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerFast

from river_llm import ExitPolicy, RiverConfig
from river_llm.config import BITS
from river_llm.engines import CpuEngine
from river_llm.load import repacked_weights
from river_llm.load.repacked_weights import keep_packed, read_packed
from river_llm.store import (
    CachedFolder,
)


def _folder(tmp_path: Path) -> CachedFolder:
    folder = CachedFolder.of("repacked", tmp_path, "form", {})
    assert folder is not None
    return folder


def again(engine: CpuEngine, tmp_path: Path, **options: Any) -> CpuEngine:
    """The engine of a copy of this engine's."""
    folder = _folder(tmp_path)
    keep_packed(folder, engine, character_tokenizer(), ROUNDED, frozenset())
    packed = read_packed(folder, ExitPolicy.never(), **{"threads": 1, **options})
    assert packed is not None
    assert packed.river_config == ROUNDED
    assert isinstance(packed.engine, CpuEngine)
    return packed.engine


def check_copied(subject: Subject, tmp_path: Path, **options: Any) -> None:
    engine = subject.engine(**options)
    copied = again(engine, tmp_path)
    check_same_weights(copied, engine)
    for name in ("setting", "threads", "num_layers", "context_length"):
        assert getattr(copied, name) == getattr(engine, name)
    check_same_steps(copied, engine)


class TestAnEngine:
    @pytest.mark.parametrize("case", CASES)
    def test_of_a_copy_is_the_one_that_wrote_it(self, case: str, tmp_path: Path) -> None:
        check_copied(subject_of(case), tmp_path)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS[1:])
    @pytest.mark.parametrize("case", ["llama, tied head", "gemma3_text, untied head"])
    def test_of_a_copy_has_the_widths_of_the_one_that_wrote_it(
        self, case: str, backbone_bits: int, lm_head_bits: int, tmp_path: Path
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        check_copied(subject_of(case), tmp_path, **bits)

    @pytest.mark.parametrize(
        ("bits", "quantizer"), itertools.product([*BITS, "auto"], ["hqq", "rtn"])
    )
    def test_of_a_copy_has_its_river(self, bits: Any, quantizer: Any, tmp_path: Path) -> None:
        check_copied(Subject(*CASES["llama"], RiverConfig(bits, 32, quantizer)), tmp_path)

    @pytest.mark.parametrize("kernels", KERNELS)
    def test_may_have_other_kernels_and_threads(
        self, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = subject_of("llama")
        written = subject.engine()
        monkeypatch.setenv("RIVER_LLM_CPU", kernels)
        copied = again(written, tmp_path, threads=2)
        assert (copied.kernels, copied.threads) == (kernels, 2)
        check_same_steps(copied, subject.engine(kernels=kernels))

    @pytest.mark.parametrize("fate", ["removed", "overwritten", "emptied"])
    @pytest.mark.parametrize("case", ["llama, tied head", "phi3, longrope"])
    def test_runs_on_whatever_becomes_of_its_copy(
        self, case: str, fate: str, cache: Path, tmp_path: Path
    ) -> None:
        engine = long_subject(case).engine()
        copied = again(engine, tmp_path)
        for path in list(cache.glob("*/*")):
            if fate == "removed":
                path.unlink()
            else:
                with path.open("r+b") as opened:
                    size = len(opened.read())
                    opened.seek(0)
                    opened.truncate() if fate == "emptied" else opened.write(b"\xa5" * size)
        check_same_weights(copied, engine)
        check_same_steps(copied, engine, prompt_length=2100)  # behind the angles that it had

    def test_with_a_tokenizer_that_cannot_be_read_again_has_no_copy(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Foreign(PreTrainedTokenizerFast):
            pass

        engine = subject_of("llama").engine()
        plain = character_tokenizer()
        foreign = Foreign(tokenizer_object=plain.backend_tokenizer, eos_token="<end>")
        keep_packed(_folder(tmp_path), engine, foreign, ROUNDED, frozenset())
        changed = character_tokenizer()
        changed.chat_template = "another one"
        monkeypatch.setattr(repacked_weights, "_read_tokenizer", lambda *_: changed)
        keep_packed(_folder(tmp_path), engine, plain, ROUNDED, frozenset())
        assert list(cache.iterdir()) == []
