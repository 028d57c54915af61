from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from river_llm.config import SamplingConfig
from river_llm.errors import LogitsError
from river_llm.generate.philox import all_exponentials, exponentials, philox
from river_llm.generate.sampler import Sampler

DRAWS = 2_000
LOGITS = torch.tensor([1.3, -0.2, 2.1, 0.4, -1.8, 1.9, 0.0, 2.05, -1.1, 0.7, 1.5, -0.6])
SAMPLED = {"temperature": 1.0, "seed": 3}
FILTERED = {**SAMPLED, "top_k": 1, "top_p": 0.5, "min_p": 0.9}
nan, inf = math.nan, math.inf


class TestPhilox:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    @pytest.mark.parametrize("array", [np.array, torch.tensor])
    def test_gives_the_words_of_random123(
        self, array: Any, counter: Any, key: Any, expected: Any
    ) -> None:
        counters = tuple(array([word]) for word in counter)
        assert [int(word[0]) for word in philox(counters, key)] == list(expected)  # type: ignore[arg-type]

    @given(
        tokens=st.lists(st.integers(0, 70), max_size=20),
        place=st.integers(0, 2**20),
        seed=st.integers(0, 2**63 - 1),
        index=st.integers(0, 2**20),
    )
    def test_noise_of_a_token_hangs_on_nothing_else(
        self, tokens: list[int], place: int, seed: int, index: int
    ) -> None:
        whole = all_exponentials(71, place, seed, index)
        some = exponentials(torch.tensor(tokens, dtype=torch.long), place, seed, index)
        assert torch.equal(some, whole[tokens])
        for other in ((place + 1, seed, index), (place, seed ^ 1, index), (place, seed, index + 1)):
            assert not torch.isin(all_exponentials(71, *other), whole).any()

    def test_noise_is_exponential(self) -> None:
        drawn = torch.cat([all_exponentials(50_000, place, 1) for place in range(4)]).double()
        assert 0 < float(drawn.min()) < float(drawn.max()) < 17
        edges = -torch.log1p(-torch.arange(101).double() / 100)  # of a hundredth each
        counts = torch.histogram(drawn, edges).hist
        assert p_value(counts, torch.full((100,), len(drawn) / 100)) > 0.001
        pairs = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
        assert abs(pairs) < 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.25},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.75, "min_p": 0.55},
        {"temperature": 1.0, "repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_samples_follow_the_distribution(settings: dict[str, Any]) -> None:
    config = SamplingConfig(seed=3, **settings)
    seen, logits = [2, 4, 7], 0.6 * LOGITS
    draws = [Sampler(config, index).choose(seen, logits) for index in range(DRAWS)]
    counts = torch.bincount(torch.tensor(draws), minlength=len(logits)).double()
    expected = DRAWS * distribution(logits.double(), seen, **settings)
    assert expected[expected > 0].min() >= 5
    assert p_value(counts, expected) > 0.001


@given(
    logits=st.lists(st.floats(-9, 9, width=16), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    place=st.integers(1, 50),
)
def test_filters_leave_whom_they_should_and_their_noise_alone(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, place: int
) -> None:
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    config = SamplingConfig(seed=5, temperature=temperature, **filters)  # type: ignore[arg-type]
    chosen = Sampler(config).choose([0] * place, torch.tensor(logits))
    left = distribution(torch.tensor(logits).double(), [], temperature, **filters)  # type: ignore[arg-type]
    scores = left / all_exponentials(len(logits), place, 5).double()
    if chosen != int(scores.argmax()):  # rounding may decide at a filter's border
        wider = {"top_k": top_k, "top_p": min(1, top_p * 1.0001), "min_p": min_p * 0.9999}
        assert distribution(torch.tensor(logits).double(), [], temperature, **wider)[chosen] > 0  # type: ignore[arg-type]


def test_a_large_vocabulary_is_searched_for_the_mass_of_top_p() -> None:
    logits = torch.zeros(50_000)
    logits[:10] = 9.0
    few = Sampler(SamplingConfig(temperature=1.0, top_p=0.5, seed=1))
    assert {few.choose([0] * n, logits) for n in range(1, 60)} <= set(range(10))
    most = Sampler(SamplingConfig(temperature=1.0, top_p=0.999, seed=1))
    assert len({most.choose([0] * n, logits) > 2048 for n in range(1, 60)}) == 2


def test_a_token_of_no_weight_is_never_taken() -> None:
    """Over a vocabulary of usual size, whose 49,151 other tokens together weigh 2e-13."""
    logits = torch.full((49152,), -40.0)
    logits[7] = 0
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0))
    assert {sampler.choose([0] * place, logits) for place in range(1, 300)} == {7}


@given(logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20, unique=True))
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3, "top_p": 0.4, "min_p": 0.1},  # greedy, whatever they are
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "top_p": 1e-6},
        {"temperature": 5.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_greedy_and_the_narrowest_filters_take_the_argmax(
    settings: dict[str, Any], logits: list[float]
) -> None:
    sampler = Sampler(SamplingConfig(**settings))
    assert sampler.choose([0], torch.tensor(logits)) == logits.index(max(logits))


def test_without_a_seed_draws_are_others_each_time() -> None:
    def draws(seed: int | None, index: int = 0) -> list[int]:
        sampler = Sampler(SamplingConfig(seed=seed, temperature=1.0), index)
        return [sampler.choose([0] * place, LOGITS) for place in range(1, 30)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(7, index=1) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"repetition_penalty": 1.5}], ids=str)
def test_the_margin_is_the_lead_over_the_second(settings: dict[str, Any]) -> None:
    sampler = Sampler(SamplingConfig(**settings))
    token, margin = sampler.choose_with_margin([0, 3], LOGITS)
    assert token == sampler.choose([0, 3], LOGITS)
    others = LOGITS.clone()
    others[token] = -inf
    second, _ = sampler.choose_with_margin([0, 3], others)
    ratio = float((LOGITS[second] - LOGITS[token]).exp())
    if sampler.is_greedy:
        assert margin == pytest.approx(1 - ratio)
    else:
        noise = all_exponentials(12, 2, 3)
        assert margin == pytest.approx(1 - ratio * float(noise[token] / noise[second]), abs=1e-5)


def _reversed_logits(token_ids: Tensor, logits: Tensor) -> Tensor:
    return logits.flip(-1)


class TestProcessors:
    @pytest.mark.parametrize("make", [tuple, list, LogitsProcessorList])
    def test_are_taken_in_any_sequence_and_run_in_its_order(self, make: Any) -> None:
        suppress = SuppressTokensLogitsProcessor([2])
        first_suppressed = SamplingConfig(processors=make([suppress, _reversed_logits]))
        last_suppressed = SamplingConfig(processors=make([_reversed_logits, suppress]))
        assert isinstance(first_suppressed.processors, tuple)
        assert Sampler(first_suppressed).choose([0], LOGITS) == 11 - 7
        assert Sampler(last_suppressed).choose([0], LOGITS) == 11 - 2

    def test_see_the_text_after_the_penalty_and_before_the_temperature(self) -> None:
        seen: list[tuple[list[list[int]], Tensor]] = []

        def spy(token_ids: Tensor, logits: Tensor) -> Tensor:
            seen.append((token_ids.tolist(), logits.clone()))
            return logits

        settings: dict[str, Any] = {"repetition_penalty": 2.0, "temperature": 0.5, "top_k": 3}
        Sampler(SamplingConfig(processors=(spy,), **settings)).choose([1, 2], LOGITS)
        assert seen[0][0] == [[1, 2]]
        torch.testing.assert_close(seen[0][1][0], penalised(LOGITS, [1, 2], 2.0))

    def test_keep_a_greedy_sampler_from_taking_the_argmax_unasked(self) -> None:
        assert Sampler(SamplingConfig()).takes_argmax
        for settings in ({"processors": (_reversed_logits,)}, {"repetition_penalty": 1.1}, SAMPLED):
            assert not Sampler(SamplingConfig(**settings)).takes_argmax  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"])
class TestNoNumbers:
    @pytest.mark.parametrize(
        "logits",
        [[0.5, nan, 2.0], [nan, nan, nan], [0.5, inf, 2.0], [inf, nan, -inf], [-inf, -inf, -inf]],
    )
    def test_are_refused(self, settings: dict[str, Any], logits: list[float]) -> None:
        banned = SuppressTokensLogitsProcessor([0, 1])  # NaN may be among them
        for more in ({}, {"repetition_penalty": 1.5}, {"processors": (banned,)}):
            sampler = Sampler(SamplingConfig(**settings, **more), whose="row: ")  # type: ignore[arg-type]
            with pytest.raises(LogitsError, match=r"^row: the logits are no numbers: "):
                sampler.choose([1], torch.tensor(logits))

    @pytest.mark.parametrize("factor", [-inf, nan])
    def test_of_processors_are_told_by_their_name(
        self, settings: dict[str, Any], factor: float
    ) -> None:
        config = SamplingConfig(processors=(lambda _, logits: logits * factor,), **settings)
        with pytest.raises(LogitsError, match="the logits processors leave no token"):
            Sampler(config).choose([1], torch.tensor([0.5, 1.0]))

    def test_leave_what_processors_leave(self, settings: dict[str, Any]) -> None:
        config = SamplingConfig(processors=(SuppressTokensLogitsProcessor([0, 2]),), **settings)
        assert Sampler(config).choose([1], torch.tensor([0.5, -30.0, 9.0])) == 1


@pytest.mark.parametrize(
    ("stop", "strings"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())]
)
def test_stop_is_a_string_or_several_or_none(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingConfig(stop=stop).stop == strings


def distribution(
    logits: Tensor,
    seen: list[int],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Penalty, temperature, top-k, top-p, min-p, in this order, each over what is left."""
    scaled = penalised(logits, seen, repetition_penalty) / temperature
    probabilities = (scaled - scaled.max()).exp() / (scaled - scaled.max()).exp().sum()
    best_first = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    kept = best_first[:top_k] if top_k else best_first
    mass = sum(float(probabilities[token]) for token in kept)
    nucleus: list[int] = []
    for token in kept:
        if sum(float(probabilities[other]) for other in nucleus) >= top_p * mass:
            break
        nucleus.append(token)
    floor = min_p * probabilities[best_first[0]]
    result = torch.zeros_like(probabilities)
    for token in nucleus:
        if probabilities[token] >= floor:
            result[token] = probabilities[token]
    return result / result.sum()


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-squared test, for how often things occurred; 0 for what can't occur."""
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return 0.0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = int(possible.sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), chi_squared / 2))


def penalised(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """A logit of a token that was seen is divided by the penalty if positive, else multiplied."""
    result = logits.clone()
    for token in set(seen):
        result[token] *= 1 / penalty if result[token] > 0 else penalty
    return result
