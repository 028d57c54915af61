"""A text along an engine, each of its tokens leaving by thresholds of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.engines import Engine
from river_llm.engines.step import StepResult


def score(engine: Engine, tokens: Sequence[int], thresholds: Tensor) -> tuple[Tensor, list[int]]:
    """Logits `[T, vocabulary]` after each of T tokens, and how many layers each ran.

    Args:
        thresholds: `[L]`, see `ExitPolicy.thresholds`, or `[T, L]`, a row for each token.
    """
    engine.truncate(0)
    if thresholds.ndim == 1:
        engine.policy = _policy(thresholds)
        first = engine.prefill(torch.tensor([tokens[:1]]))
        logits, depths = [first.logits.clone()], first.exit_layers.tolist()
        rest = engine.score(torch.tensor([tokens[1:]]))
        return torch.cat([*logits, rest.logits[0]]), depths + rest.exit_layers[0].tolist()
    logits, depths = [], []
    for token, row in zip(tokens, thresholds, strict=True):
        result = _append(engine, token, row)
        logits.append(result.logits.clone())
        depths += result.exit_layers.tolist()
    return torch.cat(logits), depths


def tokens_per_second(
    engine: Engine, tokens: Sequence[int], thresholds: Tensor, prompt: int
) -> float:
    """Decode along a text, behind its first `prompt` tokens, which the backbone runs.

    Args:
        thresholds: `[L]` or `[T, L]`, as of `score`.
    """
    engine.truncate(0)
    engine.policy = ExitPolicy.never()
    engine.prefill(torch.tensor([tokens[:prompt]])).best_tokens.tolist()
    rows = thresholds.expand(len(tokens), -1)
    start = time.perf_counter()
    for token, row in zip(tokens[prompt:], rows[prompt:], strict=True):
        _append(engine, token, row).best_tokens.tolist()
    return (len(tokens) - prompt) / (time.perf_counter() - start)


def _append(engine: Engine, token: int, thresholds: Tensor) -> StepResult:
    engine.policy = _policy(thresholds)
    if engine.length == 0:
        return engine.prefill(torch.tensor([[token]]))
    return engine.decode(torch.tensor([token]))


def _policy(thresholds: Tensor) -> ExitPolicy:
    return ExitPolicy.per_layer(tuple(thresholds.tolist()), prefill="token")
