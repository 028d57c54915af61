"""What the river does on a text: similarity, K and V cosine, exit depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from river_llm.river.attach import AttachedRiver
from river_llm.river.policy import ExitPolicy


@dataclass(frozen=True, slots=True)
class TextInspection:
    """Measured on one text, every token given (teacher-forced).

    Attributes:
        similarities: float32 `[L, T]`, state transition similarity of each backbone layer.
        key_cosine, value_cosine: float32 `[L]`, cosine between the keys (values) that the river
            alone and the backbone alone write, mean over heads and tokens.
        exit_layers: int64 `[T]`, where each token leaves the backbone by the policy.
    """

    similarities: Tensor
    key_cosine: Tensor
    value_cosine: Tensor
    exit_layers: Tensor


@torch.no_grad()
def inspect_text(attached: AttachedRiver, token_ids: Sequence[int]) -> TextInspection:
    """Run a text through the backbone, through the river, and by the attached policy.

    The first token is left out of the cosines: models park an outlier there.

    Args:
        token_ids: two tokens or more.
    """
    policy = attached.policy
    router = attached.router
    tokens = torch.tensor([list(token_ids)], device=attached.model.device)
    try:
        router.record_similarities = True
        backbone_cache = _run(attached, tokens, ExitPolicy.never(prefill="token"))
        assert router.similarities is not None
        similarities = router.similarities[:, 0]
        router.record_similarities = False
        river_cache = _run(attached, tokens, ExitPolicy.always())
        _run(attached, tokens, replace(policy, prefill="token"))
        exit_layers = attached.last_exit_layers[0]
    finally:
        router.record_similarities = False
        attached.policy = policy
    pairs = list(zip(river_cache.layers, backbone_cache.layers, strict=True))
    return TextInspection(
        similarities=similarities,
        key_cosine=torch.stack([_cosine(a.keys, b.keys) for a, b in pairs]),
        value_cosine=torch.stack([_cosine(a.values, b.values) for a, b in pairs]),
        exit_layers=exit_layers,
    )


def _run(attached: AttachedRiver, tokens: Tensor, policy: ExitPolicy) -> DynamicCache:
    """The KV cache after one pass over `tokens` `[1, T]`."""
    attached.policy = policy
    cache = DynamicCache()
    attached.model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache


def _cosine(river: Tensor, backbone: Tensor) -> Tensor:
    """Mean over heads and tokens but the first; each `[1, heads, tokens, head_dim]`."""
    return F.cosine_similarity(river[:, :, 1:].float(), backbone[:, :, 1:].float(), dim=-1).mean()
