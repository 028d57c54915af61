"""What lm-eval's arguments come to; needs no lm-eval."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from command_line import run

from river_llm import ConfigError, ExitPolicy, RiverConfig, RiverLM
from river_llm.config import SamplingConfig
from river_llm.evaluation import lm_eval_arguments
from river_llm.evaluation.lm_eval_arguments import ModelArguments, sampling_config

POLICIES: list[tuple[dict[str, Any], ExitPolicy]] = [
    ({}, ExitPolicy.similarity(0.9)),
    ({"threshold": "0.97"}, ExitPolicy.similarity(0.97)),
    ({"threshold": 1, "first_layer": 3}, ExitPolicy.similarity(1.0, 3)),
    (
        {"policy": "similarity", "prefill": "sequence"},
        ExitPolicy.similarity(0.9, prefill="sequence"),
    ),
    ({"exit_layer": 0}, ExitPolicy.fixed(0)),
    ({"exit_layer": 10.0, "policy": "fixed"}, ExitPolicy.fixed(10)),
    ({"policy": "never"}, ExitPolicy.never()),
    ({"policy": "always"}, ExitPolicy.always()),
    ({"policy": "always", "prefill": "backbone"}, ExitPolicy.always(prefill="backbone")),
    ({"mode": "lossless"}, ExitPolicy.never()),
    ({"mode": "lossless", "threshold": None, "policy": "none"}, ExitPolicy.never()),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"treshold": 0.9}, "unknown treshold; there are pretrained, river,"),
    ({"threshold": 0.9, "exit_layer": 3}, "threshold or exit_layer, not both"),
    ({"threshold": 0.9, "policy": "never"}, "threshold goes with policy=similarity, not never"),
    ({"exit_layer": 3, "policy": "similarity"}, "exit_layer goes with policy=fixed"),
    ({"first_layer": 3, "exit_layer": 3}, "first_layer goes with threshold"),
    ({"policy": "fixed"}, "policy=fixed needs exit_layer=N"),
    ({"policy": "thresholds"}, "policy is 'thresholds'; choose one of never, always"),
    ({"mode": "lossless", "threshold": 0.9}, "mode=lossless has no exit policy; leave out thr"),
    ({"mode": "lossless", "prefill": "river"}, "leave out prefill"),
    ({"mode": "exact"}, "mode is 'exact'; choose one of river, lossless"),
    ({"river": "r", "bits": 4}, "the river brings its own bits"),
    ({"dtype": "auto"}, "dtype is 'auto'; choose one of bfloat16, float16, float32"),
    ({"threshold": "high"}, "threshold is 'high'; give a number"),
    ({"exit_layer": 2.5}, "exit_layer is 2.5; give a whole number"),
    ({"exit_layer": True}, "exit_layer is True; give a number"),
    ({"exit_layer": float("inf")}, "exit_layer is inf; give a whole number"),
    ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
    ({"max_length": -1}, "max_length is -1; give 1 or more"),
    ({"first_layer": 0}, "first_layer is 0; give 1 or more"),
    ({"trust_remote_code": 2}, "trust_remote_code is 2; give true or false"),
    ({"chat_template_kwargs": "[1]"}, "; give a JSON object"),
    ({"chat_template_kwargs": "{"}, "; give a JSON object"),
]

SAMPLING: list[tuple[dict[str, Any], SamplingConfig]] = [
    ({}, SamplingConfig(max_new_tokens=256)),
    ({"until": "\n"}, SamplingConfig(stop="\n")),
    ({"until": ["a", "", None, "b"]}, SamplingConfig(stop=("a", "b"))),
    ({"until": None, "max_gen_toks": 5}, SamplingConfig(max_new_tokens=5)),
    ({"max_new_tokens": "5"}, SamplingConfig(max_new_tokens=5)),
    ({"max_tokens": 5, "max_gen_toks": 6}, SamplingConfig(max_new_tokens=6)),
    ({"temperature": 0.7}, SamplingConfig(temperature=0.7)),
    ({"do_sample": False, "temperature": 0.7}, SamplingConfig()),
    ({"do_sample": True}, SamplingConfig(temperature=1.0)),
    ({"do_sample": True, "temperature": 0.0}, SamplingConfig()),
    (
        {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 5, "seed": 3},
        SamplingConfig(temperature=0.2, top_p=0.95, top_k=5, seed=3),
    ),
    ({"num_beams": 1, "use_cache": True}, SamplingConfig()),
]


@pytest.mark.parametrize(("given", "policy"), POLICIES)
def test_the_policy_is_the_one_that_is_named(given: dict[str, Any], policy: ExitPolicy) -> None:
    assert ModelArguments.parse(given).exit_policy() == policy


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_an_argument_that_is_wrong_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelArguments.parse(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 1.5}, "a similarity is a cosine"),
        ({"prefill": "half"}, "prefill is 'half'; choose one of"),
        ({"bits": 7}, "bits is 7"),
        ({"engine": "gpu"}, "gpu"),
        ({"device": "abacus"}, "there is no device 'abacus' here"),
        ({"engine": "torch", "lm_head_bits": 8}, "native engine"),
        ({"kv_bits": "4"}, "the KV cache has 4 bits; choose 16"),
    ],
)
def test_a_value_out_of_its_range_is_refused_before_a_model_is_read(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelArguments.parse({"pretrained": "/no/such/model", **given}).load()


def test_everything_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(RiverLM, "from_pretrained", lambda *a, **b: calls.append((a, b)))
    monkeypatch.setattr(lm_eval_arguments.torch, "set_num_threads", lambda _: None)
    arguments = {"pretrained": "m", "threshold": 0.5, "dtype": "float16", "device": "cpu"}
    rest = {"engine": "cpu", "threads": 3, "backbone_bits": 8, "lm_head_bits": 8, "kv_bits": 8}
    own = {"bits": 3, "group_size": 32, "quantizer": "rtn"}
    ModelArguments.parse({**arguments, **rest, **own, "trust_remote_code": "True"}).load()
    ModelArguments.parse({"river": 7}).load()
    (first, names), (second, _) = calls
    assert first == ("m", RiverConfig(3, 32, "rtn"), ExitPolicy.similarity(0.5), torch.float16)
    assert names == {
        **rest,
        "device": torch.device("cpu"),
        "trust_remote_code": True,
    }
    assert second == ("smollm2", "7", ExitPolicy.similarity(0.9), torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "rows"), [({}, 1), ({"batch_size": "4"}, 4), ({"batch_size": "auto:2"}, 8)]
)
def test_the_batch_size_may_be_left_to_the_program(given: dict[str, Any], rows: int) -> None:
    assert ModelArguments.parse(given).rows == rows


@pytest.mark.parametrize(("settings", "expected"), SAMPLING)
def test_answers_are_generated_as_the_task_says(
    settings: dict[str, Any], expected: SamplingConfig
) -> None:
    before = dict(settings)
    assert sampling_config(settings) == expected
    assert settings == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported; there are until, max_gen_toks"),
        ({"max_gen_toks": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 1.5}, "top_k is 1.5; give a whole number"),
        ({"top_p": 2}, "top_p is 2"),
        ({"temperature": "warm"}, "temperature is 'warm'; give a number"),
    ],
)
def test_a_setting_that_is_wrong_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_config(settings)


def test_the_command_says_where_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    run("lm-eval", "--tasks", "x").check_fails(
        1, "river-llm lm-eval needs the package lm-eval", "pip install 'river-llm[eval]'"
    )
