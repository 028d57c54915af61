"""What lossless mode learns about drafts while it answers, and from run to run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lossless_lm import (
    CONTEXT,
    NUM_LAYERS,
    POOR,
    PROMPTS,
    RANDOM,
    Clock,
    backbone,
    check_answer,
    lossless,
    lossless_batch,
    overflowing_subject,
    statistics_of,
    subject_with,
    subject_with_noise,
)
from tiny_models import VOCABULARY

from river_llm import (
    DraftConfig,
    RiverLM,
)
from river_llm.lossless import LosslessDecoder
from river_llm.lossless.sources import MOST_DRAFTED

WAY = f"exit {NUM_LAYERS} of {VOCABULARY} tokens"  # the name of its drafts


class TestDegenerateRivers:
    """With a clock of its own, so that what adapts to time does the same at every run."""

    @pytest.fixture
    def lm(self, make_lm: Callable[..., RiverLM]) -> RiverLM:
        return make_lm(subject_with(512))

    @pytest.mark.parametrize("tokens", [1, 3, 6])
    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    def test_one_equal_to_the_backbone_accepts_everything(
        self, lm: RiverLM, tokens: int, sampling: dict[str, Any]
    ) -> None:
        rounds = 5
        count = 1 + rounds * (tokens + 1)
        drafts = DraftConfig(tokens, NUM_LAYERS, 16, ngram=False)
        result = lossless(lm, PROMPTS[0], drafts, max_new_tokens=count, **sampling)
        statistics = statistics_of(result)
        assert statistics.verifications == rounds
        assert statistics.drafted_tokens == statistics.accepted_tokens == rounds * tokens
        assert statistics.acceptance_by_position == (1.0,) * tokens
        assert statistics.draft_share == pytest.approx(tokens / (tokens + 1))
        check_answer(result, backbone(lm, PROMPTS[0], max_new_tokens=count, **sampling))

    def test_one_equal_to_the_backbone_comes_to_draft_at_length(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Clock(lm.engine, monkeypatch, drafted_token=0.1)
        drafts = DraftConfig(None, NUM_LAYERS, 16, ngram=False)
        result = lossless(lm, PROMPTS[0], drafts, max_new_tokens=300)
        statistics = statistics_of(result)
        assert statistics.drafted_tokens == statistics.accepted_tokens
        assert len(statistics.acceptance_by_position) == MOST_DRAFTED
        result = lossless(lm, PROMPTS[3], drafts, max_new_tokens=300)  # it is known by now
        assert (statistics_of(result).tokens_per_verification or 0) > 7

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 9}], ids=str)
    @pytest.mark.parametrize("exit_layer", [None, 0])
    def test_one_of_noise_gives_the_backbones_text_and_is_left_alone(
        self,
        make_lm: Callable[..., RiverLM],
        exit_layer: int | None,
        sampling: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        lm = make_lm(subject_with_noise())
        clock = Clock(lm.engine, monkeypatch)
        drafts = DraftConfig(None, exit_layer, ngram=False)
        settings = {"max_new_tokens": 350, **sampling}
        expected = backbone(lm, PROMPTS[0], **settings)
        for most_drafted in (40, 30, 30):  # an answer's credit comes to some 5 tokens of time
            drafts_before, begun_at = clock.drafts, clock.now
            result = lossless(lm, PROMPTS[0], drafts, **settings)
            check_answer(result, expected)
            assert 2 <= clock.drafts - drafts_before <= statistics_of(result).drafted_tokens
            assert statistics_of(result).drafted_tokens <= most_drafted
            assert clock.now - begun_at < 349 * (1 + clock.row) / 0.97

    @pytest.mark.parametrize("sampling", [{}, RANDOM, {"repetition_penalty": 1.3}], ids=str)
    @pytest.mark.parametrize("tokens", [None, 3])
    def test_one_that_overflows_gives_the_backbones_text(
        self, make_lm: Callable[..., RiverLM], tokens: int | None, sampling: dict[str, Any]
    ) -> None:
        lm = make_lm(overflowing_subject())
        expected = backbone(lm, PROMPTS[0], **sampling)
        check_answer(lossless(lm, PROMPTS[0], DraftConfig(tokens), **sampling), expected)

    def test_a_fixed_length_is_drafted_by_noise_too(
        self, make_lm: Callable[..., RiverLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = make_lm(subject_with_noise())
        clock = Clock(lm.engine, monkeypatch)
        for prompt in PROMPTS[:2]:
            expected = backbone(lm, prompt, max_new_tokens=60)
            clock.drafts = 0
            result = lossless(lm, prompt, DraftConfig(2, 0, ngram=False), max_new_tokens=60)
            check_answer(result, expected)
            assert clock.drafts >= statistics_of(result).verifications - 1


class TestLearning:
    def test_goes_on_where_the_run_before_left_off(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        subject_with(CONTEXT).river.save(tmp_path / "river")
        first = make_lm(river_directory=tmp_path / "river")
        for prompt in PROMPTS:
            lossless(first, prompt, DraftConfig())
            lossless(first, prompt, DraftConfig(), **RANDOM)
        second = make_lm(river_directory=tmp_path / "river")
        learnt, again = _learnt(first), _learnt(second)
        assert learnt.keys() == {"greedy", "sampled"}
        for of_kind in (*learnt.values(), *again.values()):
            assert of_kind["costs"].pop("spread")  # another run is less sure
        assert again == learnt
        assert again != _learnt(make_lm())
        for prompt in PROMPTS:
            check_answer(lossless(second, prompt, DraftConfig()), backbone(second, prompt))

    def test_is_of_each_kind_of_answers_alone(self, lm: RiverLM) -> None:
        untouched = _learnt(lm)["greedy"]
        lossless(lm, PROMPTS[0], DraftConfig(), **RANDOM)
        learnt = _learnt(lm)
        assert learnt["greedy"] == untouched
        lossless_batch(lm, PROMPTS, DraftConfig())
        assert _learnt(lm).keys() == {"greedy", "sampled", "greedy, together"}
        assert _learnt(lm)["sampled"] == learnt["sampled"] != untouched
        assert _learnt(lm)["greedy"] == untouched

    @pytest.mark.parametrize("other", [POOR, DraftConfig(ngram=False), DraftConfig(vocabulary=50)])
    def test_of_other_drafts_is_not_taken(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path, other: DraftConfig
    ) -> None:
        lossless(make_lm(river_directory=tmp_path), PROMPTS[0], DraftConfig())
        assert _learnt(make_lm(river_directory=tmp_path), other) == _learnt(make_lm(), other)

    @pytest.mark.parametrize(
        "damage",
        [
            "",
            "{",
            "[]",
            '{"format_version": 2, "entries": {}}',
            '{"format_version": 1, "entries": 5}',
            '{"format_version": 1, "entries": {"KEY": 5}}',
            '{"format_version": 1, "entries": {"KEY": {}}}',
            '{"format_version": 1, "entries": {"KEY": {"greedy": "fast"}}}',
            '{"format_version": 1, "entries": {"KEY": {"greedy": {"speed_up": "fast"}}}}',
            '{"format_version": 1, "entries": {"KEY": {"greedy": {"speed_up": 1, "river": []}}}}',
        ],
    )
    def test_out_of_a_damaged_file_begins_anew(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path, damage: str
    ) -> None:
        key = _decoder(make_lm()).key
        (tmp_path / "drafts.json").write_text(damage.replace("KEY", key))
        lm = make_lm(river_directory=tmp_path)
        assert _learnt(lm)["greedy"] == _learnt(make_lm())["greedy"]
        check_answer(lossless(lm, PROMPTS[0], DraftConfig()), backbone(lm, PROMPTS[0]))
        assert _learnt(make_lm(river_directory=tmp_path)) != _learnt(make_lm())

    def test_of_one_kind_that_is_damaged_leaves_the_other(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        first = make_lm(river_directory=tmp_path)
        lossless(first, PROMPTS[0], DraftConfig())
        lossless(first, PROMPTS[0], DraftConfig(), **RANDOM)
        kept = json.loads((tmp_path / "drafts.json").read_text())
        kept["entries"][_decoder(first).key]["greedy"]["ngrams"] = None
        (tmp_path / "drafts.json").write_text(json.dumps(kept))
        again = _learnt(make_lm(river_directory=tmp_path))
        assert again["greedy"] == _learnt(make_lm())["greedy"]
        assert again["sampled"]["river"] == _learnt(first)["sampled"]["river"]

    @pytest.mark.parametrize("make_lm", ["cpu"], indirect=True)
    @pytest.mark.parametrize(
        "damage",
        [None, "x", [], {}, -1, -1.5, 19.5, 10**400, math.inf, -math.inf, math.nan],
        ids=lambda damage: repr(damage)[:6],
    )
    @pytest.mark.parametrize(
        "path",
        [
            "speed_up",
            "costs",
            "costs/mean",
            "costs/mean/2",
            "costs/mean/10",
            "costs/spread/10",
            "ngrams",
            "ngrams/tried",
            "ngrams/accepted/3",
            "river",
            f"river/{WAY}",
            f"river/{WAY}/drafts",
            f"river/{WAY}/mean_accepted",
            f"river/{WAY}/mean_cost",
            f"river/{WAY}/tried/4",
        ],
    )
    def test_of_damaged_numbers_does_no_harm(
        self,
        make_lm: Callable[..., RiverLM],
        tmp_path: Path,
        path: str,
        damage: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What is learnt stays numbers, and drafts that are accepted come to be made again."""
        drafts = DraftConfig(exit_layer=NUM_LAYERS, lm_head_bits=16, ngram=False)
        first = make_lm(river_directory=tmp_path)
        Clock(first.engine, monkeypatch, drafted_token=0.1)
        expected = backbone(first, PROMPTS[0])
        check_answer(lossless(first, PROMPTS[0], drafts), expected)
        kept = json.loads((tmp_path / "drafts.json").read_text())
        place = kept["entries"][_decoder(first, drafts).key]["greedy"]
        *parts, last = path.split("/")
        for part in parts:
            place = place[int(part) if isinstance(place, list) else part]
        assert (int(last) < len(place)) if isinstance(place, list) else last in place
        place[int(last) if isinstance(place, list) else last] = damage
        (tmp_path / "drafts.json").write_text(json.dumps(kept))
        lm = make_lm(river_directory=tmp_path)
        Clock(lm.engine, monkeypatch, drafted_token=0.1)
        for _ in range(3):
            result = lossless(lm, PROMPTS[0], drafts)
            check_answer(result, expected)
        assert statistics_of(result).accepted_tokens > 30
        assert _are_finite(json.loads((tmp_path / "drafts.json").read_text()))

    def test_in_a_folder_that_is_gone_is_no_error(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        lm = make_lm(river_directory=tmp_path / "nowhere")
        check_answer(lossless(lm, PROMPTS[0], DraftConfig()), backbone(lm, PROMPTS[0]))
        assert not (tmp_path / "nowhere").exists()


def _decoder(lm: RiverLM, drafts: DraftConfig | None = None) -> LosslessDecoder:
    decoder = lm._decoder("lossless", drafts or DraftConfig())
    assert decoder is not None
    return decoder


def _learnt(lm: RiverLM, drafts: DraftConfig | None = None) -> dict[str, Any]:
    """By kind of answers."""
    return _decoder(lm, drafts).learnt()


def _are_finite(values: Any) -> bool:
    """Whether all numbers in JSON values are."""
    if isinstance(values, dict):
        return all(map(_are_finite, values.values()))
    if isinstance(values, list):
        return all(map(_are_finite, values))
    return not isinstance(values, float) or math.isfinite(values)
