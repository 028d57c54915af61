"""Perplexity of given text, and the KL divergence of its predictions from the backbone's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from river_llm.measure.likelihood import check_likelihoods

_CHUNK_TOKENS = 128  # tokens whose distributions are held in float32 at a time


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


def summarise(nll: Tensor, kld: Tensor, same: Tensor, exit_layers: Tensor) -> dict[str, float]:
    """Of predicted tokens, each `[tokens]`, see `compare_logits`: perplexity and mean KL divergence
    with their standard errors, quantiles of the latter, the share of tokens with the same argmax,
    and the mean number of backbone layers."""
    perplexity = math.exp(float(nll.mean()))
    median, kld_99, kld_999 = kld.quantile(torch.tensor([0.5, 0.99, 0.999])).tolist()
    return {
        "perplexity": perplexity,
        "perplexity_error": perplexity * _standard_error(nll),
        "mean_kld": float(kld.mean()),
        "mean_kld_error": _standard_error(kld),
        "median_kld": median,
        "kld_99": kld_99,
        "kld_999": kld_999,
        "max_kld": float(kld.max()),
        "same_top": float(same.mean()),
        "mean_exit_layer": float(exit_layers.mean()),
        "num_tokens": len(nll),
    }


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
