"""Perplexity of given text, and the KL divergence of its predictions from the backbone's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.measure.likelihood import check_likelihoods

_CHUNK_TOKENS = 128  # tokens whose distributions are held in float32 at a time


@dataclass(frozen=True, slots=True)
class TextScore:
    """One variant's score over all predicted tokens, beside the backbone.

    Attributes:
        perplexity: exp of the mean negative log-likelihood, with its standard error.
        mean_kld: mean KL divergence from the backbone's distribution to this variant's, in nats,
            with its standard error; then the median, 99 %, 99.9 % and the maximum.
        same_top: share of tokens where both have the same argmax.
        mean_exit_layer: mean number of backbone layers per token.
        num_tokens: predicted tokens.
    """

    perplexity: float
    perplexity_error: float
    mean_kld: float
    mean_kld_error: float
    median_kld: float
    kld_99: float
    kld_999: float
    max_kld: float
    same_top: float
    mean_exit_layer: float
    num_tokens: int


def compare_logits(
    logits: Tensor, reference: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[tokens, vocabulary]` that predict `targets`, beside those of a reference.

    Returns:
        Negative log-likelihood and KL divergence in nats, and whether both have the same argmax (1
        or 0), each float32 `[tokens]`.

    Raises:
        LogitsError: the logits are no numbers.
    """
    targets = targets.to(logits.device)
    results = []
    for start in range(0, len(targets), _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        log_p = reference[chunk].float().log_softmax(-1)
        log_q = logits[chunk].float().log_softmax(-1)
        nll = -log_q.gather(1, targets[chunk].unsqueeze(1)).squeeze(1)
        kld = (log_p.exp() * (log_p - log_q)).sum(-1)
        same = (logits[chunk].argmax(-1) == reference[chunk].argmax(-1)).float()
        results.append((nll, kld, same))
    nll, kld, same = (torch.cat(part).cpu() for part in zip(*results, strict=True))
    check_likelihoods(nll + kld, logits, reference)
    return nll, kld, same


def summarise(nll: Tensor, kld: Tensor, same: Tensor, exit_layers: Tensor) -> TextScore:
    """Of predicted tokens, each `[tokens]`: see `compare_logits`."""
    perplexity = math.exp(float(nll.mean()))
    quantiles = kld.quantile(torch.tensor([0.5, 0.99, 0.999])).tolist()
    return TextScore(
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(nll),
        mean_kld=float(kld.mean()),
        mean_kld_error=_standard_error(kld),
        median_kld=quantiles[0],
        kld_99=quantiles[1],
        kld_999=quantiles[2],
        max_kld=float(kld.max()),
        same_top=float(same.mean()),
        mean_exit_layer=float(exit_layers.mean()),
        num_tokens=len(nll),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
