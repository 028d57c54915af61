"""What the strategies leave in the KV cache, and that nothing but whole passes changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from strategy_models import (
    NUM_LAYERS,
    WITH_EXITS,
    check_close,
    engine_on,
    exits_of,
    follow,
    logits_of,
    mixed_policy,
    model_of,
    tokens,
)
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

from river_llm import ContextFullError, ExitPolicy
from river_llm.config import Strategy
from river_llm.strategies import StrategyEngine

every_strategy = pytest.mark.parametrize("strategy", WITH_EXITS)
some_architectures = pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text"])


# ---- entries ----


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text", "GPT2", "Bloom"])
def test_once_all_have_caught_up_recomputed_entries_are_the_backbones(architecture: str) -> None:
    model, text = model_of(architecture), tokens(2, 30, seed=1)
    with torch.no_grad():
        expected = model(text, past_key_values=DynamicCache(), use_cache=True)
    with engine_on(model, "recompute", mixed_policy(architecture)) as engine:
        steps = follow(engine, text[:, :29], 6)
        assert len({*exits_of(steps), *exits_of(steps, 1)}) == NUM_LAYERS
        engine.policy = ExitPolicy.never()
        last = engine.decode(text[:, 29])
        entries = [_entries(engine, layer) for layer in range(NUM_LAYERS)]
    check_close(last.logits, expected.logits[:, -1])
    for (keys, values), layer in zip(entries, expected.past_key_values.layers, strict=True):
        check_close(keys, layer.keys)
        check_close(values, layer.values)


@pytest.mark.parametrize("strategy", ["mask", "monotonic", "recompute"])
def test_skipped_layers_hold_nothing(strategy: Strategy) -> None:
    with engine_on(model_of("Llama"), strategy, ExitPolicy.fixed(3)) as engine:
        follow(engine, tokens(2, 10, seed=2), 4)
        engine.policy = ExitPolicy.fixed(1)
        follow_on(engine, tokens(2, 3, seed=3))
        for layer in range(NUM_LAYERS):
            keys, values = _entries(engine, layer)
            held = (keys != 0).any(-1).all(1) & (values != 0).any(-1).all(1)  # [batch, positions]
            expected = torch.tensor([4, 3, 1]).repeat_interleave(torch.tensor([4, 6, 3])) > layer
            assert held.tolist() == [expected.tolist()] * 2
            assert bool((keys[~held.unsqueeze(1).expand(keys.shape[:3])] == 0).all())


def test_propagated_entries_are_made_of_the_hidden_state_at_the_exit() -> None:
    """By each layer's own norm and projections: values, and the keys of position 0, where the
    rotary angles are zero."""
    model, depth = model_of("Llama"), 2
    with engine_on(model, "propagate", ExitPolicy.fixed(depth)) as engine:
        engine.decode(torch.tensor([5]))
        entries = [_entries(engine, layer) for layer in range(NUM_LAYERS)]
    layers = model.model.layers
    with torch.no_grad():
        at_exit = model(torch.tensor([[5]]), output_hidden_states=True).hidden_states[depth]
        for layer in range(depth, NUM_LAYERS):
            states, attention = layers[layer].input_layernorm(at_exit), layers[layer].self_attn
            check_close(entries[layer][0][0, :, 0].flatten(), attention.k_proj(states).flatten())
            check_close(entries[layer][1][0, :, 0].flatten(), attention.v_proj(states).flatten())


@every_strategy
def test_slots_grow_with_the_text(strategy: Strategy) -> None:
    """Blocks begin at 64 slots."""
    model = tiny_model("Llama", max_position_embeddings=512)
    text = tokens(1, 300, seed=4)
    with torch.no_grad():
        expected = model(text).logits[0]
    with engine_on(model, strategy, ExitPolicy.never()) as engine:
        steps = [engine.prefill(text[:, :5]), engine.prefill(text[:, 5:70])]
        steps += [engine.decode(text[:, place]) for place in range(70, 300)]
    check_close(logits_of(steps), expected[[4, *range(69, 300)]])


# ---- truncation, the context's end ----


@some_architectures
@every_strategy
@pytest.mark.parametrize("kept", [0, 3, 9])
def test_truncating_and_going_on_is_as_if_nothing_had_been(
    strategy: Strategy, architecture: str, kept: int
) -> None:
    text = tokens(2, 22, seed=5)
    with engine_on(model_of(architecture), strategy, mixed_policy(architecture)) as engine:
        first = follow(engine, text, 12)[1:]
        engine.truncate(12 + kept)
        assert engine.length == 12 + kept
        for place in range(kept, 10):
            again = engine.decode(text[:, 12 + place])
            assert torch.equal(again.exit_layers, first[place].exit_layers)
            check_close(again.logits, first[place].logits)
        engine.truncate(100)
        assert engine.length == 22
        engine.truncate(0)
        assert engine.length == 0
        whole = follow(engine, text[:1], 12)[1:]  # another batch
        assert exits_of(whole) == exits_of(first)


@every_strategy
def test_a_full_context_is_an_error_that_changes_nothing(strategy: Strategy) -> None:
    model = tiny_model("Llama", max_position_embeddings=16)
    text = tokens(1, 20, seed=6)
    with engine_on(model, strategy, ExitPolicy.fixed(2)) as engine:
        with pytest.raises(ContextFullError, match="17 tokens don't fit"):
            engine.prefill(text[:, :17])
        assert engine.length == 0
        last = follow(engine, text[:, :16], 10)[-1]
        for more in (lambda: engine.decode(text[:, 16]), lambda: engine.prefill(text[:, 16:])):
            with pytest.raises(ContextFullError, match="context of 16"):
                more()
        assert engine.length == 16
        engine.truncate(15)
        check_close(engine.decode(text[:, 15]).logits, last.logits)


# ---- passes that are cut short ----


@every_strategy
@pytest.mark.parametrize("verb", ["decode", "prefill"])
@pytest.mark.parametrize("failing_layer", range(NUM_LAYERS))
def test_a_pass_cut_short_leaves_the_cache_as_it_was(
    strategy: Strategy, verb: str, failing_layer: int
) -> None:
    """With tokens before it that left early, and a step that goes as deep as it may."""
    model, text = tiny_model("Llama"), tokens(2, 20, seed=7)

    def run(engine: StrategyEngine) -> Tensor:
        engine.policy = ExitPolicy.never()
        return (
            engine.prefill(text[:, 12:15]) if verb == "prefill" else engine.decode(text[:, 12])
        ).logits

    with engine_on(model, strategy, mixed_policy("Llama")) as engine:
        follow(engine, text[:, :12], 5)
        expected = run(engine)
        engine.truncate(0)
        engine.policy = mixed_policy("Llama")
        follow(engine, text[:, :12], 5)
        layer = model.model.layers[failing_layer]
        runs = strategy != "monotonic" or verb == "prefill" or failing_layer == 0
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if runs:
                with _interrupting(module), pytest.raises(KeyboardInterrupt):
                    run(engine)
            assert engine.length == 12
        check_close(run(engine), expected)


def test_a_pass_cut_short_between_layers_leaves_waiting_tokens_where_they_were() -> None:
    """While the decoder is asked for the arguments of tokens that are taken along."""
    model, text = tiny_model("Llama"), tokens(1, 12, seed=8)
    with engine_on(model, "recompute", ExitPolicy.fixed(1)) as engine:
        follow(engine, text, 5)
        engine.policy = ExitPolicy.never()
        with _interrupting(model.model.embed_tokens, calls=2), pytest.raises(KeyboardInterrupt):
            engine.decode(torch.tensor([5]))
        assert engine.length == 12
        found = engine.decode(torch.tensor([5])).logits
    with torch.no_grad():
        check_close(found, model(torch.cat([text, torch.tensor([[5]])], 1)).logits[:, -1])


def test_entries_alone_cut_short_leave_layers_whole() -> None:
    """Ctrl-C while state propagation has a layer write keys and values only."""
    model, text = tiny_model("Llama"), tokens(1, 12, seed=9)
    with torch.no_grad():
        expected = model(text).logits[:, -1]
    with engine_on(model, "propagate", ExitPolicy.fixed(1)) as engine:
        engine.prefill(text[:, :11])
        k_proj = model.model.layers[2].self_attn.k_proj
        with _interrupting(k_proj), pytest.raises(KeyboardInterrupt):
            engine.decode(text[:, 11])
        assert engine.length == 11
        engine.policy = ExitPolicy.never()
        check_close(engine.decode(text[:, 11]).logits, expected)


# ---- rotary angles that depend on the length ----

LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0],
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
}
DYNAMIC: dict[str, Any] = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("architecture", "settings"), [("Phi3", LONGROPE), ("Llama", DYNAMIC)], ids=["once", "always"]
)
@pytest.mark.parametrize("back", [1, 4, 12])
def test_tokens_that_wait_while_angles_change_get_their_own(
    architecture: str, settings: dict[str, Any], back: int
) -> None:
    """The angles of a step change with the 17th position: once, or from there on at each."""
    model, text = tiny_model(architecture, **settings), tokens(1, 24, seed=10)
    cache = DynamicCache()
    with torch.no_grad():
        expected = [
            model(column[:, None], past_key_values=cache).logits[0, -1] for column in text.T
        ]
    with engine_on(model, "recompute", ExitPolicy.never()) as engine:
        assert engine.angle_limit is not None
        engine.context_length = None
        found = []
        for place in range(24):
            # the last token before `back` of each round comes to the end, and the others with it
            engine.policy = ExitPolicy.never() if place % back == back - 1 else ExitPolicy.fixed(1)
            found.append(engine.decode(text[:, place]))
    for place in range(back - 1, 24, back):
        check_close(found[place].logits[0], expected[place])


def follow_on(engine: StrategyEngine, text: Tensor) -> None:
    """Run more tokens one by one."""
    for column in text.T:
        engine.decode(column)


def _entries(engine: StrategyEngine, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[batch, heads, positions, head_dim]` of a layer."""
    slots = engine._cache.layers[layer]
    return slots.keys[:, :, : engine.length].clone(), slots.values[:, :, : engine.length].clone()


@contextmanager
def _interrupting(module: nn.Module, calls: int = 1) -> Iterator[None]:
    """While it lasts, the `calls`-th call of a module is Ctrl-C."""
    left = iter(range(calls - 1, -1, -1))

    def interrupt(*args: object) -> None:
        if next(left, None) == 0:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        handle.remove()
