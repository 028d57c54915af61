"""Perplexity and KL divergence beside float64."""

from __future__ import annotations

import math
import statistics

import numpy
import pytest
import torch
from text_scores import summarise

from river_llm.errors import LogitsError
from river_llm.measure.divergence import compare_logits

TOKENS, VOCABULARY = 300, 11  # compared in more than one piece
_generator = torch.Generator().manual_seed(3)
LOGITS, REFERENCE = 3 * torch.randn(2, TOKENS, VOCABULARY, generator=_generator)
TARGETS = torch.randint(0, VOCABULARY, (TOKENS,), generator=_generator)
EXIT_LAYERS = torch.arange(TOKENS).float() % 5


def test_figures_are_those_of_float64() -> None:
    q, p = (logits.double().softmax(-1) for logits in (LOGITS, REFERENCE))
    nll = [-math.log(float(row[target])) for row, target in zip(q, TARGETS, strict=True)]
    kld = (p * (p / q).log()).sum(-1).tolist()
    same = (q.argmax(-1) == p.argmax(-1)).tolist()
    perplexity = math.exp(statistics.fmean(nll))
    found = summarise(*compare_logits(LOGITS, REFERENCE, TARGETS), EXIT_LAYERS)
    expected = {
        "perplexity": perplexity,
        "perplexity_error": perplexity * statistics.stdev(nll) / math.sqrt(TOKENS),
        "mean_kld": statistics.fmean(kld),
        "mean_kld_error": statistics.stdev(kld) / math.sqrt(TOKENS),
        "median_kld": statistics.median(kld),
        "kld_99": numpy.quantile(kld, 0.99),
        "kld_999": numpy.quantile(kld, 0.999),
        "max_kld": max(kld),
        "same_top": sum(same) / TOKENS,
        "mean_exit_layer": 2,
        "num_tokens": TOKENS,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_predicted_token_has_no_standard_error() -> None:
    found = summarise(*compare_logits(LOGITS[:1], REFERENCE[:1], TARGETS[:1]), EXIT_LAYERS[:1])
    assert found["num_tokens"] == 1
    assert math.isnan(found["perplexity_error"])
    assert math.isnan(found["mean_kld_error"])


@pytest.mark.parametrize("place", ["logits", "reference"])
def test_logits_that_are_no_numbers_are_refused(place: str) -> None:
    logits = {"logits": torch.zeros(2, 3), "reference": torch.zeros(2, 3)}
    logits[place][1, 2] = math.nan
    with pytest.raises(LogitsError, match="the logits are no numbers"):
        compare_logits(**logits, targets=torch.tensor([0, 1]))


def test_a_token_without_probability_is_refused() -> None:
    logits = torch.tensor([[0.0, -math.inf]])
    with pytest.raises(LogitsError, match="no probability at all"):
        compare_logits(logits, torch.zeros(1, 2), torch.tensor([1]))
