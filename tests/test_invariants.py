"""What holds after any exit schedule: no cache slot is unwritten, truncation undoes steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from river_llm import ContextFullError, ExitPolicy, RiverConfig, attach_river
from river_llm.attachment import AttachedRiver
from river_llm.engines import TorchEngine

NUM_LAYERS = 4
CAPACITY = 64
CONFIG = RiverConfig(group_size=32)

infinity = st.sampled_from([-math.inf, math.inf])
threshold = st.floats(-1, 1) | infinity
schedules = st.builds(
    lambda thresholds, prefill, batch: ExitPolicy.per_layer(
        thresholds, prefill=prefill, batch=batch
    ),
    st.tuples(infinity, *[threshold] * (NUM_LAYERS - 1)),
    st.sampled_from(["backbone", "river", "sequence", "token"]),
    st.sampled_from(["sequence", "minimum"]),
)
any_architecture = pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text"])
any_width = pytest.mark.parametrize("kv_bits", [16, 8])


class PoisonedLayer(DynamicLayer):
    """A cache layer whose unwritten slots are NaN."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.slots = torch.full((2, batch, heads, CAPACITY, head_dim), math.nan)
        self.keys, self.values = self.slots[0, :, :, :0], self.slots[1, :, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.slots[0, :, :, start:end] = key_states
        self.slots[1, :, :, start:end] = value_states
        self.keys, self.values = self.slots[0, :, :, :end], self.slots[1, :, :, :end]
        return self.keys, self.values


@pytest.fixture(scope="module")
def models() -> dict[str, AttachedRiver]:
    return {
        name: attach_river(tiny_model(name, **ARCHITECTURES[name]), CONFIG)
        for name in ("Llama", "Mistral", "Gemma3Text")
    }


@any_architecture
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=schedules,
    batch=st.integers(1, 3),
    prompt_length=st.integers(1, 12),
    steps=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_after_any_exit_schedule_no_cache_slot_is_unwritten(
    models: dict[str, AttachedRiver],
    architecture: str,
    policy: ExitPolicy,
    batch: int,
    prompt_length: int,
    steps: int,
    seed: int,
) -> None:
    attached = models[architecture]
    attached.policy = policy
    tokens = _tokens(batch, prompt_length + steps, seed)
    cache = DynamicCache()
    cache.layers = [PoisonedLayer() for _ in range(NUM_LAYERS)]
    singles = [tokens[:, [prompt_length + step]] for step in range(steps)]
    for piece in (tokens[:, :prompt_length], *singles):
        with torch.no_grad():
            logits = attached.model(piece, past_key_values=cache, use_cache=True).logits
        assert logits.isfinite().all()
    for layer in cache.layers:
        assert layer.slots[..., : tokens.shape[1], :].isfinite().all()
        assert layer.slots[..., tokens.shape[1] :, :].isnan().all()


@any_width
@any_architecture
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=schedules,
    batch=st.integers(1, 3),
    prompt_length=st.integers(1, 12),
    kept=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_truncating_and_going_on_is_as_if_nothing_had_been(
    models: dict[str, AttachedRiver],
    architecture: str,
    kv_bits: int,
    policy: ExitPolicy,
    batch: int,
    prompt_length: int,
    kept: int,
    seed: int,
) -> None:
    engine = TorchEngine(models[architecture], kv_bits)
    engine.policy = policy
    tokens = _tokens(batch, prompt_length + 10, seed)
    engine.prefill(tokens[:, :prompt_length])
    first = [engine.decode(tokens[:, prompt_length + step]) for step in range(10)]
    engine.truncate(prompt_length + kept)
    assert engine.length == prompt_length + kept
    for step in range(kept, 10):
        again = engine.decode(tokens[:, prompt_length + step])
        assert torch.equal(again.logits, first[step].logits)
        assert torch.equal(again.exit_layers, first[step].exit_layers)


@any_architecture
def test_the_engine_generates_what_transformers_does_beyond_the_window(
    models: dict[str, AttachedRiver], architecture: str
) -> None:
    attached = models[architecture]
    attached.policy = ExitPolicy.fixed(2)
    prompt = _tokens(1, 20, seed=3)
    expected = attached.model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 20:]
    engine = TorchEngine(attached)
    step = engine.prefill(prompt)
    for token in expected:
        assert int(step.logits.argmax()) == int(token)
        step = engine.decode(token.view(1))
    assert step.exit_layers.tolist() == [2]


@any_width
@any_architecture
def test_a_padded_row_is_the_row_alone(
    models: dict[str, AttachedRiver], architecture: str, kv_bits: int
) -> None:
    attached = models[architecture]
    attached.policy = ExitPolicy.fixed(2)
    engine = TorchEngine(attached, kv_bits)
    tokens = _tokens(2, 18, seed=4)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :7] = False
    together = [engine.prefill(tokens[:, :12], mask)]
    together += [engine.decode(tokens[:, position]) for position in range(12, 18)]
    engine.truncate(0)
    alone = [engine.prefill(tokens[1:, 7:12])]
    alone += [engine.decode(tokens[1:, position]) for position in range(12, 18)]
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both.logits[1], one.logits[0], rtol=1e-4, atol=1e-5)


@any_width
@pytest.mark.parametrize("failing_layer", range(NUM_LAYERS))
@pytest.mark.parametrize("filled", [0, 5])
def test_a_pass_cut_short_leaves_the_cache_as_it_was(
    failing_layer: int, filled: int, kv_bits: int
) -> None:
    engine = TorchEngine(attach_river(tiny_model("Llama"), CONFIG), kv_bits)
    tokens = _tokens(1, filled + 4, seed=5)
    if filled:
        engine.prefill(tokens[:, :filled])
    layer = engine.model.model.layers[failing_layer]
    handle = layer.self_attn.o_proj.register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(tokens[:, filled:])
    handle.remove()
    assert engine.length == filled
    assert {layer.get_seq_length() for layer in engine._cache.layers} <= {filled}
    mended = engine.prefill(tokens[:, filled:]).logits
    engine.truncate(0)
    if filled:
        engine.prefill(tokens[:, :filled])
    assert torch.equal(mended, engine.prefill(tokens[:, filled:]).logits)


def test_a_full_context_is_an_error_that_changes_nothing(tiny_llama: PreTrainedModel) -> None:
    engine = TorchEngine(attach_river(tiny_llama, CONFIG))
    assert engine.context_length == 64
    with pytest.raises(ContextFullError, match="65 tokens don't fit"):
        engine.prefill(_tokens(1, 65, seed=6))
    assert engine.length == 0
    engine.prefill(_tokens(1, 63, seed=6))
    last = engine.decode(torch.tensor([7])).logits
    with pytest.raises(ContextFullError, match="context of 64"):
        engine.decode(torch.tensor([8]))
    assert engine.length == 64
    engine.truncate(63)
    assert torch.equal(engine.decode(torch.tensor([7])).logits, last)


def _tokens(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@any_width
def test_verification_gives_what_single_backbone_steps_do(kv_bits: int) -> None:
    model = tiny_model("Llama")
    engine = TorchEngine(attach_river(model, CONFIG, policy=ExitPolicy.fixed(1)), kv_bits)
    prompt, draft = torch.arange(10).view(2, 5), torch.arange(20, 28).view(2, 4)
    engine.prefill(prompt)
    verified = engine.verify(draft)
    assert verified.exit_layers.tolist() == [[NUM_LAYERS] * 4] * 2
    assert verified.best_tokens.shape == (2, 4)
    assert engine.policy == ExitPolicy.fixed(1)
    engine.truncate(5)
    engine.policy = ExitPolicy.never()
    for column in range(4):
        step = engine.decode(draft[:, column])
        torch.testing.assert_close(verified.logits[:, column], step.logits, rtol=1e-4, atol=1e-5)
