"""The model that lm-eval's `--model_args` name."""

from __future__ import annotations

from typing import Any

import pytest

from river_llm import ConfigError, ExitPolicy, RiverConfig, RiverLM
from river_llm.config import EngineConfig
from river_llm.measure.lm_eval_arguments import load_model

DEFAULTS = EngineConfig().to_dict()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a model is loaded with: name, river, policy, settings of the engine."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        RiverLM, "from_pretrained", lambda *given, **settings: seen.append((*given, settings))
    )
    return seen


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("smollm2", RiverConfig(), None, DEFAULTS)),
        ({"pretrained": "a", "river": "r"}, ("a", "r", None, DEFAULTS)),
        ({"bits": 8}, ("smollm2", RiverConfig(8), None, DEFAULTS)),
        ({"threshold": 0.97}, ("smollm2", RiverConfig(), ExitPolicy.similarity(0.97), DEFAULTS)),
        ({"policy": "always"}, ("smollm2", RiverConfig(), ExitPolicy.always(), DEFAULTS)),
        (
            {"exit_layer": 3, "kv_bits": 8, "device": None},
            ("smollm2", RiverConfig(), ExitPolicy.fixed(3), {**DEFAULTS, "kv_bits": 8}),
        ),
    ],
)
def test_arguments_are_the_settings(
    given: dict[str, Any], expected: tuple[Any, ...], loaded: list[tuple[Any, ...]]
) -> None:
    load_model(**given)
    assert loaded == [expected]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"tau": 0.9}, "model_args: there is no setting 'tau'; there are bits"),
        ({"threshold": 2}, "model_args: threshold is 2"),
        ({"threshold": 0.9, "exit_layer": 1}, "exclude each other"),
        ({"river": "r", "bits": 8}, "a river brings its own bits"),
    ],
)
def test_what_is_wrong_is_one_line(
    given: dict[str, Any], part: str, loaded: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(**given)
    assert part in str(caught.value)
    assert loaded == []
