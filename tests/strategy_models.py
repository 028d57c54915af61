"""Tiny models for tests of the strategies, and texts that leave them at every depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import ExitPolicy
from river_llm.config import Strategy
from river_llm.engines import StepResult
from river_llm.strategies import StrategyEngine, make_strategy_engine

NUM_LAYERS = 4
WITH_EXITS: tuple[Strategy, ...] = ("mask", "recompute", "propagate", "monotonic")
_SHARES = (0.2, 0.3, 0.5)  # that leave after each layer but the last, of the tokens there


@cache
def model_of(architecture: str) -> PreTrainedModel:
    """A tiny model that the tests share; an engine on it is taken off again (`engine_on`)."""
    return tiny_model(architecture, **ARCHITECTURES[architecture])


@cache
def reference_of(architecture: str) -> PreTrainedModel:
    """The same weights for `run_text`: its attention is eager, so that there always is a mask."""
    return tiny_model(architecture, **ARCHITECTURES[architecture], attn_implementation="eager")


@contextmanager
def engine_on(
    model: PreTrainedModel, strategy: Strategy, policy: ExitPolicy | None = None
) -> Iterator[StrategyEngine]:
    """An engine while it lasts."""
    engine = make_strategy_engine(model, strategy, policy)
    try:
        yield engine
    finally:
        engine.detach()


@cache
def thresholds_of(architecture: str) -> tuple[float, ...]:
    """By which some tokens leave after each of the layers."""
    text = tokens(1, 60, seed=7)
    with engine_on(model_of(architecture), "none") as engine:
        engine.record_similarities = True
        similarities = [result.similarities for result in follow(engine, text, 1)[1:]]
    of_layers = torch.cat([step for step in similarities if step is not None], 1)  # [L, steps]
    thresholds = [math.inf]
    for layer, share in zip(range(NUM_LAYERS - 1), _SHARES, strict=True):
        thresholds.append(float(of_layers[layer].quantile(1 - share)))
        of_layers = of_layers[:, of_layers[layer] <= thresholds[-1]]
    return tuple(thresholds)


def mixed_policy(architecture: str) -> ExitPolicy:
    """With these thresholds."""
    return ExitPolicy.per_layer(thresholds_of(architecture))


def tokens(batch: int, length: int, seed: int) -> Tensor:
    """Random tokens `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def follow(
    engine: StrategyEngine, text: Tensor, prompt: int, padding_mask: Tensor | None = None
) -> list[StepResult]:
    """Run text `[batch, tokens]`: its first `prompt` tokens in one pass, the others one by one."""
    steps = [engine.prefill(text[:, :prompt], padding_mask)]
    return steps + [engine.decode(text[:, place]) for place in range(prompt, text.shape[1])]


def logits_of(steps: Sequence[StepResult], row: int = 0) -> Tensor:
    """Of one sequence, `[steps, V]`."""
    return torch.stack([step.logits[row] for step in steps])


def exits_of(steps: Sequence[StepResult], row: int = 0) -> list[int]:
    """Exit layers of one sequence."""
    return [int(step.exit_layers[row]) for step in steps]


def check_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
