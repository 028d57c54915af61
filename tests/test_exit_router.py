"""The router against a slow reference that decides token by token, in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from river_llm.errors import ConfigError
from river_llm.exit_policy import BatchRule, ExitPolicy, PrefillRule
from river_llm.exit_router import ExitRouter, Phase, Route

PREFILL_RULES: tuple[PrefillRule, ...] = get_args(PrefillRule)
BATCH_RULES: tuple[BatchRule, ...] = get_args(BatchRule)
WIDTH = 5


@dataclass(frozen=True)
class Pass:
    """One pass: hidden states `[L + 1, B, T, C]` and which tokens are no padding, `[B, T]`."""

    hidden_states: Tensor
    real: Tensor
    masked: bool  # whether the router is given `real`

    @property
    def shape(self) -> tuple[int, int]:
        return self.real.shape[0], self.real.shape[1]


@st.composite
def passes(draw: st.DrawFn, num_layers: int) -> Pass:
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    steps = torch.randn(num_layers + 1, batch, num_tokens, WIDTH, generator=generator)
    steps[1:] *= 1.5 * torch.rand(num_layers, batch, num_tokens, 1, generator=generator)
    padding = torch.tensor([draw(st.integers(0, num_tokens - 1)) for _ in range(batch)])
    masked = draw(st.booleans())
    real = torch.arange(num_tokens) >= (padding if masked else 0 * padding)[:, None]
    return Pass(steps.cumsum(0), real, masked)


def thresholds_of(num_layers: int) -> st.SearchStrategy[tuple[float, ...]]:
    first = st.sampled_from([math.inf, math.inf, math.inf, -math.inf])
    anything = st.sampled_from([-math.inf, math.inf, math.inf]) | st.floats(-1, 1)
    return st.tuples(first, *[anything] * (num_layers - 1))


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def _similarities(one: Pass) -> list[list[list[float]]]:
    """`[layer][sequence][token]`, of every token whether it left or not."""
    layers = one.hidden_states.double().tolist()
    batch, num_tokens = one.shape
    return [
        [[_cosine(before[b][t], after[b][t]) for t in range(num_tokens)] for b in range(batch)]
        for before, after in itertools.pairwise(layers)
    ]


def _exit_layers_slowly(policy: ExitPolicy, one: Pass, phase: Phase) -> list[list[int]]:
    """How many layers each token runs, by the policy's own words."""
    num_layers = len(one.hidden_states) - 1
    batch, num_tokens = one.shape
    rule = policy.prefill if phase == "prefill" else "token"
    if rule in ("backbone", "river"):
        depth = num_layers if rule == "backbone" else 0
        return [[depth] * num_tokens for _ in range(batch)]
    thresholds, similarities = policy.thresholds(num_layers), _similarities(one)

    def compared(layer: int, b: int, t: int) -> float:
        def own(sequence: int) -> float:
            of_sequence = similarities[layer - 1][sequence]
            if rule == "token":
                return of_sequence[t]
            counted = [s for s, real in zip(of_sequence, one.real[sequence], strict=True) if real]
            return sum(counted) / len(counted)

        if policy.batch == "sequence":
            return own(b)
        there = [c for c in range(batch) if rule == "sequence" or bool(one.real[c, t])]
        return min(map(own, there), default=math.inf)

    def depth_of(b: int, t: int) -> int:
        if thresholds[0] == -math.inf:
            return 0
        for layer in range(1, num_layers):
            if compared(layer, b, t) > thresholds[layer]:
                return layer
        return num_layers

    return [[depth_of(b, t) for t in range(num_tokens)] for b in range(batch)]


def _check_rows(router: ExitRouter, depths: list[list[int]], layers_run: int) -> None:
    """The routes of the layer that comes after `layers_run`."""
    flat = [depth for sequence in depths for depth in sequence]
    staying = [row for row, depth in enumerate(flat) if depth > layers_run]
    left = [row for row, depth in enumerate(flat) if depth <= layers_run]
    if not left:
        assert router.route is Route.BACKBONE
    elif not staying:
        assert router.route is Route.RIVER
    else:
        assert router.route is Route.BOTH
        assert router.backbone_rows.tolist() == staying
        assert router.river_rows.tolist() == left


def _check_pass(router: ExitRouter, policy: ExitPolicy, one: Pass, phase: Phase) -> None:
    num_layers, limit = router.num_layers, router.depth_limit
    wanted = _exit_layers_slowly(policy, one, phase)
    depths = wanted if limit is None else [[min(d, limit) for d in row] for row in wanted]
    held_back = router.held_back + sum(
        real and depth < want
        for row in zip(depths, wanted, one.real.tolist(), strict=True)
        for depth, want, real in zip(*row, strict=True)
    )
    batch, num_tokens = one.shape
    router.begin_pass(batch, num_tokens, phase, one.real if one.masked else None)
    assert router.least_depth <= max(map(max, depths)) <= router.most_depth
    for layer in range(1, num_layers + 1):
        _check_rows(router, depths, layers_run=layer - 1)
        router.after_layer(layer, one.hidden_states[layer - 1], one.hidden_states[layer])
    router.end_pass()
    assert router.held_back == held_back
    assert router.exit_layers.dtype == torch.int64
    assert router.exit_layers.tolist() == depths
    if not router.record_similarities:
        assert router.similarities is None
        return
    assert router.similarities is not None
    assert router.similarities.shape == (num_layers, batch, num_tokens)
    ran = torch.arange(num_layers)[:, None, None] < torch.tensor(depths)
    expected = torch.tensor(_similarities(one)).where(ran, math.nan)
    torch.testing.assert_close(
        router.similarities, expected, rtol=0, atol=1e-5, equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize("record", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("batch_rule", BATCH_RULES)
@pytest.mark.parametrize("prefill", PREFILL_RULES)
@given(data=st.data())
def test_tokens_leave_where_the_reference_lets_them(
    prefill: PrefillRule, batch_rule: BatchRule, record: bool, data: st.DataObject
) -> None:
    num_layers = data.draw(st.integers(1, 6))
    thresholds = data.draw(thresholds_of(num_layers))
    policy = ExitPolicy.per_layer(thresholds, prefill=prefill, batch=batch_rule)
    router = ExitRouter(policy, num_layers)
    router.record_similarities = record
    phases: tuple[Phase, ...] = ("prefill", "decode", "decode", "prefill")
    for phase in phases:
        router.depth_limit = data.draw(st.none() | st.integers(0, num_layers))
        _check_pass(router, policy, data.draw(passes(num_layers)), phase)


@pytest.mark.parametrize(
    ("policy", "limit", "depths"),
    [
        (ExitPolicy.never(), None, (4, 4)),
        (ExitPolicy.always(), None, (0, 0)),
        (ExitPolicy.fixed(3), None, (3, 3)),
        (ExitPolicy.similarity(0.9), None, (1, 4)),
        (ExitPolicy.similarity(0.9, first_layer=3), None, (3, 4)),
        (ExitPolicy.per_layer((math.inf, math.inf, 0.9, -math.inf)), None, (2, 3)),
        (ExitPolicy.per_layer((math.inf, -math.inf, 0.9, -math.inf)), None, (1, 1)),
        (ExitPolicy.similarity(0.9), 2, (1, 2)),
        (ExitPolicy.similarity(0.9, first_layer=3), 2, (2, 2)),
        (ExitPolicy.never(), 4, (4, 4)),
        (ExitPolicy.never(), 0, (0, 0)),
    ],
)
def test_it_knows_beforehand_how_deep_tokens_go(
    policy: ExitPolicy, limit: int | None, depths: tuple[int, int]
) -> None:
    router = ExitRouter(policy, 4)
    router.depth_limit = limit
    router.begin_pass(1, 1, "decode")
    assert (router.least_depth, router.most_depth) == depths


def test_a_pass_that_is_cut_short_holds_nothing_back() -> None:
    router = ExitRouter(ExitPolicy.never(), 2)
    router.depth_limit = 0
    router.begin_pass(1, 3, "decode")
    router.begin_pass(1, 1, "decode")
    router.end_pass()
    assert router.held_back == 1


@pytest.mark.parametrize("limit", [-1, 5])
def test_a_depth_limit_beyond_the_model_is_refused(limit: int) -> None:
    router = ExitRouter(ExitPolicy.never(), 4)
    with pytest.raises(ConfigError, match=f"limit is {limit}, .* choose 0 to 4"):
        router.depth_limit = limit
    assert router.depth_limit is None


@given(data=st.data(), threshold=st.floats(-1, 1), first_layer=st.integers(1, 4))
def test_a_new_policy_counts_from_the_next_pass_on(
    data: st.DataObject, threshold: float, first_layer: int
) -> None:
    router = ExitRouter(ExitPolicy.never(), 4)
    for policy in (
        ExitPolicy.similarity(threshold, first_layer, prefill="token"),
        ExitPolicy.fixed(first_layer, prefill="sequence", batch="minimum"),
        ExitPolicy.always(),
        ExitPolicy.never(prefill="token"),
    ):
        router.set_policy(policy)
        assert router.policy is policy
        _check_pass(router, policy, data.draw(passes(4)), "prefill")


@settings(max_examples=10)
@given(one=passes(4))
def test_a_policy_set_within_a_pass_waits_for_the_next(one: Pass) -> None:
    router = ExitRouter(ExitPolicy.fixed(3, prefill="token"), 4)
    router.begin_pass(*one.shape, "prefill")
    router.set_policy(ExitPolicy.always())
    for layer in range(1, 5):
        router.after_layer(layer, one.hidden_states[layer - 1], one.hidden_states[layer])
    assert bool((router.exit_layers == 3).all())


def test_a_batch_rule_set_within_a_pass_waits_for_the_next() -> None:
    same, opposite = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0]]])
    router = ExitRouter(ExitPolicy.similarity(0.5), 2)
    router.begin_pass(2, 1, "decode")
    router.set_policy(ExitPolicy.similarity(0.5, batch="minimum"))
    router.after_layer(1, torch.cat([same, same]), torch.cat([same, opposite]))
    assert router.exit_layers.tolist() == [[1], [2]]


def test_a_similarity_equal_to_the_threshold_stays() -> None:
    state = torch.tensor([[[1.0, 0.0]]])
    router = ExitRouter(ExitPolicy.similarity(1.0), 2)
    router.begin_pass(1, 1, "decode")
    router.after_layer(1, state, state)
    assert router.route is Route.BACKBONE
    assert router.exit_layers.tolist() == [[2]]


def test_similarities_are_taken_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 3, 512, generator=generator).bfloat16()
    after = (before.float() + 0.1 * torch.randn(2, 3, 512, generator=generator)).bfloat16()
    router = ExitRouter(ExitPolicy.never(), 1)
    router.record_similarities = True
    router.begin_pass(2, 3, "prefill")
    router.after_layer(1, before, after)
    exact = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    assert router.similarities is not None
    torch.testing.assert_close(router.similarities[0].double(), exact, rtol=0, atol=1e-6)
