"""How many backbone layers stay in memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import OffloadConfig, OffloadStatistics, ResidencyPlan

LAYERS = 6
SIMILARITY = ExitPolicy.similarity(0.9)
AUTO = OffloadConfig("auto")


def plan_of(config: OffloadConfig, policy: ExitPolicy = SIMILARITY) -> ResidencyPlan:
    return ResidencyPlan(config, [100] * LAYERS, 1000, policy)


def layers(count: int) -> OffloadConfig:
    return OffloadConfig("layers", layers=count)


def budget(max_bytes: int) -> OffloadConfig:
    return OffloadConfig("budget", max_bytes=max_bytes)


class TestOffloadConfig:
    @pytest.mark.parametrize(
        ("offload", "config"),
        [
            (None, None),
            ("off", None),
            ("AUTO", AUTO),
            (AUTO, AUTO),
            ("0", layers(0)),
            (12, layers(12)),
            ("2GiB", budget(2 * 2**30)),
            ("1.5 gb", budget(1_500_000_000)),
            ("800MB", budget(800_000_000)),
        ],
    )
    def test_is_read_from_whatever_names_it(
        self, offload: Any, config: OffloadConfig | None
    ) -> None:
        assert OffloadConfig.of(offload) == config

    @pytest.mark.parametrize(
        "offload", [2.5, True, [2], b"2", "", "-1", "2.5", "GiB", "2 GiBs", "all", "1e9", "٣GB B"]
    )
    def test_refuses_what_names_none(self, offload: Any) -> None:
        with pytest.raises(ConfigError, match=r"offload is .*; give off, auto, a number of layers"):
            OffloadConfig.of(offload)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"kind": "some"}, "offloading is by 'some'; choose one of auto, layers, budget"),
            ({"kind": "layers"}, "keeps None layers; it must be a whole number, 0 or more"),
            ({"kind": "layers", "layers": -1}, "keeps -1 layers; it must be a whole number"),
            ({"kind": "budget", "max_bytes": 2.5}, "budget of 2.5 bytes; it must be a whole"),
            ({"kind": "budget", "max_bytes": 0}, "budget of 0 bytes"),
            ({"kind": "auto", "no_miss": True}, "learnt from misses"),
        ],
    )
    def test_refuses_fields_out_of_range(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            OffloadConfig(**fields)

    def test_takes_no_miss_with_a_number_or_a_size(self) -> None:
        assert OffloadConfig.of(2, no_miss=True) == OffloadConfig("layers", 2, no_miss=True)
        for offload in (None, "off"):
            with pytest.raises(ConfigError, match="no_miss goes with offload"):
                OffloadConfig.of(offload, no_miss=True)


class TestPlan:
    @given(st.integers(1000, 2000), st.integers(0, LAYERS))
    def test_keeps_the_layers_named_or_those_that_fit(self, max_bytes: int, count: int) -> None:
        assert plan_of(layers(count)).resident == count
        plan = plan_of(budget(max_bytes))
        assert plan.resident_bytes <= max_bytes
        assert plan.resident == LAYERS or plan.resident_bytes + 100 > max_bytes

    @given(st.integers(1, 2**42))
    def test_says_a_budget_that_is_enough(self, fixed_bytes: int) -> None:
        with pytest.raises(ConfigError, match=r"^a memory budget of 1 B; .*alone take") as caught:
            ResidencyPlan(budget(1), [1], 1 + fixed_bytes, SIMILARITY)
        config = OffloadConfig.of(str(caught.value).rpartition(" ")[2])
        assert config is not None
        assert ResidencyPlan(config, [1], 1 + fixed_bytes, SIMILARITY).resident in (0, 1)

    def test_refuses_more_layers_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match="keeps 7 layers, but the model has 6"):
            plan_of(layers(7))

    def test_of_auto_starts_with_what_the_policy_may_reach(self) -> None:
        policies = {ExitPolicy.fixed(3): 3, ExitPolicy.always(): 0, SIMILARITY: LAYERS}
        for policy, resident in policies.items():
            assert plan_of(AUTO, policy).resident == resident

    def test_of_auto_follows_what_nearly_all_tokens_need(self) -> None:
        plan = plan_of(AUTO)
        assert not plan.note([2] * 31)
        assert plan.resident == LAYERS
        assert plan.note([4])
        assert plan.resident == 4  # 1 of 32 is more than one in a hundred
        for _ in range(10):
            plan.note([2] * 16)
        assert plan.resident == 2
        grown = plan_of(AUTO)
        grown.note([1] * 2000)
        assert grown.resident == 1
        for _ in range(3):
            grown.note([5] * 16)
        assert grown.resident == 5
        fixed = plan_of(layers(2))
        assert not fixed.note([5] * 100)
        assert fixed.resident == 2
        assert fixed.describe() == "2 of 6 layers stay"

    @given(st.lists(st.integers(0, LAYERS), min_size=32, max_size=200))
    def test_of_auto_lets_one_token_in_a_hundred_miss(self, depths: list[int]) -> None:
        plan = plan_of(AUTO)
        plan.note(depths)
        rest = [depths[-1]] * (-len(depths) % 16)
        plan.note(rest)
        missed = sum(depth > plan.resident for depth in depths + rest)
        assert missed <= 0.01 * len(depths + rest)


def test_statistics_of_one_answer_are_a_difference() -> None:
    before, after = OffloadStatistics(3, 1, 100, 0.5, 2), OffloadStatistics(4, 5, 900, 2.0, 2)
    assert after.since(before) == OffloadStatistics(4, 4, 800, 1.5, 0)
