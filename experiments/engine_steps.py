"""A text along an engine, each of its tokens leaving by thresholds of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.engines import Engine, Step
from river_llm.generate.rows import new_sequence, prefill
from river_llm.generate.second_look import run_step, run_text

_ROWS = 256  # whose logits are held at a time


def score(
    engine: Engine, tokens: Sequence[int], thresholds: Tensor, second_look: float | None = None
) -> tuple[Tensor, list[int]]:
    """Logits `[T, vocabulary]` after each of T tokens, and how many layers each ran.

    Args:
        thresholds: `[L]`, see `ExitPolicy.thresholds`, or `[T, L]`, a row for each token.
        second_look: see `ExitPolicy`.
    """
    logits, depths = [], []
    with new_sequence(engine) as sequence:
        for first in range(0, len(tokens), _ROWS):
            part = tokens[first : first + _ROWS]
            rows = thresholds if thresholds.ndim == 1 else thresholds[first : first + _ROWS]
            step = Step(part, [sequence] * len(part), rows, range(len(part)))
            result = run_text(engine, step, second_look)
            logits.append(result.logits.clone())
            depths += result.exit_layers.tolist()
    return torch.cat(logits), depths


def tokens_per_second(
    engine: Engine,
    tokens: Sequence[int],
    thresholds: Tensor,
    prompt: int,
    second_look: float | None = None,
) -> float:
    """Decode along a text, behind its first `prompt` tokens, which the backbone runs.

    Args:
        thresholds, second_look: as of `score`.
    """
    rows = thresholds.expand(len(tokens), -1)
    with new_sequence(engine) as sequence:
        prefill(engine, sequence, tokens[:prompt], ExitPolicy.never())
        start = time.perf_counter()
        for token, row in zip(tokens[prompt:], rows[prompt:], strict=True):
            result, _ = run_step(engine, Step([token], [sequence], row, [0]), [second_look])
            result.best_tokens.tolist()
        return (len(tokens) - prompt) / (time.perf_counter() - start)
