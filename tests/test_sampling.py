from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from river_llm.sampling import Sampler, SamplingConfig
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from river_llm import ConfigError

DRAWS = 20_000
LOGITS = torch.tensor([1.3, -0.2, 2.1, 0.4, -1.8, 1.9, 0.0, 2.05, -1.1, 0.7, 1.5, -0.6])


def _reversed_logits(token_ids: Tensor, logits: Tensor) -> Tensor:
    """The last token is as likely as the first was."""
    return logits.flip(-1)


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
    sampler = Sampler(SamplingConfig(seed=3, **settings))
    seen = [2, 4, 4, 7]
    draws = torch.tensor([sampler.choose(seen, LOGITS, place) for place in range(DRAWS)])
    counts = torch.bincount(draws, minlength=len(LOGITS)).double()
    expected = DRAWS * distribution(LOGITS.double(), seen, **settings)
    assert expected[expected > 0].min() >= 5
    assert p_value(counts, expected) > 0.001


def test_a_row_of_a_batch_draws_as_a_prompt_alone_with_the_next_seed() -> None:
    def draws(seed: int, row: int) -> list[int]:
        sampler = Sampler(SamplingConfig(seed=seed, temperature=1.0), row)
        return [sampler.choose([0], LOGITS, place) for place in range(30)]

    assert draws(7, row=2) == draws(9, row=0)
    assert draws(7, row=0) != draws(7, row=1)


def test_a_token_of_no_weight_is_never_taken() -> None:
    """Over a vocabulary of usual size, whose 49,151 other tokens together weigh 2e-13."""
    logits = torch.full((49152,), -40.0)
    logits[7] = 0
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0))
    for place in range(1500):
        assert sampler.choose([0], logits, place) == 7
        sampler.settle(place + 1)


@given(logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20, unique=True))
def test_greedy_takes_the_likeliest_whatever_the_other_settings(logits: list[float]) -> None:
    config = SamplingConfig(temperature=0, top_k=3, top_p=0.4, min_p=0.1, seed=1)
    assert Sampler(config).choose([0], torch.tensor(logits), 0) == logits.index(max(logits))


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12, unique=True),
    seen=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    penalty=st.floats(0.25, 4),
)
def test_greedy_takes_the_likeliest_after_the_penalty(
    logits: list[float], seen: list[int], penalty: float
) -> None:
    config = SamplingConfig(repetition_penalty=penalty)
    penalised = _penalised(torch.tensor(logits), seen, penalty)
    chosen = Sampler(config).choose(seen, torch.tensor(logits), 0)
    assert penalised[chosen] == pytest.approx(float(penalised.max()), rel=1e-6)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_filters_leave_the_likeliest(settings: dict[str, Any]) -> None:
    sampler = Sampler(SamplingConfig(temperature=5.0, **settings))
    assert {sampler.choose([0], LOGITS, place) for place in range(50)} == {2}


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    sampler = Sampler(SamplingConfig(temperature=50.0, top_k=1000, seed=0))
    assert {sampler.choose([0], LOGITS, place) for place in range(300)} == set(range(len(LOGITS)))


class TestPartOfTheVocabulary:
    """Drafts may have the logits of the first tokens alone."""

    @pytest.mark.parametrize(
        "sampling",
        [
            {},
            {"repetition_penalty": 1.5},
            {"temperature": 1.0},
            {"temperature": 1.0, "repetition_penalty": 0.6},
            {"temperature": 2.0, "top_k": 3},
            {"temperature": 2.0, "top_p": 0.8},
            {"temperature": 2.0, "min_p": 0.2},
            {"temperature": 2.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "processors",
        [
            (),
            (SuppressTokensLogitsProcessor([2, 7]),),
            (NoRepeatNGramLogitsProcessor(2),),
            (_reversed_logits,),
        ],
        ids=["none", "suppressed", "no repeats", "reversed"],
    )
    @settings(max_examples=25)
    @given(
        logits=st.lists(st.floats(-9, 9, width=16), min_size=12, max_size=12, unique=True),
        seen=st.lists(st.integers(0, 11), min_size=2, max_size=20),
        part=st.integers(2, 12),
        place=st.integers(1, 4),
    )
    def test_decides_as_if_the_others_were_out_of_the_question(
        self,
        sampling: dict[str, Any],
        processors: tuple[Any, ...],
        logits: list[float],
        seen: list[int],
        part: int,
        place: int,
    ) -> None:
        config = SamplingConfig(seed=4, processors=processors, **sampling)
        sampler, other = Sampler(config), Sampler(config)
        first = torch.tensor(logits)
        assert sampler.choose(seen, first, 0) == other.choose(seen, first, 0)
        whole = first.clone()
        whole[part:] = -math.inf
        token, margin = sampler.choose_with_margin(seen, first[:part], place)
        expected, expected_margin = other.choose_with_margin(seen, whole, place)
        if not math.isfinite(expected_margin):
            return  # nothing is left to choose from
        assert token == expected
        assert margin == pytest.approx(expected_margin, abs=1e-5)

    @given(parts=st.lists(st.integers(2, 12), min_size=12, max_size=12), settled=st.integers(0, 3))
    def test_leaves_the_random_numbers_as_they_are(self, parts: list[int], settled: int) -> None:
        config = SamplingConfig(temperature=1.5, seed=9)
        sampler, untouched = Sampler(config), Sampler(config)
        expected = [untouched.choose([0], LOGITS, place) for place in range(16)]
        assert [sampler.choose([0], LOGITS, place) for place in range(3)] == expected[:3]
        sampler.settle(settled)
        for place, part in enumerate(parts, 3):  # of a draft, farther on than was chosen
            sampler.choose_with_margin([0], LOGITS[:part], place)
        chosen = [sampler.choose([0], LOGITS, place) for place in range(settled, 16)]
        assert chosen == expected[settled:]

    def test_chooses_what_all_would_choose_where_that_is_in_it(self) -> None:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=2))
        in_part = 0
        for place in range(200):
            token = sampler.choose([0], LOGITS, place)
            drafted, _ = sampler.choose_with_margin([0], LOGITS[:8], place)
            assert drafted < 8
            if token < 8:
                assert drafted == token
                in_part += 1
            sampler.settle(place + 1)
        assert 50 < in_part < 200


class TestProcessors:
    def test_come_before_the_choice(self) -> None:
        assert Sampler(SamplingConfig()).choose([0], LOGITS, 0) == 2
        suppressed = SamplingConfig(processors=(SuppressTokensLogitsProcessor([2, 7]),))
        assert Sampler(suppressed).choose([0], LOGITS, 0) == 5

    @pytest.mark.parametrize("make", [tuple, list, LogitsProcessorList])
    def test_are_taken_in_any_sequence_and_run_in_its_order(self, make: Any) -> None:
        suppress = SuppressTokensLogitsProcessor([2])
        first_suppressed = SamplingConfig(processors=make([suppress, _reversed_logits]))
        last_suppressed = SamplingConfig(processors=make([_reversed_logits, suppress]))
        assert isinstance(first_suppressed.processors, tuple)
        assert Sampler(first_suppressed).choose([0], LOGITS, 0) == 11 - 7
        assert Sampler(last_suppressed).choose([0], LOGITS, 0) == 11 - 2

    def test_see_the_text_and_all_logits(self) -> None:
        seen: list[tuple[list[list[int]], torch.Size]] = []

        def spy(token_ids: Tensor, logits: Tensor) -> Tensor:
            seen.append((token_ids.tolist(), logits.shape))
            return logits

        sampler = Sampler(SamplingConfig(processors=(spy,)))
        sampler.choose([3, 4], LOGITS, 0)
        sampler.choose_with_margin([3, 4, 11], LOGITS[:5], 1)
        assert seen == [([[3, 4]], (1, 12)), ([[3, 4, 11]], (1, 12))]

    def test_follow_the_penalty_and_precede_the_temperature(self) -> None:
        seen: list[Tensor] = []

        def spy(token_ids: Tensor, logits: Tensor) -> Tensor:
            seen.append(logits.clone())
            return logits

        settings: dict[str, Any] = {"repetition_penalty": 2.0, "temperature": 0.5, "top_k": 3}
        Sampler(SamplingConfig(processors=(spy,), **settings)).choose([1, 2], LOGITS, 0)
        torch.testing.assert_close(seen[0][0], _penalised(LOGITS, [1, 2], 2.0))

    def test_keep_a_greedy_sampler_from_taking_the_best_token_unasked(self) -> None:
        assert Sampler(SamplingConfig()).takes_best_token
        assert not Sampler(SamplingConfig(processors=(_reversed_logits,))).takes_best_token

    @pytest.mark.parametrize("bad", [(5,), ("x",), [None], "ab", [_reversed_logits, 3]])
    def test_that_are_no_functions_are_refused(self, bad: Any) -> None:
        wanted = r"^processors is .*; it must be functions of \(token ids, logits\)$"
        with pytest.raises(ConfigError, match=wanted):
            SamplingConfig(processors=bad)

    @pytest.mark.parametrize("bad", [5, None, _reversed_logits, SuppressTokensLogitsProcessor([1])])
    def test_that_are_no_sequence_are_refused(self, bad: Any) -> None:
        with pytest.raises(ConfigError, match="processors"):
            SamplingConfig(processors=bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("stop", ("a", "")),
        ("max_new_tokens", "8"),
        ("max_new_tokens", 8.0),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("temperature", None),
        ("temperature", "1"),
        ("top_k", 2.5),
        ("top_k", None),
        ("top_p", "1"),
        ("min_p", None),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", "1"),
        ("seed", 1.0),
        ("stop", [3]),
        ("stop", 3),
        ("stop", ("a", None)),
    ],
)
def test_refuses_values_out_of_range_and_of_other_types(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*; it must be "):
        SamplingConfig(**{name: value})


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
    scaled = _penalised(logits, seen, repetition_penalty) / temperature
    probabilities = scaled.exp() / scaled.exp().sum()
    likeliest_first = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    kept = likeliest_first[:top_k] if top_k else likeliest_first
    mass = sum(float(probabilities[token]) for token in kept)
    nucleus: list[int] = []
    for token in kept:
        if sum(float(probabilities[other]) for other in nucleus) >= top_p * mass:
            break
        nucleus.append(token)
    floor = min_p * probabilities[likeliest_first[0]]
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


def _penalised(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """A logit of a token that was seen is divided by the penalty if positive, else multiplied."""
    result = logits.clone()
    for token in set(seen):
        result[token] *= 1 / penalty if result[token] > 0 else penalty
    return result
