"""Steps of engines as tests take them: tokens of some sequences; and what the cache holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.kv_cache import dequantize_states
from river_llm.engines.step import CacheAccess, Engine, Step, StepResult

Texts = Mapping[int, Sequence[int]]  # tokens by sequence


def thresholds_of(engine: Engine, policy: ExitPolicy | None = None) -> Tensor:
    """Float32 `[L]`; of no policy: those that nobody exceeds."""
    if policy is None:
        return torch.full((engine.num_layers,), math.inf)
    return torch.tensor(policy.thresholds(engine.num_layers))


def append(
    engine: Engine,
    texts: Texts,
    thresholds: Tensor | Sequence[float] | ExitPolicy | None = None,
    **step: Any,
) -> StepResult:
    """Append tokens to sequences in one step, with the logits of all rows unless said otherwise."""
    if thresholds is None or isinstance(thresholds, ExitPolicy):
        thresholds = thresholds_of(engine, thresholds)
    tokens = list(chain(*texts.values()))
    sequences = list(chain(*([sequence] * len(text) for sequence, text in texts.items())))
    logit_rows = step.pop("logit_rows", range(len(tokens)))
    return engine.forward(Step(tokens, sequences, torch.as_tensor(thresholds), logit_rows, **step))


def begin(engine: Engine, lengths: Iterable[int] = (0,)) -> list[int]:
    """New sequences, the only ones, for prompts of these lengths."""
    for sequence in engine.sequences():
        engine.drop_sequence(sequence)
    return [engine.add_sequence(length) for length in lengths]


def decode_along(
    engine: Engine, tokens: Sequence[int], prompt_length: int, policy: ExitPolicy | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `[steps, vocabulary]` and exit layers `[steps]` of a text alone: of its prompt, which
    runs the backbone, and of single tokens after it, whatever the greedy ones would be."""
    (sequence,) = begin(engine, [prompt_length])
    steps = [append(engine, {sequence: tokens[:prompt_length]}, logit_rows=[prompt_length - 1])]
    logits = [steps[0].logits]
    for token in tokens[prompt_length:]:
        steps.append(append(engine, {sequence: [token]}, policy))
        logits.append(steps[-1].logits)
    return torch.cat(logits), torch.stack([step.exit_layers[-1] for step in steps])


def cached_states(engine: CacheAccess, sequence: int = 0) -> Tensor:
    """Keys and values in the cache, float32 `[2, layers, key-value heads, positions, head_dim]`."""
    length = engine.length(sequence)  # type: ignore[attr-defined]
    if length == 0:
        return torch.empty(0)
    tensors = engine.read_cache(sequence, length)
    if isinstance(engine, CpuEngine):
        return _states_of_pages(engine, torch.stack(list(tensors.values())))[..., :length, :]

    def states(name: str, index: int) -> Tensor:
        part = tensors[f"{name}s.{index}"]
        scales = tensors.get(f"{name}_scales.{index}")
        return part if scales is None else dequantize_states(part, scales, torch.float32)

    kinds = [[states(name, i) for i in range(engine.num_layers)] for name in ("key", "value")]  # type: ignore[attr-defined]
    return torch.stack([torch.cat(layers) for layers in kinds]).float()


def _states_of_pages(engine: CpuEngine, pages: Tensor) -> Tensor:
    """By the layout of csrc/kv_cache.h; uint8 `[pages, bytes]`."""
    layers, heads, dims = (
        engine.model.shape[name] for name in ("num_layers", "num_kv_heads", "head_dim")
    )
    parts = pages.view(len(pages), layers, heads, -1)
    per_word = 2 if engine.kv_bits == 16 else 4
    count = 2 * 64 * dims  # keys and values of a page's 64 positions
    if engine.kv_bits == 16:
        numbers = parts.view(torch.bfloat16)
        scales = torch.ones(1, 1, 1, 2, 1, 1)
    else:
        numbers = parts[..., :count].view(torch.int8)
        scales = parts[..., count:].contiguous().view(torch.float32).unflatten(-1, (2, 64, 1))
    keys, values = numbers.float().unflatten(-1, (2, -1)).unbind(3)
    order = [0, 1] if per_word == 2 else [0, 2, 1, 3]
    keys = keys.unflatten(-1, (4, dims // per_word, 16, per_word))[..., order]
    values = values.unflatten(-1, (64 // per_word, dims, per_word))[..., order]
    states = torch.stack(
        [keys.transpose(4, 5).flatten(5).flatten(3, 4), values.transpose(-1, -2).flatten(3, 4)], 3
    )
    return (states * scales).permute(3, 1, 2, 0, 4, 5).flatten(3, 4)
