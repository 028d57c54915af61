"""Perplexity and KL divergence of a text on both engines, against a plain reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lossless_lm import lm_on, overflowing_subject, subject_with
from torch import Tensor

from river_llm import ConfigError, DataError, ExitPolicy, ResultFileError, RiverError, RiverLM
from river_llm.evaluation import text_run
from river_llm.evaluation.harness import compare_results, evaluate
from river_llm.evaluation.result_file import Result
from river_llm.evaluation.text_run import TextRun, divergence_block, summarise_divergence

MIXED = ExitPolicy.similarity(0.65)
TEXT = "The river runs to the sea, and the sea (so they say) is never full: 1, 2, 3 and so on! " * 3


@pytest.fixture(params=["torch", "cpu"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    lm = lm_on(request.param, subject_with(64))
    lm.policy = MIXED
    return lm


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def measure(lm: RiverLM, text: Path, name: str = "kld", **options: Any) -> Result:
    settings: dict[str, Any] = {"window": 32, **options}
    run = TextRun(lm, text, model_name="tiny", with_backbone=name == "kld", **settings)
    return evaluate(run, text.parent / f"{name}-{lm.policy.kind}.jsonl")


def step_by_step(lm: RiverLM, tokens: list[int], policy: ExitPolicy) -> tuple[Tensor, list[int]]:
    """Logits and exit layers of every token of a window, one after the other."""
    lm.policy = policy
    lm.engine.truncate(0)
    logits, exits = [], []
    for token in tokens:
        step = lm.engine.decode(torch.tensor([token]))
        logits.append(step.logits[0].double())
        exits.append(int(step.exit_layers[0]))
    return torch.stack(logits), exits


def summary_of(result: Result) -> dict[str, Any]:
    assert result.summary is not None
    return dict(result.summary)


class TestDivergence:
    def test_of_the_backbone_from_itself_is_nothing(self, lm: RiverLM, text: Path) -> None:
        lm.policy = ExitPolicy.never()
        found = summary_of(measure(lm, text))
        assert found["mean_kld"] == 0
        assert set(found["kld_quantiles"].values()) == {0}
        assert set(found["change_quantiles"].values()) == {0}
        assert found["same_top"] == 1
        assert found["ratio"] == 1
        assert found["perplexity"] == found["backbone_perplexity"]
        assert found["mean_exit_layer"] == lm.engine.num_layers

    def test_is_that_of_single_steps(self, lm: RiverLM, text: Path) -> None:
        found = summary_of(measure(lm, text))
        ids = lm.tokenizer(TEXT, add_special_tokens=False).input_ids
        nll, base_nll, kld, same, layers = [], [], [], [], []
        for start in range(0, len(ids) - 31, 32):
            window = ids[start : start + 32]
            logits, exits = step_by_step(lm, window, MIXED)
            base, _ = step_by_step(lm, window, ExitPolicy.never())
            log_q, log_p = logits.log_softmax(-1), base.log_softmax(-1)
            for place in range(16, 31):
                target = window[place + 1]
                nll.append(-float(log_q[place, target]))
                base_nll.append(-float(log_p[place, target]))
                kld.append(float((log_p[place].exp() * (log_p[place] - log_q[place])).sum()))
                same.append(int(logits[place].argmax()) == int(base[place].argmax()))
                layers.append(exits[place])
        assert found["predicted_tokens"] == len(nll)
        assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-3)
        expected = math.exp(sum(base_nll) / len(base_nll))
        assert found["backbone_perplexity"] == pytest.approx(expected, rel=1e-3)
        assert found["mean_kld"] == pytest.approx(sum(kld) / len(kld), rel=1e-2)
        assert found["kld_quantiles"]["1"] == pytest.approx(max(kld), rel=1e-2)
        assert found["same_top"] == pytest.approx(sum(same) / len(same))
        assert found["mean_exit_layer"] == pytest.approx(sum(layers) / len(layers))
        assert len(set(layers)) > 1

    @pytest.mark.parametrize("columns", [1, 7])
    def test_does_not_depend_on_the_tokens_of_a_pass(
        self, lm: RiverLM, text: Path, columns: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = TextRun(lm, text, model_name="tiny", with_backbone=True, window=32).answer([0])
        monkeypatch.setattr(text_run, "_COLUMNS", columns)
        found = TextRun(lm, text, model_name="tiny", with_backbone=True, window=32).answer([0])
        for name in ("nll", "kld", "change"):
            assert found[0][name] == pytest.approx(expected[0][name], abs=1e-4)
        assert found[0]["exit_layers"] == expected[0]["exit_layers"]

    def test_perplexity_alone_is_the_same(self, lm: RiverLM, text: Path) -> None:
        beside = summary_of(measure(lm, text))
        alone = summary_of(measure(lm, text, "perplexity"))
        for name in ("perplexity", "perplexity_error", "predicted_tokens", "mean_exit_layer"):
            assert alone[name] == pytest.approx(beside[name])
        assert "mean_kld" not in alone

    def test_the_policy_is_what_it_was(self, lm: RiverLM, text: Path) -> None:
        measure(lm, text, limit=1)
        assert lm.policy == MIXED

    def test_a_limit_takes_the_first_windows(self, lm: RiverLM, text: Path) -> None:
        assert summary_of(measure(lm, text, limit=2))["predicted_tokens"] == 30


class TestStatistics:
    NLL = (1.0, 2.0, 0.5, 3.0)
    BASE = (0.8, 2.1, 0.5, 2.0)
    CHANGE = tuple(math.exp(-a) - math.exp(-b) for a, b in zip(NLL, BASE, strict=True))

    def summary(self) -> dict[str, Any]:
        perplexity = math.exp(sum(self.NLL) / 4)
        found = summarise_divergence(
            self.NLL, self.BASE, (0.0, 0.1, 0.2, 0.7), self.CHANGE, (1, 1, 0, 1)
        )
        return {"perplexity": perplexity, "perplexity_error": 0.1, **found}

    def test_of_hand_made_values(self) -> None:
        found = self.summary()
        assert found["log_ratio"] == pytest.approx((0.2 - 0.1 + 0 + 1.0) / 4)
        assert found["ratio"] == pytest.approx(math.exp(found["log_ratio"]))
        assert found["difference"] == pytest.approx(math.exp(6.5 / 4) - math.exp(5.4 / 4))
        assert found["mean_kld"] == pytest.approx(0.25)
        assert found["kld_quantiles"]["0.5"] == pytest.approx(0.15)
        assert found["kld_quantiles"]["0.9"] == pytest.approx(0.55)  # between the last two
        assert found["same_top"] == 0.75
        assert found["rms_change"] == pytest.approx(
            math.sqrt(sum(value**2 for value in self.CHANGE) / 4)
        )
        mean = [sum(values) / 4 for values in (self.NLL, self.BASE)]
        spread = [[v - mean[i] for v in values] for i, values in enumerate((self.NLL, self.BASE))]
        product = sum(a * b for a, b in zip(*spread, strict=True))
        length = math.prod(math.sqrt(sum(v**2 for v in values)) for values in spread)
        assert found["correlation"] == pytest.approx(product / length)

    def test_the_error_of_the_ratio_is_the_paired_one(self) -> None:
        # llama.cpp: sqrt(var(Q) + var(base) - 2 cov), of the means
        q, base = (torch.tensor(v, dtype=torch.float64) for v in (self.NLL, self.BASE))
        covariance = torch.cov(torch.stack([q, base]))
        expected = math.sqrt(float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 4)
        assert self.summary()["log_ratio_error"] == pytest.approx(expected)

    def test_the_block_has_the_layout_of_llama_cpp(self) -> None:
        lines = divergence_block(self.summary()).splitlines()
        number = r"-? *-?\d+\.\d+"
        patterns = [
            r"====== Perplexity statistics ======",
            rf"Mean PPL\(Q\)                   : {number} ± {number}",
            rf"Mean PPL\(base\)                : {number} ± {number}",
            r"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\): +\d+\.\d\d%",
            rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)     : {number} ± {number}",
            rf"Mean PPL\(Q\)/PPL\(base\)         : {number} ± {number}",
            rf"Mean PPL\(Q\)-PPL\(base\)         : {number} ± {number}",
            "",
            r"====== KL divergence statistics ======",
            rf"Mean    KLD: {number} ± {number}",
            *(
                rf"{name} KLD: {number}"
                for name in (
                    "Maximum",
                    r"99\.9%  ",
                    r"99\.0%  ",
                    r"95\.0%  ",
                    r"90\.0%  ",
                    "Median ",
                    r"10\.0%  ",
                    r" 5\.0%  ",
                    r" 1\.0%  ",
                    r" 0\.1%  ",
                    "Minimum",
                )
            ),
            "",
            r"====== Token probability statistics ======",
            rf"Mean    Δp: {number} ± {number} %",
        ]
        for line, pattern in zip(lines, patterns, strict=False):
            assert re.fullmatch(pattern, line), (line, pattern)
        assert re.fullmatch(rf"RMS Δp    : {number} ± {number} %", lines[-2])
        assert re.fullmatch(rf"Same top p: {number} ± {number} %", lines[-1])

    def test_of_a_single_token_there_is_no_error(self) -> None:
        found = summarise_divergence((1.0,), (1.0,), (0.0,), (0.0,), (1.0,))
        assert found["mean_kld_error"] is None
        assert found["correlation"] is None
        assert "n/a" in divergence_block({"perplexity": 2.7, "perplexity_error": None, **found})


class TestErrors:
    @pytest.mark.parametrize("window", [3, 65, 0, -1])
    def test_a_window_out_of_range_is_refused(self, lm: RiverLM, text: Path, window: int) -> None:
        with pytest.raises(ConfigError, match=f"--window is {window}; give 4 to 64"):
            measure(lm, text, window=window)

    def test_a_text_shorter_than_a_window_is_refused(self, lm: RiverLM, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_text("The river.")
        with pytest.raises(DataError, match="10 tokens, less than one window of 32"):
            measure(lm, path)

    @pytest.mark.parametrize("content", [None, b"caf\xe9"])
    def test_what_is_no_text_is_refused(
        self, lm: RiverLM, tmp_path: Path, content: bytes | None
    ) -> None:
        path = tmp_path / "text.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"can't be read as text|is no UTF-8 text"):
            measure(lm, path)

    def test_another_text_is_another_run(self, lm: RiverLM, text: Path) -> None:
        measure(lm, text)
        text.write_text(TEXT.upper())
        with pytest.raises(ResultFileError, match=r"data is .* there and"):
            measure(lm, text)

    def test_texts_have_no_answers_to_compare(self, lm: RiverLM, text: Path) -> None:
        result = measure(lm, text)
        with pytest.raises(ResultFileError, match="no answers to compare"):
            compare_results(result, result)

    def test_logits_that_are_no_numbers_are_told(self, text: Path) -> None:
        lm = lm_on("cpu", overflowing_subject())
        lm.policy = ExitPolicy.always()
        with pytest.raises(RiverError, match="no numbers"):
            measure(lm, text)
