"""The native engine on the real SmolLM2, held against `transformers` in float32 on the same weights
of bfloat16."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from exit_reference import layer_similarities, quantised_from
from native_engines import every_kernel_set, relative_errors
from steps import append, begin, cached_states, decode_along
from test_smollm2 import PARAGRAPH
from tiny_models import fake_quantised
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import ExitPolicy, River
from river_llm.engines.cpu import CpuEngine
from river_llm.load.model import load_backbone

PROMPT_LENGTH = 24


@dataclass(frozen=True)
class Subject:
    """SmolLM2 in bfloat16 and its river, the same weights in float32, and a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    river: River
    exact: PreTrainedModel
    quantised: PreTrainedModel
    tokens: list[int]
    logits: Tensor  # [T, vocabulary] of the backbone in float32

    def engine(self, **settings: Any) -> CpuEngine:
        """A native engine of one thread, by default with the best kernels."""
        return CpuEngine(self.model, self.river, threads=1, **settings)


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, tokenizer = load_backbone("smollm2")
    river = River.build(model)
    exact = copy.deepcopy(model).float()
    tokens = tokenizer(PARAGRAPH).input_ids
    with torch.no_grad():
        logits = exact(torch.tensor([tokens])).logits[0]
    return Subject(model, tokenizer, river, exact, fake_quantised(exact, river), tokens, logits)


@pytest.fixture(scope="module")
def engine(subject: Subject) -> CpuEngine:
    return subject.engine()


@every_kernel_set
def test_backbone_and_river_have_the_logits_of_float32(subject: Subject, kernels: str) -> None:
    engine = subject.engine(kernels=kernels)
    (sequence,) = begin(engine)
    step = append(engine, {sequence: subject.tokens[:160]})
    check_logits(step.logits, subject.logits[:160], error=0.015, agreement=0.97)
    (sequence,) = begin(engine)
    step = append(engine, {sequence: subject.tokens[:64]}, ExitPolicy.always())
    with torch.no_grad():
        expected = subject.quantised(torch.tensor([subject.tokens[:64]])).logits[0]
    check_logits(step.logits, expected, error=0.01, agreement=0.95)
    assert float(relative_errors(expected, subject.logits[:64]).mean()) > 0.1


@pytest.mark.parametrize(
    ("narrow", "error", "agreement"),
    [({"lm_head_bits": 8}, 0.02, 0.96), ({"backbone_bits": 8}, 0.04, 0.94)],
    ids=["8-bit LM head", "8-bit backbone"],
)
def test_8_bits_are_near_the_model(
    subject: Subject, engine: CpuEngine, narrow: dict[str, int], error: float, agreement: float
) -> None:
    eight_bits = subject.engine(**narrow)
    (sequence,) = begin(eight_bits)
    logits = append(eight_bits, {sequence: subject.tokens[:200]}).logits
    check_logits(logits, subject.logits[:200], error, agreement, doubt=0.08)
    assert eight_bits._core.weight_bytes < engine._core.weight_bytes


@pytest.mark.parametrize("exit_layer", [1, 3, 15, 29])
@torch.no_grad()
def test_a_fixed_exit_is_a_model_quantised_from_there(
    subject: Subject, engine: CpuEngine, exit_layer: int
) -> None:
    tokens = subject.tokens[: PROMPT_LENGTH + 12]
    cache = DynamicCache()
    expected = [
        subject.exact(torch.tensor([tokens[:PROMPT_LENGTH]]), past_key_values=cache).logits[0, -1:]
    ]
    for token in tokens[PROMPT_LENGTH:]:
        with quantised_from(subject.exact, subject.quantised, exit_layer) as hybrid:
            logits = hybrid(torch.tensor([[token]]), past_key_values=cache).logits[0]
        expected.append(logits)
    logits, exits = decode_along(engine, tokens, PROMPT_LENGTH, ExitPolicy.fixed(exit_layer))
    assert exits[1:].tolist() == [exit_layer] * 12
    check_logits(logits, torch.cat(expected), error=0.015, agreement=0.9)
    parts = ("keys", "values")
    written = [torch.stack([getattr(layer, part)[0] for layer in cache.layers]) for part in parts]
    states = cached_states(engine, engine.sequences()[0]).flatten(2)
    assert float(relative_errors(states, torch.stack(written).flatten(2)).max()) < 0.015


def test_exits_and_similarities_are_those_of_float32(subject: Subject, engine: CpuEngine) -> None:
    """Every token behind a prompt of backbone tokens, so that no exit depends on another."""
    end, threshold = PROMPT_LENGTH + 48, 0.97
    tokens = subject.tokens[:end]
    exact = layer_similarities(subject.exact, tokens)[:, PROMPT_LENGTH:].float()
    (sequence,) = begin(engine)
    step = append(engine, {sequence: tokens}, record_similarities=True)
    assert step.similarities is not None
    errors = (step.similarities[:, PROMPT_LENGTH:] - exact).abs()
    assert float(errors.max()) < 0.006
    assert float(errors[exact > 0.9].max()) < 0.001
    exit_layers = []
    for place in reversed(range(PROMPT_LENGTH, end)):
        engine.truncate(sequence, place)
        step = append(engine, {sequence: [tokens[place]]}, ExitPolicy.similarity(threshold, 2))
        exit_layers.insert(0, int(step.exit_layers[0]))
    layers = torch.arange(2, subject.model.config.num_hidden_layers).unsqueeze(1)
    above = exact[layers.flatten() - 1] > threshold  # after each of these layers
    expected = torch.where(above.any(0), 2 + above.int().argmax(0), len(layers) + 2)
    near = (exact[layers.flatten() - 1] - threshold).abs() < 0.001
    clear = ~(near & (layers <= expected)).any(0)
    assert float(clear.float().mean()) > 0.75
    assert torch.equal(torch.tensor(exit_layers)[clear], expected[clear])
    assert len(expected[clear].unique()) > 5


def check_logits(
    logits: Tensor, expected: Tensor, error: float, agreement: float, doubt: float = 0.03
) -> None:
    """Hold logits `[tokens, vocabulary]` against those of float32.

    Args:
        error: relative L2 of all of them together.
        agreement: share of tokens with the same greedy token.
        doubt: greedy tokens have to agree where the two largest logits differ by more than this
            many times their root mean square.
    """
    whole = float((logits - expected).norm() / expected.norm())
    assert whole < error, f"relative L2 {whole:.4f}"
    same = logits.argmax(-1) == expected.argmax(-1)
    assert float(same.float().mean()) >= agreement
    largest = expected.topk(2, dim=-1).values
    margin = (largest[:, 0] - largest[:, 1]) / expected.square().mean(-1).sqrt()
    assert float((margin > doubt).float().mean()) > 0.5, "too few tokens to compare"
    assert bool(same[margin > doubt].all())
