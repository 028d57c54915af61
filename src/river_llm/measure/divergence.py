"""Perplexity, and KL divergence from the backbone, on given text.

Every token leaves the backbone by its own similarity, as decoding would take it, but a whole
window runs in one pass (``prefill="token"``): a layer's keys and values of earlier tokens are
there, from backbone or river, before a later token attends to them, so the result is that of
decoding the window token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from river_llm.attachment import AttachedRiver
from river_llm.exit_policy import ExitPolicy
from river_llm.measure.likelihood import check_likelihoods

_CHUNK_TOKENS = 128  # tokens whose distributions are held in float32 at a time


@dataclass(frozen=True, slots=True)
class TextScore:
    """One arm's score over all predicted tokens, beside the backbone.

    Attributes:
        perplexity: exp of the mean negative log-likelihood, with its standard error.
        mean_kld: mean KL divergence from the backbone's distribution to this arm's, in nats, with
            its standard error; then the median, 99 %, 99.9 % and the maximum.
        same_top: share of tokens where both find the same token likeliest.
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


def score_text(
    attached: AttachedRiver,
    windows: Sequence[Sequence[int]],
    arms: Mapping[str, ExitPolicy],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TextScore]:
    """Score every arm on `windows`, each a list of at least two tokens that stands on its own.

    Args:
        arms: exit policies by name; their prefill rule is not used.
        progress: called with (windows done, windows in all).
    """
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {name: [] for name in arms}
    policy_before = attached.policy
    try:
        for done, window in enumerate(windows, start=1):
            tokens = torch.tensor(window, device=attached.model.device)
            reference = _logits(attached, tokens, ExitPolicy.never())
            for name, policy in arms.items():
                logits = _logits(attached, tokens, policy)
                exit_layers = attached.last_exit_layers[0, :-1].float()
                parts[name].append((*compare_logits(logits, reference, tokens[1:]), exit_layers))
            if progress:
                progress(done, len(windows))
    finally:
        attached.policy = policy_before
    return {name: summarise(*map(torch.cat, zip(*p, strict=True))) for name, p in parts.items()}


@torch.no_grad()
def _logits(attached: AttachedRiver, tokens: Tensor, policy: ExitPolicy) -> Tensor:
    """Logits `[T - 1, vocabulary]` that predict `tokens[1:]`."""
    attached.policy = replace(policy, prefill="token")
    logits: Tensor = attached.model(input_ids=tokens.unsqueeze(0), use_cache=False).logits
    return logits[0, :-1]


def compare_logits(
    logits: Tensor, reference: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[tokens, vocabulary]` that predict `targets`, beside those of a reference.

    Returns:
        Negative log-likelihood and KL divergence in nats, and whether both find the same token
        likeliest (1 or 0), each `[tokens]`.

    Raises:
        LogitsError: the logits are no numbers.
    """
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
