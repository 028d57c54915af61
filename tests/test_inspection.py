"""`inspect_text` against untouched models of `transformers`."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from exit_reference import decode_with_exits, layer_similarities
from tiny_models import fake_quantised
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig, attach_river
from river_llm.engines import TorchEngine
from river_llm.generate.rows import decode, new_sequence
from river_llm.measure.inspection import TextInspection, inspect_text
from river_llm.river.attach import AttachedRiver

TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
CONFIG = RiverConfig(bits=3)
THRESHOLDS = (math.inf, 0.935, 0.92, 0.88)  # tokens leave after any of the layers
MIXED = ExitPolicy.per_layer(THRESHOLDS)
POLICIES = [
    MIXED,
    ExitPolicy.similarity(0.92, 2, prefill="sequence"),
    ExitPolicy.similarity(0.9, prefill="river", batch="minimum"),
    ExitPolicy.fixed(2),
    ExitPolicy.always(),
    ExitPolicy.never(),
]


@pytest.fixture
def attached(tiny_llama: PreTrainedModel) -> AttachedRiver:
    return attach_river(copy.deepcopy(tiny_llama), CONFIG, policy=MIXED)


def test_figures_are_those_of_the_untouched_model_and_its_quantised_copy(
    attached: AttachedRiver, tiny_llama: PreTrainedModel
) -> None:
    river = River.build(tiny_llama, CONFIG)
    found = inspect_text(attached, TOKENS)
    similarities = layer_similarities(tiny_llama, TOKENS)
    assert similarities.shape == (4, 40)
    torch.testing.assert_close(found.similarities.double(), similarities, rtol=0, atol=1e-6)
    _, exit_layers = decode_with_exits(tiny_llama, river, TOKENS, THRESHOLDS)
    assert set(exit_layers) == {1, 2, 3, 4}
    assert found.exit_layers.tolist() == exit_layers
    layers = zip(
        _cache(fake_quantised(tiny_llama, river)).layers, _cache(tiny_llama).layers, strict=True
    )
    pairs = [(_cosines(a.keys, b.keys), _cosines(a.values, b.values)) for a, b in layers]
    for measured, cosines in zip(
        (found.key_cosine, found.value_cosine), zip(*pairs, strict=True), strict=True
    ):
        expected = [float(one.mean()) for one in cosines]
        assert measured.tolist() == pytest.approx(expected, abs=1e-6)
        assert max(expected) < 0.99
        assert len({round(cosine, 4) for cosine in expected}) == 4
    shortest = inspect_text(attached, TOKENS[:2])
    assert torch.equal(shortest.exit_layers, found.exit_layers[:2])
    assert bool(shortest.key_cosine.isfinite().all())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.describe())
def test_only_exit_layers_depend_on_the_policy_as_the_engine_decodes_by_it(
    attached: AttachedRiver, policy: ExitPolicy
) -> None:
    expected = inspect_text(attached, TOKENS)
    attached.policy = policy
    found = inspect_text(attached, TOKENS)
    assert attached.policy is policy
    for name in TextInspection.__dataclass_fields__:
        if name != "exit_layers":
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    engine = TorchEngine(attached)
    with new_sequence(engine) as sequence:
        steps = [decode(engine, sequence, token, policy) for token in TOKENS]
    assert found.exit_layers.tolist() == [int(step.exit_layers[0]) for step in steps]


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_an_error_leaves_the_policy_and_the_model(attached: AttachedRiver, passes: int) -> None:
    expected = inspect_text(attached, TOKENS)
    left = iter(range(passes, -1, -1))

    def fail(module: nn.Module, args: Any) -> None:
        if next(left) == 0:
            raise LookupError("gone")

    handle = attached.model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(LookupError):
        inspect_text(attached, TOKENS)
    handle.remove()
    assert attached.policy is MIXED
    assert not attached.router.record_similarities
    again = inspect_text(attached, TOKENS)
    for name in TextInspection.__dataclass_fields__:
        assert torch.equal(getattr(again, name), getattr(expected, name))


@torch.no_grad()
def _cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    model(torch.tensor([TOKENS]), past_key_values=cache, use_cache=True)
    return cache


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """`[heads, tokens - 1]`, of all tokens but the first, of `[1, heads, tokens, head_dim]`."""
    a, b = a[0, :, 1:].double(), b[0, :, 1:].double()
    cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert cosines.shape == (2, 39)
    return cosines
