"""A text in windows, and how far a variant's predictions along it are from the backbone's.

Laid out as `llama-perplexity` does it: windows of equal length that don't overlap; the first half
of each is context, every token after it is predicted and counts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from river_llm.measure.divergence import compare_logits
from river_llm.text.utf8 import read_text


def read_windows(
    tokenizer: PreTrainedTokenizerBase, text: Path, window: int, count: int | None
) -> list[list[int]]:
    """The first `count` windows of a text, all if it is None.

    Raises:
        SystemExit: the text has no whole window.
        DataError: it can't be read.
    """
    tokens = list(tokenizer(read_text(text), add_special_tokens=False).input_ids)
    windows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]
    if window < 4 or not windows:
        raise SystemExit(f"{text} has {len(tokens)} tokens; give a --window of 4 to as many")
    begin = tokenizer.bos_token_id
    if begin is not None and list(tokenizer("a").input_ids)[:1] == [begin]:
        for one in windows:
            one[0] = begin
    return windows[:count]


class WindowScores:
    """Of one variant, window by window.

    Attributes:
        exit_layers: backbone layers that each predicting token ran.
    """

    def __init__(self) -> None:
        self.exit_layers: list[int] = []
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self, window: list[int], logits: Tensor, reference: Tensor, exit_layers: list[int]
    ) -> None:
        """Count the second half of a window.

        Args:
            logits, reference: `[tokens - 1, vocabulary]`, which predict all tokens but the first;
                the reference is the backbone's.
            exit_layers: of all tokens but the last.
        """
        first = len(window) // 2
        targets = torch.tensor(window[first + 1 :])
        self._parts.append(compare_logits(logits[first:], reference[first:], targets))
        self.exit_layers += exit_layers[first:]

    def summarise(self) -> dict[str, Any]:
        """See `summarise`; and the mean divergence of each window."""
        nll, kld, same = (torch.cat(part) for part in zip(*self._parts, strict=True))
        score = summarise(nll, kld, same, torch.tensor(self.exit_layers).float())
        return {**score, "kld_of_windows": [float(kld.mean()) for _, kld, _ in self._parts]}


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
