"""The router against a slow reference that decides token by token, in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from river_llm.errors import ConfigError
from river_llm.river.policy import BatchRule, ExitPolicy, PrefillRule
from river_llm.river.router import ExitRouter, Phase, Route, RoutingRule

INF = math.inf
WIDTH = 5


@dataclass(frozen=True)
class Pass:
    """One pass: hidden states `[L + 1, B, T, C]` and a rule."""

    hidden_states: Tensor
    rule: RoutingRule

    @property
    def num_layers(self) -> int:
        return len(self.hidden_states) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden_states.shape[1], self.hidden_states.shape[2]

    @property
    def is_real(self) -> list[bool]:
        """Of every row."""
        count = self.hidden_states[0, ..., 0].numel()
        real = self.rule.is_real
        return [True] * count if real is None else real.flatten().tolist()


@st.composite
def passes(draw: st.DrawFn, num_layers: int) -> Pass:
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = batch * num_tokens
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    steps = torch.randn(num_layers + 1, batch, num_tokens, WIDTH, generator=generator)
    steps[1:] *= 1.5 * torch.rand(num_layers, batch, num_tokens, 1, generator=generator)
    first = st.sampled_from([INF, INF, INF, -INF])
    anything = st.sampled_from([-INF, INF, INF]) | st.floats(-1, 1)
    of_row = st.tuples(first, *[anything] * (num_layers - 1))
    is_shared = draw(st.booleans())
    thresholds = [draw(of_row) for _ in range(1 if is_shared else rows)]
    shape = (num_layers,) if is_shared else (batch, num_tokens, num_layers)
    groups = st.none() | st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)
    mean, minimum = (
        None if drawn is None else torch.tensor(drawn).view(batch, num_tokens)
        for drawn in (draw(groups), draw(groups))
    )
    real = None
    if draw(st.booleans()):
        real = torch.tensor([draw(st.booleans()) for _ in range(rows)]).view(batch, num_tokens)
        real[0, -1] = True
    rule = RoutingRule(
        torch.tensor(thresholds).view(shape), real, mean, minimum, draw(st.booleans())
    )
    return Pass(steps.cumsum(0), rule)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def similarities_of(one: Pass) -> list[list[float]]:
    """`[layer][row]`, of every row whether it left or not."""
    layers = one.hidden_states.double().flatten(1, 2).tolist()
    return [
        [cosine(before, after) for before, after in zip(*pair, strict=True)]
        for pair in itertools.pairwise(layers)
    ]


def depths_slowly(one: Pass, limit: int) -> tuple[list[int], int]:
    """How many layers each row runs, and how many real ones would have gone deeper."""
    rule, rows = one.rule, range(len(one.is_real))
    flat = rule.thresholds.reshape(-1, one.num_layers).tolist()
    thresholds = flat if len(flat) == len(rows) else flat * len(rows)
    depths = [one.num_layers] * len(rows)
    capped = 0
    similarities = similarities_of(one)
    for layer in range(one.num_layers):
        inside = [row for row in rows if depths[row] == one.num_layers]
        counting = [row for row in inside if one.is_real[row]]
        joined = (
            dict.fromkeys(rows, -2.0) if layer == 0 else dict(enumerate(similarities[layer - 1]))
        )
        for groups, is_mean in ((rule.mean_groups, True), (rule.minimum_groups, False)):
            if groups is not None and layer > 0:
                group = groups.flatten().tolist()
                own = {r: [joined[c] for c in counting if group[c] == group[r]] for r in counting}
                joined |= {r: sum(o) / len(o) if is_mean else min(o) for r, o in own.items()}
        leaving = [
            row
            for row in inside
            if thresholds[row][layer] == -INF or joined[row] > thresholds[row][layer]
        ]
        if layer == limit:
            capped = len(set(counting) - set(leaving))
            leaving = inside
        for row in leaving:
            depths[row] = layer
    return depths, capped


def check_rows(router: ExitRouter, one: Pass, depths: list[int], layers_run: int) -> None:
    """The routes of the layer that comes after `layers_run`."""
    real = one.is_real
    staying = [row for row, depth in enumerate(depths) if depth > layers_run or not real[row]]
    left = [row for row, depth in enumerate(depths) if depth <= layers_run and real[row]]
    if not any(real[row] for row in staying):
        assert router.route is Route.RIVER
    elif not left:
        assert router.route is Route.BACKBONE
    else:
        assert router.route is Route.BOTH
        assert router.backbone_rows.tolist() == staying
        assert router.river_rows.tolist() == left


def check_pass(router: ExitRouter, one: Pass) -> None:
    """Run it, and compare."""
    limit = router.num_layers if router.depth_limit is None else router.depth_limit
    depths, capped = depths_slowly(one, limit)
    capped += router.depth_capped
    router.begin_pass(*one.shape, one.rule)
    for layer in range(1, router.num_layers + 1):
        check_rows(router, one, depths, layer - 1)
        router.after_layer(layer, one.hidden_states[layer - 1], one.hidden_states[layer])
    router.end_pass()
    assert router.depth_capped == capped
    assert router.exit_layers.dtype == torch.int64
    found = router.exit_layers.flatten().tolist()
    assert [f for f, r in zip(found, one.is_real, strict=True) if r] == [
        d for d, r in zip(depths, one.is_real, strict=True) if r
    ]
    if not one.rule.record_similarities:
        assert router.similarities is None
        return
    assert router.similarities is not None
    ran = torch.arange(router.num_layers)[:, None] < torch.tensor(depths)
    expected = torch.tensor(similarities_of(one)).where(ran, math.nan)
    recorded = router.similarities.flatten(1)
    of_real = torch.tensor(one.is_real)
    torch.testing.assert_close(
        recorded[:, of_real], expected[:, of_real].float(), rtol=0, atol=1e-5, equal_nan=True
    )


@given(data=st.data())
def test_tokens_leave_where_the_reference_lets_them(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 5))
    router = ExitRouter(num_layers)
    for _ in range(3):
        router.depth_limit = data.draw(st.none() | st.integers(0, num_layers))
        check_pass(router, data.draw(passes(num_layers)))


@pytest.mark.parametrize("batch_rule", get_args(BatchRule))
@pytest.mark.parametrize("prefill", get_args(PrefillRule))
@pytest.mark.parametrize("phase", get_args(Phase))
def test_a_policy_is_a_rule(phase: Phase, prefill: PrefillRule, batch_rule: BatchRule) -> None:
    policy = ExitPolicy.similarity(0.5, prefill=prefill, batch=batch_rule)
    real = torch.tensor([[False, True, True], [True, True, True]])
    rule = RoutingRule.of_policy(policy, 3, phase, real)
    thresholds = {"backbone": [INF] * 3, "river": [-INF] * 3}.get(prefill, [INF, 0.5, 0.5])
    assert rule.thresholds.tolist() == (thresholds if phase == "prefill" else [INF, 0.5, 0.5])
    assert torch.equal(rule.is_real, real)  # type: ignore[arg-type]
    by_sequence = phase == "prefill" and prefill == "sequence"
    means = [[0] * 3, [1] * 3] if by_sequence else None
    assert (rule.mean_groups if means is None else rule.mean_groups.tolist()) == means  # type: ignore[union-attr]
    minima = (
        ([[0] * 3] * 2 if by_sequence else [[0, 1, 2]] * 2) if batch_rule == "minimum" else None
    )
    assert (None if rule.minimum_groups is None else rule.minimum_groups.tolist()) == minima
    assert RoutingRule.of_policy(policy, 3, phase, torch.ones(1, 2).bool()).is_real is None


def test_a_row_that_is_no_number_says_nothing_of_its_group() -> None:
    states = torch.randn(3, 2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    states[:, 0] = math.nan
    groups = torch.zeros(2, 1, dtype=torch.long)
    rule = RoutingRule(torch.tensor([INF, -1.0]), minimum_groups=groups)
    for own, exits in ((rule, [1, 1]), (replace(rule, minimum_groups=None), [2, 1])):
        router = ExitRouter(2)
        router.begin_pass(2, 1, own)
        router.after_layer(1, states[0], states[1])
        assert router.exit_layers.flatten().tolist() == exits


def test_a_pass_that_is_cut_short_caps_nothing() -> None:
    router, never = ExitRouter(2), RoutingRule(torch.full((2,), INF))
    router.depth_limit = 0
    router.begin_pass(1, 3, never)
    router.begin_pass(1, 1, never)
    router.end_pass()
    assert router.depth_capped == 1


@pytest.mark.parametrize("limit", [-1, 5])
def test_a_depth_limit_beyond_the_model_is_refused(limit: int) -> None:
    router = ExitRouter(4)
    with pytest.raises(ConfigError, match=f"limit is {limit}, .* choose 0 to 4"):
        router.depth_limit = limit
    assert router.depth_limit is None


def test_a_similarity_equal_to_the_threshold_stays() -> None:
    state, router = torch.tensor([[[1.0, 0.0]]]), ExitRouter(2)
    router.begin_pass(1, 1, RoutingRule(torch.tensor([INF, 1.0])))
    router.after_layer(1, state, state)
    assert router.route is Route.BACKBONE
    assert router.exit_layers.tolist() == [[2]]


def test_similarities_are_taken_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 3, 512, generator=generator).bfloat16()
    after = (before.float() + 0.1 * torch.randn(2, 3, 512, generator=generator)).bfloat16()
    router = ExitRouter(1)
    router.begin_pass(2, 3, RoutingRule(torch.tensor([INF]), record_similarities=True))
    router.after_layer(1, before, after)
    exact = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    assert router.similarities is not None
    torch.testing.assert_close(router.similarities[0].double(), exact, rtol=0, atol=1e-6)
