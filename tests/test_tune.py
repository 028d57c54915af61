"""Which setting a budget gives, by losses and speeds that are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from lossless_lm import lm_on

from river_llm import ConfigError, ExitPolicy, RiverLM
from river_llm.config import TuneConfig
from river_llm.errors import DataError
from river_llm.measure import tune as tune_module
from river_llm.measure.rounds import Spread
from river_llm.measure.tune import Tuning, tune
from river_llm.measure.tune_data import Example, SequenceLoss, Setting, Texts
from river_llm.river.tuned import QualityBudget

WIDTHS = {"backbone_bits": 16, "lm_head_bits": 16, "kv_bits": 16}
COUNT = 80
# by policy: mean KLD, and times the backbone's speed
KNOWN: dict[ExitPolicy | None, tuple[float, float]] = {
    ExitPolicy.never(): (0.0, 1.0),
    None: (0.0, 1.4),
    ExitPolicy.fixed(0): (0.08, 3.0),
    ExitPolicy.fixed(1): (0.04, 2.5),
    ExitPolicy.fixed(2): (0.05, 2.0),  # beaten by the one before
    ExitPolicy.fixed(3): (0.01, 1.2),  # slower than lossless mode
    ExitPolicy.similarity(0.5): (0.02, 2.0),
}


class KnownLosses(Texts):
    """A share of the mean that depends on the sequence; `spoilt` sequences lose much more."""

    def __init__(self, spoilt: Sequence[int] = (), count: int = COUNT, seed: int = 0) -> None:
        super().__init__("known", [[1, 2, 3, i % 90] * 2 for i in range(count)], 8)
        self.asked: list[tuple[list[str], int]] = []
        self._spoilt = spoilt
        drawn = random.Random(seed)
        self._shares = [0.8 + 0.4 * drawn.random() for _ in range(count)]

    def losses(
        self,
        backbone: RiverLM,
        settings: Sequence[Setting],
        places: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[list[SequenceLoss]]:
        self.asked.append(([one.name for one in settings], len(places)))
        return [[self._loss(KNOWN[one.policy][0], i) for i in places] for one in settings]

    def _loss(self, mean: float, place: int) -> SequenceLoss:
        kld = 3.0 if place in self._spoilt else mean * self._shares[place]
        return SequenceLoss(kld, min(1.0, 2 * kld), 1.0)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    def speeds(settings: Sequence[Setting], *rest: Any) -> list[Spread]:
        return [Spread(KNOWN[one.policy][1], 0, 9) for one in settings]

    policies = [one for one in KNOWN if one not in (None, ExitPolicy.never())]
    monkeypatch.setattr(tune_module, "_speeds", speeds)
    monkeypatch.setattr(tune_module, "candidate_policies", lambda seen: policies)


@pytest.fixture(scope="module")
def lm() -> RiverLM:
    return lm_on("torch")


def tuned(lm: RiverLM, budget: str, data: KnownLosses | None = None, **settings: Any) -> Tuning:
    config = TuneConfig.of(settings)
    data = data or KnownLosses()
    return tune(
        {"river": lm}, data, QualityBudget.parse(budget), config, WIDTHS, lambda *progress: None
    )


def passes_of(found: Tuning) -> dict[str, bool]:
    return {
        one.setting.name: one.certificate.passes
        for one in found.measured
        if one.certificate is not None
    }


def test_the_fastest_that_keeps_to_the_budget_is_chosen(lm: RiverLM) -> None:
    data = KnownLosses()
    found = tuned(lm, "kld=0.06", data)
    assert found.tuned.policy == ExitPolicy.fixed(1)
    assert found.tuned.certified == found.tuned.budget == "kld=0.06"
    assert passes_of(found) == {
        "similarity > 0.5": True,
        "exit after 1": True,
        "exit after 0": False,
    }
    assert found.tuned.loss == pytest.approx(0.04, rel=0.1)
    assert found.tuned.held_out_loss == pytest.approx(0.04, rel=0.2)
    assert (found.tuned.sequences, found.held_out, found.tuned.cut_sequences) == (40, 20, 0)
    assert (found.tuned.speed_up, found.slower) == (2.5, 1)
    learnt, certified, held_out = data.asked
    assert learnt == (["exit after 0", "exit after 1", "exit after 2", "similarity > 0.5"], 20)
    assert certified == (["similarity > 0.5", "exit after 1", "exit after 0"], 40)
    assert held_out == (["exit after 1"], 20)


def test_settings_that_are_far_off_are_not_tried(lm: RiverLM) -> None:
    found = tuned(lm, "kld=0.03")
    assert passes_of(found) == {"similarity > 0.5": True, "exit after 1": False}
    assert found.tuned.policy == ExitPolicy.similarity(0.5)


def test_what_no_setting_keeps_leaves_the_backbone_alone(lm: RiverLM) -> None:
    found = tuned(lm, "kld=0.001")
    assert found.tuned.policy is None
    assert (found.tuned.certified, found.tuned.held_out_loss) == (None, None)
    assert found.tuned.describe().startswith("never leave: answers are lossless, 1.40 times")


def test_a_few_sequences_that_lose_much_are_cut_and_counted(lm: RiverLM) -> None:
    found = tuned(lm, "kld=0.06", KnownLosses(spoilt=[0, 30, 79]))
    tests = [one.certificate for one in found.measured if one.certificate is not None]
    assert {test.bound for test in tests} == {0.24}
    assert 0 < max(test.cut_sequences for test in tests) <= 3


def test_agreement_is_a_budget_too(lm: RiverLM) -> None:
    found = tuned(lm, "agreement=0.88")  # twice the divergence is lost
    assert found.tuned.policy == ExitPolicy.fixed(1)
    assert found.tuned.held_out_loss == pytest.approx(0.08, rel=0.2)


class TestSpeed:
    def test_the_least_loss_that_is_as_fast_is_chosen(self, lm: RiverLM) -> None:
        found = tuned(lm, "speed=1.8")
        assert found.tuned.policy == ExitPolicy.similarity(0.5)
        assert found.tuned.certified is not None
        certified = QualityBudget.parse(found.tuned.certified)
        assert 0.02 < certified.value < 0.03
        assert passes_of(found) == {"similarity > 0.5": True}

    def test_what_is_just_as_fast_as_asked_for_is_chosen(self, lm: RiverLM) -> None:
        assert tuned(lm, "speed=3").tuned.policy == ExitPolicy.fixed(0)  # there is no faster one

    def test_no_smaller_budget_is_promised_than_was_tested(self, lm: RiverLM) -> None:
        for seed in range(5):
            found = tuned(lm, "speed=1.8", KnownLosses(seed=seed))
            assert found.chosen.certificate is not None
            assert found.tuned.certified is not None
            promised = QualityBudget.parse(found.tuned.certified).value
            tested = found.chosen.certificate.budget
            assert tested <= promised < 1.001 * tested

    def test_lossless_mode_is_taken_where_it_is_as_fast(self, lm: RiverLM) -> None:
        found = tuned(lm, "speed=1.3")
        assert found.tuned.policy is None
        assert found.tuned.speed_up == 1.4

    def test_a_speed_that_nothing_has_is_refused(self, lm: RiverLM) -> None:
        message = r"no setting has 4 times .* the fastest has 3\.00 \(exit after 0, river\)"
        with pytest.raises(ConfigError, match=message):
            tuned(lm, "speed=4")


def test_too_few_sequences_are_refused_before_anything_is_measured(lm: RiverLM) -> None:
    data = KnownLosses(count=21)
    with pytest.raises(DataError, match=r"known: 21 sequences .* needs 22"):
        tuned(lm, "kld=0.05", data)
    assert not data.asked


def test_a_certified_budget_is_kept_on_other_sequences(lm: RiverLM) -> None:
    """The true mean of one setting is just above the budget."""
    wrong = 0
    for seed in range(60):
        found = tuned(lm, "kld=0.0399", KnownLosses(count=48, seed=seed), seed=seed)
        wrong += found.tuned.policy == ExitPolicy.fixed(1)
    assert wrong <= 60 * 0.05 + 4 * (60 * 0.05 * 0.95) ** 0.5


class TestTiming:
    """Without the known speeds."""

    @pytest.mark.parametrize("kind", ["torch", "cpu"])
    @pytest.mark.parametrize("prompt", [0, 5])
    def test_every_setting_is_timed_along_the_same_texts(
        self, kind: str, prompt: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        lm = lm_on(kind)
        policies = [ExitPolicy.never(), None, ExitPolicy.fixed(0)]
        settings = [Setting("river", lm, policy) for policy in policies]
        examples = [Example(tuple(range(5, 35)), prompt), Example(tuple(range(40, 70)), prompt)]
        done: list[tuple[int, int]] = []
        config = TuneConfig(rounds=2)
        speeds = tune_module._speeds(settings, examples, config, lambda *x: done.append(x))
        assert speeds[0] == Spread(1, 1, 1)
        assert all(0 < one.lowest <= one.median <= one.highest for one in speeds)
        assert done[-1] == (9, 9)

    def test_texts_of_nothing_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        settings = [Setting("river", lm_on("torch"), ExitPolicy.never())]
        with pytest.raises(ConfigError, match="too short to time"):
            tune_module._speeds(settings, [Example((1, 2, 3), 2)], TuneConfig(), print)
