"""Sequences that leave together: padding and fillers have no say in the depth, on every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from native_engines import random_tokens, subject_of

from river_llm import ExitPolicy
from river_llm.engines import Engine

NUM_LAYERS = 4
PROMPT_LENGTH = 4

every_engine = pytest.mark.parametrize("kind", ["cpu", "torch"])

Texts = Sequence[Sequence[int]]


def engine_of(kind: str) -> Any:
    subject = subject_of("llama")
    return subject.engine() if kind == "cpu" else subject.reference()


def similarities_alone(engine: Engine, text: Sequence[int], depths: Sequence[int]) -> list[float]:
    """Of a text's last token after each layer, where the tokens before it ran to these depths, one
    by one; NaN where it may not go."""
    engine.truncate(0)
    engine.record_similarities = True
    for place, token in enumerate(text):
        is_last = place + 1 == len(text)
        depth = NUM_LAYERS if is_last else depths[place]
        engine.policy = ExitPolicy.fixed(depth, prefill="token")
        if place == 0:
            step = engine.prefill(torch.tensor([[token]]))
        else:
            step = engine.decode(torch.tensor([token]))
    engine.record_similarities = False
    assert step.similarities is not None
    similarities: list[float] = step.similarities[:, 0].tolist()
    return similarities


def depths_by_hand(
    engine: Engine,
    texts: Texts,
    starts: Sequence[int],
    prompt_length: int,
    thresholds: Sequence[float],
) -> list[list[int]]:
    """How deep the tokens of each text go where those of one column leave together.

    Args:
        starts: the column of each text's first token.
        prompt_length: the first so many columns run the whole backbone.
    """
    depths: list[list[int]] = [[] for _ in texts]
    for column in range(max(start + len(text) for text, start in zip(texts, starts, strict=True))):
        there = [
            row
            for row, (text, start) in enumerate(zip(texts, starts, strict=True))
            if start <= column < start + len(text)
        ]
        if column < prompt_length:
            for row in there:
                depths[row].append(NUM_LAYERS)
            continue
        places = {row: column - starts[row] for row in there}
        own = {
            row: similarities_alone(engine, texts[row][: place + 1], depths[row])
            for row, place in places.items()
        }
        together = dict.fromkeys(there, NUM_LAYERS)
        for layer in range(1, NUM_LAYERS):
            staying = [row for row in there if together[row] == NUM_LAYERS]
            if staying and min(own[row][layer - 1] for row in staying) > thresholds[layer]:
                together |= dict.fromkeys(staying, layer)
        for row in there:
            depths[row].append(together[row])
    return depths


def mixed_thresholds(engine: Engine, texts: Texts) -> tuple[float, ...]:
    """By which half of the tokens would leave after each layer, and none by rounding."""
    all_depths = [NUM_LAYERS] * max(map(len, texts))
    found = torch.tensor(
        [
            similarities_alone(engine, text[: place + 1], all_depths)
            for text in texts
            for place in range(len(text))
        ]
    )
    middle = found.sort(0).values[len(found) // 3 : -len(found) // 3]  # [tokens, L]
    widest = middle.diff(dim=0).argmax(0)
    gaps = torch.stack([middle[place : place + 2, layer] for layer, place in enumerate(widest)])
    assert float(gaps.diff().min()) > 1e-4
    return (math.inf, *gaps.mean(1)[: NUM_LAYERS - 1].tolist())


@every_engine
def test_padding_of_a_prompt_whose_tokens_leave_has_no_say(kind: str) -> None:
    starts = (6, 0, 9)
    tokens = random_tokens(3, 14, seed=36)  # the padding's too
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(starts).unsqueeze(1)
    texts = [row[start:] for row, start in zip(tokens.tolist(), starts, strict=True)]
    engine = engine_of(kind)
    thresholds = mixed_thresholds(engine, texts)
    wanted = depths_by_hand(engine, texts, starts, 0, thresholds)
    assert len(set(wanted[1])) >= 3
    engine.policy = ExitPolicy.per_layer(thresholds, prefill="token", batch="minimum")
    engine.truncate(0)
    exit_layers = engine.prefill(tokens, mask).exit_layers.unsqueeze(1)
    if kind == "torch":  # of all tokens
        exit_layers = engine.attached.last_exit_layers
    for row, start in enumerate(starts):
        found = exit_layers[row, start - tokens.shape[1] :].tolist()
        assert found == wanted[row][-len(found) :]


@every_engine
def test_fillers_of_texts_of_different_length_have_no_say(kind: str) -> None:
    counts = (3, 10, 6)
    tokens = random_tokens(3, PROMPT_LENGTH + max(counts), seed=32)
    texts = [
        row[: PROMPT_LENGTH + count] for row, count in zip(tokens.tolist(), counts, strict=True)
    ]
    engine = engine_of(kind)
    thresholds = mixed_thresholds(engine, texts)
    wanted = depths_by_hand(engine, texts, (0, 0, 0), PROMPT_LENGTH, thresholds)
    assert len(set(wanted[1])) >= 3
    engine.policy = ExitPolicy.per_layer(thresholds, batch="minimum")
    engine.truncate(0)
    engine.prefill(tokens[:, :PROMPT_LENGTH])
    found = engine.score(tokens[:, PROMPT_LENGTH:], counts).exit_layers
    for row, count in enumerate(counts):
        assert found[row, :count].tolist() == wanted[row][PROMPT_LENGTH:]
