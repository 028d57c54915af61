"""Settings: one class each, validated in one place, read by the command line and by keyword."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from river_llm import ConfigError, ExitPolicy
from river_llm.cli.settings_options import ADVANCED, with_settings
from river_llm.config import (
    DraftConfig,
    EngineConfig,
    PolicyConfig,
    PromptConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.settings import Settings

CLASSES = [RiverConfig, EngineConfig, PolicyConfig, SamplingConfig, DraftConfig, PromptConfig]

REFUSED: list[tuple[type[Settings], dict[str, Any], str]] = [
    (RiverConfig, {"bits": 7}, "bits is 7; it must be one of 2, 3, 4, 5, 6, 8"),
    (RiverConfig, {"bits": 4.0}, "bits is 4.0"),
    (RiverConfig, {"bits": "Auto"}, "bits is 'Auto'; it must be one of 2, 3, 4, 5, 6, 8, auto"),
    *(
        (RiverConfig, {"bits": "auto", "average_bits": average}, "a number from 4 to 8")
        for average in (3.99, 8.01, math.nan, "4.5")
    ),
    (RiverConfig, {"average_bits": 4}, "average_bits goes with bits auto, not with 4 bits"),
    (RiverConfig, {"group_size": True}, "group_size is True"),
    (RiverConfig, {"quantizer": "gguf"}, "one of hqq, gptq, rtn"),
    (EngineConfig, {"engine": "tpu"}, "one of auto, cpu, torch"),
    (EngineConfig, {"threads": 0}, "threads is 0; it must be a whole number from 1 to 1024"),
    (EngineConfig, {"threads": 2.5}, "a whole number"),
    (EngineConfig, {"dtype": "int8"}, "one of bfloat16, float16, float32"),
    (EngineConfig, {"kv_bits": 4}, "one of 16, 8"),
    (EngineConfig, {"engine": "cpu", "dtype": "float32"}, "the native engine computes in bfloat16"),
    (EngineConfig, {"engine": "torch", "backbone_bits": 8}, "for the native engine"),
    (PolicyConfig, {"threshold": 1.5}, "a cosine, in [-1, 1]"),
    (PolicyConfig, {"threshold": math.nan}, "threshold is nan"),
    (PolicyConfig, {"threshold": 0.9, "exit_layer": 2}, "exclude each other"),
    (PolicyConfig, {"policy": "never", "threshold": 0.9}, "policy and threshold exclude"),
    (PolicyConfig, {"policy": "fixed"}, "one of never, always"),
    (PolicyConfig, {"first_layer": 2}, "first_layer goes with threshold"),
    (PolicyConfig, {"prefill": "river"}, "prefill goes with a policy"),
    *(
        (PolicyConfig, {"exit_layer": 1, "second_look": look}, "above 0 and at most 1")
        for look in (0, 1.1, math.nan, "a", True)
    ),
    (PolicyConfig, {"second_look": 0.1}, "second_look goes with a policy by which tokens leave"),
    (PolicyConfig, {"policy": "never", "second_look": 0.1}, "second_look goes with a policy by"),
    *(
        (SamplingConfig, {name: value}, f"{name} is {value!r}; it must be ")
        for name, values in {
            "max_new_tokens": [0, "8", 8.0, True, None],
            "temperature": [-0.1, 1e-9, math.inf, math.nan, None, "1"],
            "top_k": [-1, 2.5, None],
            "top_p": [0, 1.01, "1"],
            "min_p": [-0.01, 1.01, None],
            "repetition_penalty": [0.0, math.inf, math.nan, "1"],
            "seed": [1.0, -1, 2**63],
            "stop": [("a", ""), (3,), 3, ("a", None)],
            "processors": [(1,), "ab", 5, None],
        }.items()
        for value in values
    ),
    (DraftConfig, {"tokens": 65}, "from 1 to 64"),
    (DraftConfig, {"lm_head_bits": 2}, "one of 16, 8, 4"),
    (PromptConfig, {"raw": True, "allow_control_tokens": True}, "a raw prompt goes through no"),
    (SamplingConfig, {"temprature": 1}, "there is no setting 'temprature'; there are max"),
]


@pytest.mark.parametrize(("kind", "values", "part"), REFUSED)
def test_what_is_out_of_range_is_one_line(
    kind: type[Settings], values: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.of(values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_setting_says_what_it_means_and_has_a_default_that_holds(
    kind: type[Settings],
) -> None:
    assert all(one.metadata["help"].endswith(".") for one in fields(kind))  # type: ignore[arg-type]
    made = kind()
    assert kind.of(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("values", "policy"),
    [
        ({}, None),
        ({"threshold": 0.5}, ExitPolicy.similarity(0.5)),
        ({"threshold": 0.5, "first_layer": 3}, ExitPolicy.similarity(0.5, 3)),
        ({"exit_layer": 2, "prefill": "river"}, ExitPolicy.fixed(2, prefill="river")),
        ({"policy": "always"}, ExitPolicy.always()),
        ({"policy": "always", "second_look": 0.2}, ExitPolicy.always(second_look=0.2)),
        ({"policy": "never", "prefill": "sequence"}, ExitPolicy.never(prefill="sequence")),
    ],
)
def test_policy_settings_come_to_a_policy(
    values: dict[str, Any], policy: ExitPolicy | None
) -> None:
    assert PolicyConfig(**values).exit_policy() == policy


SHORT = SamplingConfig(max_new_tokens=7)


def command(shown: list[Any]) -> typer.Typer:
    """A program whose only command takes all settings."""
    app = typer.Typer(add_completion=False)

    @app.command()
    @with_settings
    def run(
        word: Annotated[str, typer.Argument()],
        river: RiverConfig,
        engine: EngineConfig,
        policy: PolicyConfig,
        drafts: DraftConfig,
        prompt: PromptConfig,
        sampling: SamplingConfig = SHORT,
    ) -> None:
        shown.extend([word, river, engine, policy, drafts, prompt, sampling])

    return app


class TestOptions:
    def test_are_the_settings(self) -> None:
        shown: list[Any] = []
        options = (
            "x --bits 3 --engine torch --threads 2 --offload 2GiB --exit-layer 4 --draft-tokens 5 "
            '--no-ngram --chat-template-kwargs {"a":1} --stop one --stop two --top-k 9 --no-miss'
        )
        outcome = CliRunner().invoke(command(shown), options.split())
        assert outcome.exit_code == 0, outcome.output
        assert shown == [
            "x",
            RiverConfig(bits=3),
            EngineConfig(engine="torch", threads=2, offload="2GiB", no_miss=True),
            PolicyConfig(exit_layer=4),
            DraftConfig(tokens=5, ngram=False),
            PromptConfig(chat_template_kwargs={"a": 1}),
            SamplingConfig(max_new_tokens=7, top_k=9, stop=("one", "two")),
        ]

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("--bits 7", "--bits is 7; it must be"),
            ("--top-p 0", "--top-p is 0.0; it must be above 0"),
            ("--draft-tokens 0", "--draft-tokens is 0"),
            ("--threshold 0.9 --exit-layer 1", "--threshold and --exit-layer exclude"),
            ("--chat-template-kwargs [1]", "--chat-template-kwargs is no JSON object"),
            ("--chat-template-kwargs {a", "--chat-template-kwargs is no JSON"),
        ],
    )
    def test_that_are_wrong_are_named_as_they_were_given(self, options: str, part: str) -> None:
        outcome = CliRunner().invoke(command([]), ["x", *options.split()])
        assert outcome.exit_code == 2
        assert part in outcome.output

    def test_of_daily_use_stand_before_the_advanced_ones(self) -> None:
        shown = CliRunner().invoke(command([]), ["--help"]).output
        daily, _, advanced = shown.partition(ADVANCED)
        assert "--temperature" in daily
        assert "--kv-bits" in advanced


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)))
def test_a_value_of_any_kind_is_taken_or_refused_in_one_line(value: Any) -> None:
    for kind in CLASSES:
        for one in fields(kind):
            assert "\n" not in refusal(kind, {one.name: value})


def refusal(kind: type[Settings], values: dict[str, Any]) -> str:
    """What is said of settings; empty where they are taken."""
    try:
        kind.of(values)
    except ConfigError as error:
        return str(error)
    return ""
