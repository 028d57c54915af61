"""Budgets, and what is saved with a river: whole, its own, and taken with its widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from river_llm import ConfigError, ExitPolicy, River, RiverConfig
from river_llm.config import EngineConfig
from river_llm.errors import RiverFileError
from river_llm.river.manifest import TUNED_NAME
from river_llm.river.tuned import QualityBudget, Tuned, chosen_policy

PER_LAYER = ExitPolicy.per_layer((float("inf"), 0.5, 0.75, float("-inf")))
TUNED = Tuned(
    policy=PER_LAYER,
    budget="kld=0.05",
    certified="kld=0.05",
    confidence=0.95,
    sequences=128,
    tokens=64,
    cut_sequences=2,
    loss=0.03,
    held_out_loss=0.0312,
    speed_up=2.25,
    data="notes.txt",
    data_digest="abc",
    seed=0,
    widths={"backbone_bits": 16, "lm_head_bits": 8, "kv_bits": 16},
    engine="cpu",
    run={"cores": 2},
)


@pytest.fixture(scope="module")
def tiny_river() -> River:
    return River.build(tiny_model("Llama"), RiverConfig(group_size=32))


@pytest.fixture
def folder(tiny_river: River, tmp_path: Path) -> Path:
    """A river's, not tuned."""
    tiny_river.save(tmp_path / "river")
    return tmp_path / "river"


@pytest.mark.parametrize(
    ("text", "loss", "largest"),
    [
        ("kld=0.05", 0.05, float("inf")),
        ("kld=0.05000004", 0.05000004, float("inf")),
        ("kld=1", 1, float("inf")),
        ("agreement=0.95", 0.05, 1),
    ],
)
def test_a_budget_is_parsed(text: str, loss: float, largest: float) -> None:
    budget = QualityBudget.parse(text)
    assert budget.loss == pytest.approx(loss)
    assert budget.largest_loss == largest
    assert budget.describe() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.05", "the budget is '0.05'; give kld=0.05, agreement=0.95 or speed=2.0"),
        ("loss=1", "the budget is 'loss=1'"),
        ("kld=little", "the budget is 'kld=little'"),
        ("kld=nan", "the budget is 'kld=nan'"),
        ("kld=0", "the budget is kld=0; kld takes a number of nats above 0"),
        ("kld=inf", "the budget is kld=inf; kld takes"),
        ("agreement=95", "agreement takes a share between 0 and 1, as agreement=0.95"),
        ("agreement=1", "agreement takes a share"),
        ("agreement=1e-17", "agreement takes a share"),  # its loss would be 1
        ("speed=1", "speed takes a ratio above 1"),
        ("speed=inf", "speed takes a ratio above 1"),
    ],
)
def test_a_budget_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QualityBudget.parse(text)


@pytest.mark.parametrize("policy", [PER_LAYER, ExitPolicy.fixed(2), None])
def test_what_was_tuned_is_loaded_as_it_was(folder: Path, policy: ExitPolicy | None) -> None:
    assert Tuned.load(folder) is None
    changed = Tuned(**{**vars_of(TUNED), "policy": policy})
    changed.save(folder)
    assert Tuned.load(folder) == changed
    TUNED.save(folder)  # another one in its place
    assert Tuned.load(folder) == TUNED
    assert {path.name for path in folder.iterdir()} == {
        "river.json",
        "river.safetensors",
        TUNED_NAME,
    }


def vars_of(tuned: Tuned) -> dict[str, Any]:
    return {name: getattr(tuned, name) for name in Tuned.__dataclass_fields__}


def test_a_river_that_is_built_anew_is_not_tuned(folder: Path, tiny_river: River) -> None:
    TUNED.save(folder)
    before = (folder / TUNED_NAME).read_bytes()
    tiny_river.save(folder)
    assert Tuned.load(folder) is None
    River.build(tiny_model("Llama"), RiverConfig(8, 32)).save(folder)
    (folder / TUNED_NAME).write_bytes(before)
    with pytest.raises(RiverFileError, match=r"tuned\.json was made for another river; tune it"):
        Tuned.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "is of format version 7, this release reads 1"),
        ({"policy": {"kind": "sometimes"}}, "is damaged .*kind is 'sometimes'"),
        ({"policy": {"kind": "similarity", "threshold": 3}}, "is damaged .*threshold is 3"),
        ({"policy": 3}, "is damaged"),
        ({"budget": "much"}, "is damaged .*budget is 'much'"),
        ({"widths": {"kv_bits": 16}}, "is damaged"),
        ({"speed_up": "x"}, "is damaged .*speed_up is 'x'"),
        ({"held_out_loss": "x"}, "is damaged .*held_out_loss is 'x'"),
        ({"speed": 3}, "is damaged .*unexpected keyword argument 'speed'"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    TUNED.save(folder)
    path = folder / TUNED_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RiverFileError, match=message) as caught:
        Tuned.load(folder)
    assert "tune it again: river-llm tune MODEL --river DIR" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", "\ud800"])
def test_a_file_that_is_cut_short_is_refused(folder: Path, content: str) -> None:
    (folder / TUNED_NAME).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RiverFileError, match=r"tuned\.json is cut short, or can't be read"):
        Tuned.load(folder)


def test_it_is_saved_with_a_river_alone(tmp_path: Path) -> None:
    with pytest.raises(RiverFileError, match=r"holds no river\.json"):
        TUNED.save(tmp_path)
    assert not list(tmp_path.iterdir())


class TestChosenPolicy:
    def test_it_brings_the_widths_that_it_was_measured_with(self, folder: Path) -> None:
        TUNED.save(folder)
        policy, config = chosen_policy("tuned", folder, EngineConfig(threads=3))
        assert policy == PER_LAYER
        assert config == EngineConfig(threads=3, lm_head_bits=8)
        assert chosen_policy("tuned", str(folder), config) == (policy, config)
        with pytest.raises(ConfigError, match="was tuned with kv_bits 16, not 8: leave kv_bits"):
            chosen_policy("tuned", folder, EngineConfig(kv_bits=8))

    def test_other_policies_are_as_they_are(self, folder: Path) -> None:
        for policy in (None, ExitPolicy.fixed(3)):
            assert chosen_policy(policy, folder, EngineConfig()) == (policy, EngineConfig())

    def test_a_river_that_was_not_tuned_has_none(self, folder: Path) -> None:
        for river in (folder, None, RiverConfig()):
            with pytest.raises(ConfigError, match="there is no tuned policy: it is saved with"):
                chosen_policy("tuned", river, EngineConfig())


def test_it_is_said_in_one_line() -> None:
    assert TUNED.describe() == (
        "threshold per layer, 2.25 times the backbone's speed, for kld=0.05; certified kld=0.05 "
        "with confidence 0.95 on 128 sequences of notes.txt; held out kld=0.0312"
    )
    agreement = {"budget": "agreement=0.9", "certified": "agreement=0.9", "held_out_loss": 0.06}
    assert Tuned(**{**vars_of(TUNED), **agreement}).describe().endswith("held out agreement=0.94")
    nothing = {"policy": None, "certified": None, "held_out_loss": None}
    assert Tuned(**{**vars_of(TUNED), **nothing}).describe() == (
        "never leave: answers are lossless, 2.25 times the backbone's speed, for kld=0.05"
    )
