"""How far predictions of given text are from the backbone's."""

from __future__ import annotations

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
