"""The strategies that the river is compared with, beside a slow plain reference of each."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_decoders import STRATEGIES, NoExit, RiverDecoder, check_model, follow, generate
from strategy_reference import run_text
from tiny_models import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig

NUM_LAYERS = 4
NEVER = ExitPolicy.never().thresholds(NUM_LAYERS)
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "Cohere": {},
    "Glm4": {"head_dim": 16},
}


@cache
def model_of(architecture: str, attention: str = "sdpa") -> PreTrainedModel:
    return tiny_model(architecture, **ARCHITECTURES[architecture], attn_implementation=attention)


def text_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
    return tokens


@cache
def mixed_thresholds(architecture: str) -> tuple[float, ...]:
    """By which some tokens leave after each of the layers."""
    similarities: list[list[float]] = []

    class Spy(NoExit):
        def leaves(self, layers_run: int, similarity: float) -> bool:
            if layers_run == 0:
                similarities.append([])
            else:
                similarities[-1].append(similarity)
            return False

    with Spy(model_of(architecture), NEVER) as decoder:
        follow(decoder, text_of(60, seed=7))
    rows, thresholds = torch.tensor(similarities), [math.inf]
    for layer, share in enumerate((0.2, 0.3, 0.5)):
        thresholds.append(float(rows[:, layer].quantile(1 - share)))
        rows = rows[rows[:, layer] <= thresholds[-1]]
    return tuple(thresholds)


def check(name: str, architecture: str, text: list[int], thresholds: tuple[float, ...]) -> set[int]:
    """Hold a strategy against its reference; the depths that there were."""
    with STRATEGIES[name](model_of(architecture), thresholds) as decoder:
        logits, exit_layers, _ = follow(decoder, text)
    reference = model_of(architecture, "eager")
    expected, expected_exits = run_text(
        reference, name, text[:-1], [None, *[thresholds] * len(text[2:])]
    )
    assert exit_layers == expected_exits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    return set(exit_layers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_its_reference(name: str, architecture: str) -> None:
    depths = check(name, architecture, text_of(30, seed=3), mixed_thresholds(architecture))
    assert len(depths) >= (2 if name == "monotonic" else 3)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    thresholds=st.lists(
        st.sampled_from([-math.inf, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9, math.inf]), min_size=3, max_size=3
    ),
    leaves_at_once=st.booleans(),
)
def test_whatever_the_thresholds(
    name: str, seed: int, thresholds: list[float], leaves_at_once: bool
) -> None:
    first = -math.inf if leaves_at_once and seed % 4 == 0 else math.inf
    check(name, "Llama", text_of(12, seed), (first, *thresholds))


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_exit_is_the_model(name: str) -> None:
    model, text = model_of("Llama"), text_of(20, seed=5)
    expected = model(torch.tensor([text])).logits[0, :-1]
    with STRATEGIES[name](model, NEVER) as decoder:
        logits, exit_layers, _ = follow(decoder, text)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    assert exit_layers == [NUM_LAYERS] * 19
    assert "forward" not in vars(model.model.layers[0])  # given back as it was


@pytest.mark.parametrize("name", ["river", *STRATEGIES])
def test_an_answer_is_what_follows(name: str) -> None:
    model = tiny_model("Llama", intermediate_size=128)
    policy = ExitPolicy.per_layer(mixed_thresholds("Llama"))
    if name == "river":
        decoder = RiverDecoder(model, River.build(model, RiverConfig(8, 32)), policy)
    else:
        decoder = STRATEGIES[name](model, policy.thresholds(NUM_LAYERS))
    with decoder:
        prompt = text_of(1, seed=2)
        answer = generate(decoder, prompt, 12)
        logits, exit_layers, _ = follow(decoder, prompt + answer)
    assert logits.argmax(-1).tolist() == answer
    assert exit_layers[0] == NUM_LAYERS
    assert not hasattr(model, "_river_attachment")


@pytest.mark.parametrize("architecture", ["Mistral", "GPT2", "Bloom"])
def test_other_attention_is_refused(architecture: str) -> None:
    settings = {"sliding_window": 8} if architecture == "Mistral" else {"n_embd": 64, "n_layer": 4}
    with pytest.raises(SystemExit, match="full attention in every layer"):
        check_model(tiny_model(architecture, **settings))
