"""The model that lm-eval's arguments name, and those of `river-llm eval`; needs no lm-eval."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from command_line import run

from river_llm import ConfigError, ExitPolicy, RiverConfig, RiverLM
from river_llm.cli.eval import with_model
from river_llm.measure.lm_eval_arguments import exit_policy, load_model

POLICIES: list[tuple[dict[str, Any], ExitPolicy]] = [
    ({}, ExitPolicy.similarity(0.9)),
    ({"threshold": 0.97}, ExitPolicy.similarity(0.97)),
    ({"threshold": 1, "first_layer": 3}, ExitPolicy.similarity(1.0, 3)),
    (
        {"policy": "similarity", "prefill": "sequence"},
        ExitPolicy.similarity(0.9, prefill="sequence"),
    ),
    ({"exit_layer": 0}, ExitPolicy.fixed(0)),
    ({"exit_layer": 10, "policy": "fixed"}, ExitPolicy.fixed(10)),
    ({"policy": "never"}, ExitPolicy.never()),
    ({"policy": "always"}, ExitPolicy.always()),
    ({"policy": "always", "prefill": "backbone"}, ExitPolicy.always(prefill="backbone")),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"treshold": 0.9}, "unknown treshold; there are pretrained, mode,"),
    ({"threshold": 0.9, "exit_layer": 3}, "threshold goes with policy=similarity, not fixed"),
    ({"threshold": 0.9, "policy": "never"}, "threshold goes with policy=similarity, not never"),
    ({"exit_layer": 3, "policy": "similarity"}, "exit_layer goes with policy=fixed"),
    ({"first_layer": 3, "exit_layer": 3}, "first_layer goes with policy=similarity, not fixed"),
    ({"policy": "fixed"}, "the exit layer is None"),
    ({"policy": "nowhere"}, "kind is 'nowhere'; choose one of never, always"),
    ({"threshold": "high"}, "the threshold is 'high'"),
    ({"threshold": 1.5}, "a similarity is a cosine"),
    ({"exit_layer": 2.5}, "the exit layer is 2.5"),
    ({"first_layer": 0}, "the first layer is 0"),
    ({"prefill": "half"}, "prefill is 'half'; choose one of"),
    ({"mode": "lossless", "threshold": 0.9}, "mode=lossless has no exit policy; leave out thr"),
    ({"mode": "lossless", "prefill": "river"}, "leave out prefill"),
    ({"river": "r", "bits": 4}, "the river brings its own bits"),
    ({"bits": 7}, "bits is 7"),
    ({"dtype": "auto"}, "dtype is 'auto'; choose one of bfloat16, float16, float32"),
    ({"engine": "gpu"}, "gpu"),
    ({"engine": "torch", "lm_head_bits": 8}, "native engine"),
    ({"kv_bits": 4}, "the KV cache has 4 bits; choose 16"),
]


@pytest.mark.parametrize(("given", "policy"), POLICIES)
def test_the_policy_is_the_one_that_is_named(given: dict[str, Any], policy: ExitPolicy) -> None:
    assert exit_policy(**given) == policy


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_an_argument_that_is_wrong_is_one_line_before_a_model_is_read(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model("/no/such/model", **given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    arguments = RiverLM.from_pretrained

    def from_pretrained(*given: Any, **names: Any) -> None:
        calls.append((given, names))

    from_pretrained.__wrapped__ = arguments  # type: ignore[attr-defined]  # whose signature it has
    monkeypatch.setattr(RiverLM, "from_pretrained", from_pretrained)
    rest = {"device": "cpu", "engine": "cpu", "threads": 3, "kv_bits": 8, "trust_remote_code": True}
    own = {"bits": 3, "group_size": 32, "quantizer": "rtn"}
    load_model("m", threshold=0.5, dtype="float16", **rest, **own)
    load_model(river="r", threads=None)
    load_model(mode="lossless")
    assert calls == [
        (("m", RiverConfig(3, 32, "rtn"), ExitPolicy.similarity(0.5), torch.float16), rest),
        (("smollm2", "r", ExitPolicy.similarity(0.9), torch.bfloat16), {}),
        (("smollm2", RiverConfig(), ExitPolicy.never(), torch.bfloat16), {}),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "run --model river-llm --help"),
        ("--help", "run --model river-llm --help"),
        ("--tasks x", "run --model river-llm --tasks x"),
        ("run --tasks x", "run --model river-llm --tasks x"),
        ("--model hf --tasks x", "--model hf --tasks x"),
        ("run --model=hf", "run --model=hf"),
        ("-C settings.yaml", "-C settings.yaml"),
        ("ls tasks", "ls tasks"),
        ("validate --tasks x", "validate --tasks x"),
    ],
)
def test_the_model_is_ours_where_none_is_named(arguments: str, expected: str) -> None:
    assert with_model(arguments.split()) == expected.split()


def test_the_command_says_where_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    run("eval", "--tasks", "x").check_fails(
        1, "river-llm eval needs lm-eval", "pip install 'river-llm[eval]'"
    )
