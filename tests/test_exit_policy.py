"""Exit policies: the thresholds each comes down to, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy, check_is_policy

INF, NAN = math.inf, math.nan


@given(layers=st.integers(1, 40), threshold=st.floats(-1, 1), data=st.data())
def test_every_policy_is_one_threshold_for_each_number_of_layers_run(
    layers: int, threshold: float, data: st.DataObject
) -> None:
    exit_layer = data.draw(st.integers(0, layers))
    first_layer = data.draw(st.integers(1, layers))
    own = (data.draw(st.sampled_from([INF, -INF])), *[threshold] * (layers - 1))
    expected: dict[ExitPolicy, tuple[float, ...]] = {
        ExitPolicy(): (INF,) * layers,
        ExitPolicy.never(): (INF,) * layers,
        ExitPolicy.always(): (-INF,) * layers,
        ExitPolicy.fixed(exit_layer): (INF,) * exit_layer + (-INF,) * (layers - exit_layer),
        ExitPolicy.similarity(threshold, first_layer): (INF,) * first_layer
        + (threshold,) * (layers - first_layer),
        ExitPolicy.per_layer(own): own,
    }
    for policy, thresholds in expected.items():
        assert policy.thresholds(layers) == thresholds
        rule = policy.prefill
        assert rule == ("river" if policy.kind == "always" else "backbone")
        assert policy.prefill_thresholds(layers) == (-INF if rule == "river" else INF,) * layers
    for kind in ("sequence", "token"):
        policy = ExitPolicy.similarity(threshold, prefill=kind)
        assert policy.prefill_thresholds(layers) == policy.thresholds(layers)


def test_per_layer_turns_numbers_into_floats() -> None:
    thresholds = ExitPolicy.per_layer((INF, 1)).layer_thresholds
    assert thresholds == (INF, 1.0)
    assert all(isinstance(value, float) for value in thresholds or ())


@pytest.mark.parametrize(
    ("policy", "alike"),
    [
        (ExitPolicy.never(), True),
        (ExitPolicy.always(), True),
        (ExitPolicy.always(prefill="backbone"), False),
        (ExitPolicy.fixed(2), False),
        (ExitPolicy.fixed(4), True),
        (ExitPolicy.fixed(2, prefill="sequence"), True),
        (ExitPolicy.fixed(2, prefill="token"), True),
        (ExitPolicy.similarity(0.5), False),
        (ExitPolicy.similarity(0.5, prefill="sequence"), False),
        (ExitPolicy.similarity(0.5, prefill="token"), True),
        (ExitPolicy.similarity(0.5, prefill="token", second_look=0.1), False),
    ],
)
def test_which_treat_prompt_and_answer_alike(policy: ExitPolicy, alike: bool) -> None:
    assert policy.treats_alike(4) is alike


NO_COSINE = r"the threshold is .*; .* choose one in \[-1, 1\]"
NO_COUNT = "exit layer is .*; it must be a whole number, 0 or more"
NO_LAYER = "first layer is .*; give a whole number, layers count from 1"
NO_THRESHOLDS = "one threshold per layer, and none that is NaN"


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (ExitPolicy.similarity, [-1.0001, 50, INF, -INF, NAN, None, "a", True], NO_COSINE),
        (ExitPolicy.fixed, [-1, None, "3", 1.5, 2.0, True], NO_COUNT),
        (lambda v: ExitPolicy.similarity(0.9, v), [0, -1, 1.5, "2", None, True], NO_LAYER),
        (ExitPolicy.per_layer, [(), (INF, NAN), (NAN,)], NO_THRESHOLDS),
        (ExitPolicy.per_layer, [(0.9,), (-1, 0.9)], "the first threshold is .* take inf"),
        (ExitPolicy.per_layer, [None, 3, ("a",), [None]], "give one number for each number of"),
        (lambda v: ExitPolicy.never(prefill=v), ["all"], "prefill is 'all'; choose one of backbo"),
        (lambda v: ExitPolicy.never(batch=v), ["mean"], "batch is 'mean'; choose one of sequence"),
        (
            lambda v: ExitPolicy.always(second_look=v),
            [0, -0.1, 1.01, NAN, INF, "a", True],
            "second_look is .*; it is a margin, so choose one above 0 and at most 1",
        ),
        (lambda v: ExitPolicy.never(second_look=v), [0.5], "a second look is at tokens that left"),
        (ExitPolicy, ["sometimes"], "kind is 'sometimes'; choose one of never, always, fixed"),
        (check_is_policy, [None, "never", 0.9], "exit policy is .*; give an ExitPolicy, such as"),
    ],
)
def test_what_makes_no_policy_is_refused(make: Any, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=message) as caught:
            make(value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExitPolicy.fixed(5), r"exit layer is 5, but the model has 4 layers; choose .* \[0, 4\]"),
        (ExitPolicy.similarity(0.9, 5), "first layer is 5, but the model has 4 layers"),
        (ExitPolicy.per_layer((INF,) * 3), "3 thresholds for a model of 4 layers; .* 0 to 3"),
        (ExitPolicy.per_layer((INF,) * 5), "5 thresholds for a model of 4 layers"),
    ],
)
def test_a_policy_of_another_model_is_refused(policy: ExitPolicy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy.thresholds(4)


POLICIES = {
    "never leaves": ExitPolicy.never(batch="minimum"),
    "leaves at once": ExitPolicy.always(),
    "exit after 7": ExitPolicy.fixed(7, prefill="river"),
    "similarity > 0.97": ExitPolicy.similarity(0.97),
    "similarity > -1 from layer 3": ExitPolicy.similarity(-1.0, 3, prefill="sequence"),
    "exit after 7, second look 0.25": ExitPolicy.fixed(7, second_look=0.25),
    "threshold per layer": ExitPolicy.per_layer((INF, 0.25, -INF), batch="minimum"),
}


@pytest.mark.parametrize(("words", "policy"), POLICIES.items())
def test_a_policy_is_described_in_words_and_survives_json(words: str, policy: ExitPolicy) -> None:
    assert policy.describe() == words
    fields = json.loads(json.dumps(policy.to_dict(), allow_nan=False))
    assert None not in fields.values()
    assert ExitPolicy.of(fields) == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sometimes"}, "kind is 'sometimes'"),
        ({"kind": "thresholds", "layer_thresholds": ["wide"]}, "the thresholds are"),
        ({"kind": "never", "depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_fields_of_no_policy_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExitPolicy.of(fields)
