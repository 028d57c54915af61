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


class TestOffloadConfig:
    @pytest.mark.parametrize(
        ("text", "config"),
        [
            ("off", None),
            ("AUTO", AUTO),
            ("0", OffloadConfig("layers", layers=0)),
            ("12", OffloadConfig("layers", layers=12)),
            ("2GiB", OffloadConfig("budget", max_bytes=2 * 2**30)),
            ("1.5 gb", OffloadConfig("budget", max_bytes=1_500_000_000)),
            ("800MB", OffloadConfig("budget", max_bytes=800_000_000)),
        ],
    )
    def test_is_read_from_text(self, text: str, config: OffloadConfig | None) -> None:
        assert OffloadConfig.parse(text) == config

    @pytest.mark.parametrize(
        ("offload", "config"),
        [
            (None, None),
            ("off", None),
            (0, OffloadConfig("layers", layers=0)),
            (12, OffloadConfig("layers", layers=12)),
            ("2GiB", OffloadConfig("budget", max_bytes=2 * 2**30)),
            (AUTO, AUTO),
        ],
    )
    def test_is_read_from_whatever_names_it(
        self, offload: OffloadConfig | str | int | None, config: OffloadConfig | None
    ) -> None:
        assert OffloadConfig.of(offload) == config

    def test_a_number_of_layers_goes_with_no_miss(self) -> None:
        assert OffloadConfig.of(2, no_miss=True) == OffloadConfig("layers", layers=2, no_miss=True)

    @pytest.mark.parametrize("offload", [2.5, 2.0, True, [2], b"2", "", -1])
    def test_refuses_other_types(self, offload: Any) -> None:
        with pytest.raises(ConfigError, match=r"offload is .*; give off|keeps -1 layers"):
            OffloadConfig.of(offload)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"kind": "some"}, "offloading is by 'some'; choose one of auto, layers, budget"),
            ({"kind": "layers"}, "keeps None layers; it must be a whole number, 0 or more"),
            ({"kind": "layers", "layers": "3"}, "keeps '3' layers; it must be a whole number"),
            ({"kind": "budget", "max_bytes": 2.5}, "budget of 2.5 bytes; it must be a whole"),
        ],
    )
    def test_refuses_fields_of_other_types(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            OffloadConfig(**fields)

    @pytest.mark.parametrize("text", ["", "-1", "2.5", "GiB", "2 GiBs", "all", "1e9", "٣GB B"])
    def test_refuses_what_is_none_of_them(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"give off, auto, a number of layers"):
            OffloadConfig.parse(text)

    def test_refuses_a_budget_of_nothing(self) -> None:
        with pytest.raises(ConfigError, match="budget of 0 bytes"):
            OffloadConfig.parse("0GB")


class TestPlan:
    def test_keeps_as_many_layers_as_named(self) -> None:
        assert plan_of(OffloadConfig("layers", layers=2)).resident == 2
        with pytest.raises(ConfigError, match="keeps 7 layers, but the model has 6"):
            plan_of(OffloadConfig("layers", layers=7))

    @given(st.integers(1000, 2000))
    def test_keeps_as_many_as_fit_the_budget(self, max_bytes: int) -> None:
        plan = plan_of(OffloadConfig("budget", max_bytes=max_bytes))
        assert plan.resident_bytes <= max_bytes
        assert plan.resident == LAYERS or plan.resident_bytes + 100 > max_bytes

    def test_refuses_a_budget_below_what_always_stays(self) -> None:
        with pytest.raises(ConfigError, match="alone take"):
            plan_of(OffloadConfig("budget", max_bytes=999))

    @given(st.integers(1, 2**42))
    def test_says_a_budget_that_is_enough(self, fixed_bytes: int) -> None:
        with pytest.raises(ConfigError, match=r"^a memory budget of 1 B; ") as caught:
            ResidencyPlan(OffloadConfig("budget", max_bytes=1), [1], 1 + fixed_bytes, SIMILARITY)
        config = OffloadConfig.parse(str(caught.value).rpartition(" ")[2])
        assert ResidencyPlan(config, [1], 1 + fixed_bytes, SIMILARITY).resident in (0, 1)

    @pytest.mark.parametrize(
        ("policy", "resident"),
        [
            (ExitPolicy.fixed(3), 3),
            (ExitPolicy.always(), 0),
            (ExitPolicy.never(), LAYERS),
            (SIMILARITY, LAYERS),
        ],
    )
    def test_of_auto_begins_with_what_the_policy_may_reach(
        self, policy: ExitPolicy, resident: int
    ) -> None:
        assert plan_of(AUTO, policy).resident == resident

    def test_of_auto_keeps_what_nearly_all_tokens_need(self) -> None:
        plan = plan_of(AUTO)
        assert not plan.note([2] * 31)
        assert plan.resident == LAYERS
        assert plan.note([4])
        assert plan.resident == 4  # 1 of 32 is more than one in a hundred
        for _ in range(10):
            plan.note([2] * 16)
        assert plan.resident == 2

    def test_of_auto_grows_again_and_forgets(self) -> None:
        plan = plan_of(AUTO)
        plan.note([1] * 2000)
        assert plan.resident == 1
        for _ in range(3):
            plan.note([5] * 16)
        assert plan.resident == 5

    @given(st.lists(st.integers(0, LAYERS), min_size=32, max_size=200))
    def test_of_auto_lets_one_token_in_a_hundred_miss(self, depths: list[int]) -> None:
        plan = plan_of(AUTO)
        plan.note(depths)
        if len(depths) % 16:
            plan.note([depths[-1]] * (16 - len(depths) % 16))
            depths = depths + [depths[-1]] * (16 - len(depths) % 16)
        missed = sum(depth > plan.resident for depth in depths)
        assert missed <= 0.01 * len(depths)

    def test_that_is_fixed_does_not_learn(self) -> None:
        plan = plan_of(OffloadConfig("layers", layers=2))
        assert not plan.note([5] * 100)
        assert plan.resident == 2

    def test_says_what_stays(self) -> None:
        words = [plan_of(OffloadConfig("layers", layers=n)).describe() for n in (0, 2, LAYERS)]
        assert words == ["none of 6 layers stays", "layers 1 to 2 of 6 stay", "all 6 layers stay"]


def test_statistics_of_one_answer_are_a_difference() -> None:
    before = OffloadStatistics(3, 1, 100, 0.5, 2)
    after = OffloadStatistics(4, 5, 900, 2.0, 2)
    assert after.since(before) == OffloadStatistics(4, 4, 800, 1.5, 0)
