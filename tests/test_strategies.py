"""Each strategy is what its definition says: the reference runs the whole text by it, anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    reference_of,
    thresholds_of,
    tokens,
)
from strategy_reference import run_text
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.config import Strategy
from river_llm.engines import StepResult
from river_llm.exit_policy import BatchRule
from river_llm.strategies import StrategyEngine

every_strategy = pytest.mark.parametrize("strategy", WITH_EXITS)
some_architectures = pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture_a_padded_batch_follows_the_definition(architecture: str) -> None:
    """Mistral, Ministral, Gemma and Olmo 3 look back over 8 tokens only; Bloom and MPT have ALiBi;
    most have fewer heads of keys than of queries."""
    model, reference = model_of(architecture), reference_of(architecture)
    thresholds = thresholds_of(architecture)
    text, prompt, padding = tokens(2, 30, seed=1), 12, 4
    padding_mask = torch.ones(2, prompt, dtype=torch.bool)
    padding_mask[1, :padding] = False
    for strategy in WITH_EXITS:
        with engine_on(model, strategy, ExitPolicy.per_layer(thresholds)) as engine:
            steps = follow(engine, text, prompt, padding_mask)
        for row, first in ((0, 0), (1, padding)):
            of_tokens = [None] * (prompt - first) + [thresholds] * (30 - prompt)
            logits, exit_layers = run_text(
                reference, strategy, text[row, first:].tolist(), of_tokens
            )
            assert exits_of(steps, row) == exit_layers[prompt - first - 1 :], strategy
            check_close(logits_of(steps, row), logits[prompt - first - 1 :])
        if strategy != "monotonic":
            assert len({*exits_of(steps), *exits_of(steps, 1)}) >= NUM_LAYERS - 1
            assert exits_of(steps) != exits_of(steps, 1)


@every_strategy
def test_positions_in_the_attention_mask_may_be_a_number_for_each_head(strategy: Strategy) -> None:
    """Falcon with ALiBi adds it to its attention mask."""
    model = tiny_model("Falcon", alibi=True)
    thresholds = thresholds_of("Falcon")
    text = tokens(1, 24, seed=2)
    with engine_on(model, strategy, ExitPolicy.per_layer(thresholds)) as engine:
        steps = follow(engine, text, 10)
    of_tokens = [None] * 10 + [thresholds] * 14
    logits, exit_layers = run_text(model, strategy, text[0].tolist(), of_tokens)
    assert exits_of(steps) == exit_layers[9:]
    check_close(logits_of(steps), logits[9:])


# ---- any sequence of passes ----


@dataclass
class Text:
    """A text as an engine has it, what its tokens leave by, and what the engine said of them."""

    token_ids: list[int] = field(default_factory=list)
    thresholds: list[tuple[float, ...] | None] = field(default_factory=list)
    results: list[tuple[Tensor, int] | None] = field(default_factory=list)

    def add(self, tokens: list[int], leave_by: tuple[float, ...] | None) -> None:
        """More tokens, of which nothing is said yet."""
        self.token_ids += tokens
        self.thresholds += [leave_by] * len(tokens)
        self.results += [None] * len(tokens)

    def forget(self, count: int) -> None:
        """The last so many tokens, if there are so many."""
        left = max(len(self.token_ids) - count, 0)
        del self.token_ids[left:], self.thresholds[left:], self.results[left:]


def _policies(mixed: ExitPolicy) -> st.SearchStrategy[ExitPolicy]:
    fixed = st.integers(0, NUM_LAYERS).map(ExitPolicy.fixed)
    return st.one_of(st.just(mixed), st.just(mixed), fixed, st.just(ExitPolicy.never()))


_PASSES = st.one_of(
    st.tuples(st.just("prompt"), st.integers(1, 5)),
    st.tuples(st.just("prompt by token"), st.integers(1, 5)),
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("text"), st.integers(1, 6)),
    st.tuples(st.just("cut"), st.integers(1, 4)),
    st.tuples(st.just("rewind"), st.integers(1, 4)),
)


@some_architectures
@every_strategy
@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch=st.integers(1, 3), seed=st.integers(0, 1000))
def test_any_sequence_of_passes_follows_the_definition(
    strategy: Strategy, architecture: str, data: st.DataObject, batch: int, seed: int
) -> None:
    """Prompts, steps by any policy, given texts of any lengths and cuts anywhere, in any order."""
    policies = _policies(mixed_policy(architecture))
    texts = [Text() for _ in range(batch)]
    supply = tokens(batch, 200, seed)
    used = 0
    with engine_on(model_of(architecture), strategy) as engine:
        for kind, most in data.draw(st.lists(_PASSES, min_size=1, max_size=8)):
            if kind == "cut":
                engine.truncate(max(engine.length - most, 0))
                for text in texts:
                    text.forget(most)
                continue
            if kind == "rewind":
                shortest = min(len(text.token_ids) for text in texts)
                counts = [data.draw(st.integers(0, min(most, shortest))) for _ in texts]
                if shortest == 0:
                    continue
                engine.rewind(counts)
                for text, count in zip(texts, counts, strict=True):
                    text.forget(count)
                assert engine.length == max(len(text.token_ids) for text in texts)
                continue
            policy = data.draw(policies)
            leave_by = None if kind == "prompt" else policy.thresholds(NUM_LAYERS)
            new = supply[:, used : used + most]
            used += most
            counts = [most] * batch
            if kind == "text":
                counts = [data.draw(st.integers(0, most)) for _ in texts]
                counts[data.draw(st.integers(0, batch - 1))] = most
            for text, row, count in zip(texts, new.tolist(), counts, strict=True):
                text.add(row[:count], leave_by)
            engine.policy = replace(policy, prefill="token" if "token" in kind else "backbone")
            if kind == "text":
                step = engine.score(new, counts)
                for row, count in enumerate(counts):
                    for place in range(count):
                        found = step.logits[row, place], int(step.exit_layers[row, place])
                        texts[row].results[place - count] = found
            elif kind == "steps":
                for place, column in enumerate(new.T):
                    _note(texts, engine.decode(column), place - most)
            else:
                _note(texts, engine.prefill(new), -1)
    for text in texts:
        if not text.token_ids:
            continue
        logits, exit_layers = run_text(
            reference_of(architecture), strategy, text.token_ids, text.thresholds
        )
        for place, result in enumerate(text.results):
            if result is not None:
                assert result[1] == exit_layers[place]
                check_close(result[0], logits[place])


def _note(texts: list[Text], step: StepResult, place: int) -> None:
    for row, text in enumerate(texts):
        text.results[place] = step.logits[row], int(step.exit_layers[row])


def test_a_monotonic_sequence_goes_no_deeper_where_a_prompt_was_cut_off_again() -> None:
    """The prompt has run the tokens before it through all layers, once more."""
    text, policy = tokens(1, 12, seed=17), mixed_policy("Llama")
    with engine_on(model_of("Llama"), "monotonic", policy) as engine:
        steps = follow(engine, text, 4)
        engine.truncate(8)
        engine.prefill(tokens(1, 3, seed=18))
        engine.truncate(8)
        again = [engine.decode(text[:, place]) for place in range(8, 12)]
    assert exits_of(again) == exits_of(steps)[5:]
    assert max(exits_of(again)) < NUM_LAYERS
    check_close(logits_of(again), logits_of(steps)[5:])


# ---- given texts ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_in_one_pass_is_what_single_steps_give(architecture: str) -> None:
    """With tokens before it that left early, in a batch with padding, and ended unevenly."""
    model, text, prompt = model_of(architecture), tokens(2, 26, seed=14), 8
    padding_mask = torch.ones(2, prompt, dtype=torch.bool)
    padding_mask[1, :3] = False
    for strategy in WITH_EXITS:
        with engine_on(model, strategy, mixed_policy(architecture)) as engine:
            steps = follow(engine, text, prompt, padding_mask)
            engine.truncate(0)
            follow(engine, text[:, :12], prompt, padding_mask)
            scored = engine.score(text[:, 12:24], [12, 7])
            last = engine.decode(torch.tensor([text[0, 24], text[1, 19]]))
        exit_layers = torch.stack([step.exit_layers for step in steps[5:17]], 1)
        logits = torch.stack([step.logits for step in steps[5:17]], 1)
        for row, count in ((0, 12), (1, 7)):
            assert torch.equal(scored.exit_layers[row, :count], exit_layers[row, :count]), strategy
            check_close(scored.logits[row, :count], logits[row, :count])
        assert int(last.exit_layers[0]) == int(steps[17].exit_layers[0])
        assert int(last.exit_layers[1]) == int(steps[12].exit_layers[1])
        check_close(last.logits[0], steps[17].logits[0])
        check_close(last.logits[1], steps[12].logits[1])
        if strategy != "monotonic":
            assert len(scored.exit_layers.unique()) >= NUM_LAYERS - 1


@every_strategy
def test_a_text_that_leaves_early_skips_the_deep_layers(strategy: Strategy) -> None:
    model = model_of("Llama")
    ran: list[int] = []
    with engine_on(model, strategy, ExitPolicy.fixed(1)) as engine:
        engine.prefill(tokens(1, 4, seed=15))
        handles = [
            layer.mlp.register_forward_pre_hook(lambda *args, index=index: ran.append(index))
            for index, layer in enumerate(model.model.layers)
        ]
        step = engine.score(tokens(1, 5, seed=16))
        for handle in handles:
            handle.remove()
    assert step.exit_layers.tolist() == [[1] * 5]
    # entries that recomputation would fill in for a later text come at once
    assert ran == ([0, 1, 2, 3] if strategy == "recompute" else [0])


# ---- batches ----


@some_architectures
@every_strategy
def test_a_row_of_a_padded_batch_is_the_row_alone(strategy: Strategy, architecture: str) -> None:
    text, prompt = tokens(3, 30, seed=3), 9
    lengths = [9, 4, 1]
    padding_mask = torch.tensor([[place >= 9 - length for place in range(9)] for length in lengths])
    with engine_on(model_of(architecture), strategy, mixed_policy(architecture)) as engine:
        together = follow(engine, text, prompt, padding_mask)
        for row, length in enumerate(lengths):
            engine.truncate(0)
            alone = follow(engine, text[[row], prompt - length :], length)
            assert exits_of(together, row) == exits_of(alone)
            check_close(logits_of(together, row), logits_of(alone))
    assert len({tuple(exits_of(together, row)) for row in range(3)}) >= 2


@every_strategy
@pytest.mark.parametrize("rule", ["sequence", "minimum"])
def test_by_the_minimum_all_rows_leave_together(strategy: Strategy, rule: BatchRule) -> None:
    policy = ExitPolicy.per_layer(thresholds_of("Llama"), batch=rule)
    with engine_on(model_of("Llama"), strategy, policy) as engine:
        steps = follow(engine, tokens(3, 40, seed=4), 5)
    same = [len(step.exit_layers.unique()) == 1 for step in steps]
    assert all(same) == (rule == "minimum")


# ---- extremes ----


@some_architectures
@pytest.mark.parametrize("strategy", [*WITH_EXITS, "none"])
def test_without_an_exit_it_is_the_backbone(strategy: Strategy, architecture: str) -> None:
    model, text = model_of(architecture), tokens(2, 30, seed=5)
    expected = _backbone(model, text)
    with engine_on(model, strategy, ExitPolicy.never()) as engine:
        steps = follow(engine, text, 12)
    for row in range(2):
        assert set(exits_of(steps, row)) == {NUM_LAYERS}
        check_close(logits_of(steps, row), expected[row, 11:])


@pytest.mark.parametrize("depth", [0, 1, 3])
@every_strategy
def test_with_one_depth_for_all_only_the_prompt_is_seen_below(
    strategy: Strategy, depth: int
) -> None:
    """No token needs what another one left out: the shallow model answers, but for state
    propagation's and recomputation's work, which nobody sees."""
    text = tokens(1, 20, seed=6)
    with engine_on(model_of("Llama"), strategy, ExitPolicy.fixed(depth)) as engine:
        steps = follow(engine, text, 6)
    shallow = tiny_model("Llama")
    del shallow.model.layers[depth:]
    shallow.config.num_hidden_layers = depth
    assert set(exits_of(steps)[1:]) == {depth}
    with torch.no_grad():
        expected = shallow(text, use_cache=False).logits[0, 6:]
    check_close(logits_of(steps)[1:], expected)


def test_similarities_are_recorded_up_to_the_exit() -> None:
    text = tokens(1, 20, seed=7)
    with engine_on(model_of("Llama"), "recompute", mixed_policy("Llama")) as engine:
        assert all(step.similarities is None for step in follow(engine, text, 4))
        engine.truncate(0)
        engine.record_similarities = True
        steps = follow(engine, text, 4)
    with engine_on(model_of("Llama"), "none") as engine:
        engine.record_similarities = True
        whole = follow(engine, text, 4)
    for step, full in zip(steps, whole, strict=True):
        found, expected, depth = step.similarities, full.similarities, int(step.exit_layers)
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found[:depth], expected[:depth])
        assert found[depth:].isnan().all()


# ---- what a strategy runs ----


@every_strategy
def test_skipped_layers_are_not_run(strategy: Strategy) -> None:
    model = model_of("Llama")
    with engine_on(model, strategy, ExitPolicy.fixed(1)) as engine:
        engine.prefill(tokens(1, 5, seed=8))
        ran: list[str] = []
        handles = [
            module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
            for name, module in model.model.layers.named_modules()
            if "proj" in name
        ]
        linears = len(handles) // NUM_LAYERS
        engine.decode(torch.tensor([9]))
        for handle in handles:
            handle.remove()
    first, rest = ran[:linears], ran[linears:]
    assert {name.split(".")[0] for name in first} == {"0"}
    expected = []
    if strategy == "propagate":  # q_proj is called, but its product is spared, see below
        names = ("q_proj", "k_proj", "v_proj")
        expected = [f"{layer}.self_attn.{name}" for layer in (1, 2, 3) for name in names]
    assert rest == expected


def test_state_propagation_spares_the_query_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Qwen3")
    products: list[tuple[int, ...]] = []
    with engine_on(model, "propagate", ExitPolicy.fixed(0)) as engine:
        engine.prefill(tokens(1, 5, seed=9))
        linear = torch.nn.functional.linear

        def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            products.append(tuple(weight.shape))
            return linear(inputs, weight, bias)

        monkeypatch.setattr(torch.nn.functional, "linear", counted)
        engine.decode(torch.tensor([9]))
    attention = model.model.layers[0].self_attn
    keys = tuple(attention.k_proj.weight.shape)
    head = tuple(model.lm_head.weight.shape)
    assert tuple(attention.q_proj.weight.shape) != keys
    assert products == [keys, keys] * NUM_LAYERS + [head]


def test_recomputation_takes_waiting_tokens_along_in_one_batch() -> None:
    model = model_of("Llama")
    rows: list[int] = []
    with engine_on(model, "recompute", ExitPolicy.fixed(1)) as engine:
        follow(engine, tokens(1, 10, seed=10), 4)
        handles = [
            layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
            for layer in model.model.layers
        ]
        engine.policy = ExitPolicy.fixed(3)
        engine.decode(torch.tensor([5]))  # six tokens wait behind layer 1
        engine.decode(torch.tensor([6]))
        engine.policy = ExitPolicy.never()
        engine.decode(torch.tensor([7]))
        engine.decode(torch.tensor([8]))
        for handle in handles:
            handle.remove()
    assert rows == [1, 7, 7, *(1, 1, 1), *(1, 1, 1, 9), *(1, 1, 1, 1)]


def _backbone(model: torch.nn.Module, text: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(text).logits
    return logits


def test_no_layer_is_deeper_than_the_one_before_in_a_monotonic_sequence() -> None:
    policy = mixed_policy("Llama")
    with engine_on(model_of("Llama"), "monotonic", policy) as engine:
        steps = follow(engine, tokens(2, 40, seed=11), 3)
        for row in range(2):
            exits = exits_of(steps, row)
            assert exits == sorted(exits, reverse=True)
            assert len(set(exits)) > 2
        deepest = engine.prefill(tokens(2, 2, seed=12))
        assert deepest.exit_layers.tolist() == [NUM_LAYERS] * 2
        assert engine.length == 42


def test_thresholds_mix_depths() -> None:
    """The tests above say something only if tokens leave everywhere."""
    thresholds = thresholds_of("Llama")
    assert thresholds[0] == math.inf
    engine: StrategyEngine
    with engine_on(model_of("Llama"), "propagate", mixed_policy("Llama")) as engine:
        exits = exits_of(follow(engine, tokens(1, 60, seed=13), 3))
    assert all(exits.count(depth) >= 3 for depth in range(1, NUM_LAYERS + 1))
