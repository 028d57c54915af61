"""`compare_variants`: policies along one and the same answer."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import fake_quantised
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, attach_river
from river_llm.engines import TorchEngine
from river_llm.measure.comparison import compare_variants

PROMPT = [7, 8, 9]
NEVER, ALWAYS, FIXED = ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(2)


@pytest.fixture
def answer(tiny_llama: PreTrainedModel) -> list[int]:
    """The untouched model's greedy answer."""
    generated = tiny_llama.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
    answer: list[int] = generated[0, len(PROMPT) :].tolist()
    return answer


def test_the_backbone_agrees_with_its_own_answer(
    tiny_llama: PreTrainedModel, answer: list[int]
) -> None:
    engine = TorchEngine(attach_river(copy.deepcopy(tiny_llama)))
    (found,) = compare_variants(engine, PROMPT, answer, {"backbone": NEVER}, rounds=2)
    assert (found.variant, found.policy) == ("backbone", "never leaves")
    assert (found.agreement, found.mean_exit_layer) == (1, 4)
    wrong = [*answer[:8], (answer[8] + 1) % 97, *answer[9:]]
    (found,) = compare_variants(engine, PROMPT, wrong, {"backbone": NEVER}, rounds=1)
    assert found.agreement < 1
    (found,) = compare_variants(engine, PROMPT, answer[:2], {"backbone": NEVER}, rounds=1)
    assert found.agreement == 1


def test_the_quantised_model_agrees_where_it_would(
    tiny_llama: PreTrainedModel, answer: list[int]
) -> None:
    river = River.build(tiny_llama)
    tokens = torch.tensor([[*PROMPT, *answer]])
    with torch.no_grad():
        logits = fake_quantised(tiny_llama, river)(tokens).logits[0, len(PROMPT) - 1 : -1]
    agreement = float((logits.argmax(-1) == torch.tensor(answer)).double().mean())
    assert 0 < agreement < 1
    engine = TorchEngine(attach_river(tiny_llama, river))
    policies = {"full": ALWAYS, "fixed": FIXED}
    full, fixed = compare_variants(engine, PROMPT, answer, policies, rounds=1)
    assert full.agreement == agreement
    assert (full.mean_exit_layer, fixed.mean_exit_layer) == (0, 2)
    assert full.tokens_per_second.lowest > 0
    assert engine.length == 0
