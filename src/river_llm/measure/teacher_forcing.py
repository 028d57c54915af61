"""Texts along an engine, each token leaving by thresholds of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.engines import Engine, Step
from river_llm.generate.rows import new_sequence, prefill
from river_llm.generate.second_look import run_step, run_text, tokens_before
from river_llm.measure.likelihood import LOGIT_ROWS
from river_llm.river.policy import ExitPolicy


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text that is to be scored.

    Attributes:
        tokens: `[T]`.
        thresholds: `[L]`, see `ExitPolicy.thresholds`, or `[T, L]`, a row for each token.
        first: so many tokens are a prompt but for its last one: their logits aren't wanted, and
            there are no second looks at them.
    """

    tokens: Sequence[int]
    thresholds: Tensor
    first: int = 0


def score(
    engine: Engine, tokens: Sequence[int], thresholds: Tensor, second_look: float | None = None
) -> tuple[Tensor, list[int]]:
    """The same of one text, see `score_texts`."""
    (scored,) = score_texts(engine, [ScoredText(tokens, thresholds)], second_look)
    return scored


def score_texts(
    engine: Engine, texts: Sequence[ScoredText], second_look: float | None = None
) -> list[tuple[Tensor, list[int]]]:
    """Of each text: logits `[T - first, vocabulary]` after all tokens but the first ones, and how
    many layers each of these ran. The texts run side by side.

    Args:
        second_look: see `ExitPolicy`.
    """
    logits: list[list[Tensor]] = [[] for _ in texts]
    depths: list[list[int]] = [[] for _ in texts]
    rows = [text.thresholds.expand(len(text.tokens), -1) for text in texts]
    with ExitStack() as open_sequences:
        sequences = [
            open_sequences.enter_context(new_sequence(engine, text.first + 1)) for text in texts
        ]
        for text, thresholds, sequence in zip(texts, rows, sequences, strict=True):
            for start in range(0, text.first, LOGIT_ROWS):
                part = slice(start, min(start + LOGIT_ROWS, text.first))
                tokens = text.tokens[part]
                owners = [sequence] * len(tokens)
                engine.forward(Step(tokens, owners, thresholds[part], ()))
        width = max(1, LOGIT_ROWS // len(texts))
        longest = max(len(text.tokens) - text.first for text in texts)
        for start in range(0, longest, width):
            parts = [slice(x.first + start, x.first + start + width) for x in texts]
            counts = [len(text.tokens[part]) for text, part in zip(texts, parts, strict=True)]
            step = Step(
                [t for text, part in zip(texts, parts, strict=True) for t in text.tokens[part]],
                [s for s, count in zip(sequences, counts, strict=True) for _ in range(count)],
                torch.cat([row[part] for row, part in zip(rows, parts, strict=True)]),
                range(sum(counts)),
            )
            result = run_text(
                engine,
                step,
                second_look,
                {s: text.tokens for s, text in zip(sequences, texts, strict=True)},
                {s: text.first for s, text in zip(sequences, texts, strict=True)},
            )
            row = 0
            for i, count in enumerate(counts):
                logits[i].append(result.logits[row : row + count].clone())
                depths[i] += result.exit_layers[row : row + count].tolist()
                row += count
    return [(torch.cat(found), exits) for found, exits in zip(logits, depths, strict=True)]


def similarities(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """State transition similarities `[L, T]` of a text that runs the backbone."""
    never = torch.tensor(ExitPolicy.never().thresholds(engine.num_layers))
    found = []
    with new_sequence(engine) as sequence:
        for first in range(0, len(tokens), LOGIT_ROWS):
            part = tokens[first : first + LOGIT_ROWS]
            owners = [sequence] * len(part)
            result = engine.forward(Step(part, owners, never, (), record_similarities=True))
            assert result.similarities is not None
            found.append(result.similarities.clone())
    return torch.cat(found, 1)


def decode_seconds(
    engine: Engine,
    tokens: Sequence[int],
    thresholds: Tensor,
    prompt: int,
    second_look: float | None = None,
) -> tuple[float, list[int]]:
    """How long it takes to decode along a text, behind its first `prompt` tokens, which the
    backbone runs; and how many layers each decoded token ran.

    Args:
        thresholds: `[L]` or `[T, L]`.
        second_look: see `ExitPolicy`.
    """
    rows = thresholds.expand(len(tokens), -1)
    depths = []
    with new_sequence(engine, prompt) as sequence:
        prefill(engine, sequence, tokens[:prompt], ExitPolicy.never())
        start = time.perf_counter()
        first = prompt
        for place, row in enumerate(rows[prompt:], start=prompt):
            step = Step([tokens[place]], [sequence], row, [0])
            before = [tokens_before(engine, tokens, place + 1, first)]
            result, again = run_step(engine, step, [second_look], before, keep_logits=False)
            first = place + 1 if again else first
            result.best_tokens.tolist()
            depths.append(result.exit_layers)
        seconds = time.perf_counter() - start
    return seconds, torch.cat(depths).tolist()
