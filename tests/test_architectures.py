"""The river on every architecture: right, or refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import ARCHITECTURES, REFUSED, VOCABULARY, fake_quantised, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import (
    ExitPolicy,
    River,
    RiverConfig,
    UnsupportedModelError,
    attach_river,
    detach_river,
)
from river_llm.attachment import AttachedRiver

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

CONFIG = RiverConfig(group_size=32)
NEW_TOKENS = 10


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, **ARCHITECTURES[architecture])


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@every_architecture
def test_never_leaving_is_the_untouched_model(model: PreTrainedModel, prompt: Tensor) -> None:
    logits, tokens = _logits(model, prompt), _greedy(model, prompt)
    attach_river(model, CONFIG, policy=ExitPolicy.never())
    assert torch.equal(_logits(model, prompt), logits)
    assert torch.equal(_greedy(model, prompt), tokens)


@every_architecture
def test_leaving_at_once_is_the_fake_quantised_model(
    model: PreTrainedModel, prompt: Tensor
) -> None:
    river = River.build(model, CONFIG)
    quantised = fake_quantised(model, river)
    assert not torch.allclose(_logits(model, prompt), _logits(quantised, prompt), atol=1e-3)
    attach_river(model, river, policy=ExitPolicy.always())
    torch.testing.assert_close(
        _logits(model, prompt), _logits(quantised, prompt), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(_greedy(model, prompt), _greedy(quantised, prompt))


@every_architecture
def test_a_fixed_exit_runs_the_rest_of_the_layers_quantised(
    model: PreTrainedModel, prompt: Tensor
) -> None:
    river = River.build(model, CONFIG)
    half_quantised = fake_quantised(model, river, first_layer=2)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        first = torch.full((2, 1), 5)
        expected = half_quantised(first, past_key_values=cache, use_cache=True).logits
        attached = attach_river(model, river, policy=ExitPolicy.fixed(2))
        cache = model(prompt, use_cache=True).past_key_values
        logits = model(first, past_key_values=cache, use_cache=True).logits
    assert attached.last_exit_layers.tolist() == [[2], [2]]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@every_architecture
def test_a_text_in_one_pass_is_the_text_token_by_token(
    model: PreTrainedModel, prompt: Tensor
) -> None:
    attached = attach_river(model, CONFIG)
    attached.policy = ExitPolicy.per_layer(_median_thresholds(attached, prompt), prefill="token")
    logits = _logits(model, prompt)
    exit_layers = attached.last_exit_layers.clone()
    assert len(exit_layers.unique()) > 2

    cache = DynamicCache()
    attached.phase = "decode"
    for position in range(prompt.shape[1]):
        with torch.no_grad():
            token = prompt[:, position : position + 1]
            step = model(token, past_key_values=cache, use_cache=True).logits
        assert torch.equal(attached.last_exit_layers, exit_layers[:, position : position + 1])
        torch.testing.assert_close(step[:, 0], logits[:, position], rtol=1e-4, atol=1e-5)


@every_architecture
def test_while_attached_the_module_tree_is_the_same_and_after_detaching_everything(
    model: PreTrainedModel, prompt: Tensor
) -> None:
    logits = _logits(model, prompt)
    names = [name for name, _ in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = _attributes(model)
    attach_river(model, CONFIG)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    _greedy(model, prompt)
    detach_river(model)
    assert [name for name, _ in model.named_modules()] == names
    assert _attributes(model) == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(_logits(model, prompt), logits)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_no_plain_decoder_is_refused_by_name(architecture: str) -> None:
    settings, message = REFUSED[architecture]
    model = tiny_model(architecture, **settings)
    with pytest.raises(UnsupportedModelError, match=message):
        attach_river(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match=message):
        River.build(model, CONFIG)
    assert not any("forward" in module.__dict__ for module in model.modules())


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def _greedy(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    generated: Tensor = model.generate(  # MPT's own config keeps no cache
        tokens, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    return generated


def _median_thresholds(attached: AttachedRiver, tokens: Tensor) -> tuple[float, ...]:
    """For each layer a threshold in the widest gap between its middle similarities, so that some
    tokens leave there, some stay, and none is a matter of rounding."""
    attached.policy = ExitPolicy.never(prefill="token")
    attached.router.record_similarities = True
    _logits(attached.model, tokens)
    assert attached.router.similarities is not None
    attached.router.record_similarities = False
    ordered = attached.router.similarities.flatten(1).double().sort(1).values  # [L, B * T]
    middle = ordered[:, ordered.shape[1] // 3 : -ordered.shape[1] // 3]
    gaps = middle.diff(dim=1)
    widest = gaps.argmax(1, keepdim=True)
    between = (middle.gather(1, widest) + gaps.gather(1, widest) / 2).flatten()
    return (math.inf, *between[:-1].tolist())


def _attributes(model: PreTrainedModel) -> dict[str, object]:
    """What every module holds: the names of its attributes, and how many hooks."""
    return {
        name: (
            sorted(set(module.__dict__) - {"_output_capturing_hooks_installed"}),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
