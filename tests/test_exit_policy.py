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

cosines = st.floats(-1, 1)
layer_counts = st.integers(1, 40)


def test_never_stays_at_every_layer() -> None:
    assert ExitPolicy.never().thresholds(3) == (INF, INF, INF)
    assert ExitPolicy() == ExitPolicy.never()


def test_always_leaves_before_the_first_layer() -> None:
    assert ExitPolicy.always().thresholds(3) == (-INF, -INF, -INF)


@pytest.mark.parametrize(
    ("exit_layer", "thresholds"),
    [
        (0, (-INF, -INF, -INF, -INF)),
        (1, (INF, -INF, -INF, -INF)),
        (3, (INF, INF, INF, -INF)),
        (4, (INF, INF, INF, INF)),
    ],
)
def test_fixed_leaves_after_its_exit_layer(exit_layer: int, thresholds: tuple[float, ...]) -> None:
    assert ExitPolicy.fixed(exit_layer).thresholds(4) == thresholds


@pytest.mark.parametrize(
    ("first_layer", "thresholds"),
    [
        (1, (INF, 0.7, 0.7, 0.7)),
        (2, (INF, INF, 0.7, 0.7)),
        (3, (INF, INF, INF, 0.7)),
        (4, (INF, INF, INF, INF)),
    ],
)
def test_similarity_counts_from_its_first_layer(
    first_layer: int, thresholds: tuple[float, ...]
) -> None:
    assert ExitPolicy.similarity(0.7, first_layer).thresholds(4) == thresholds


@given(layers=layer_counts, threshold=cosines, data=st.data())
def test_similarity_is_one_threshold_between_infinities(
    layers: int, threshold: float, data: st.DataObject
) -> None:
    first_layer = data.draw(st.integers(1, layers))
    thresholds = ExitPolicy.similarity(threshold, first_layer).thresholds(layers)
    for layers_run, value in enumerate(thresholds):
        assert value == (threshold if layers_run >= first_layer else INF)
    assert len(thresholds) == layers


@given(st.sampled_from([INF, -INF]), st.lists(st.floats(allow_nan=False), max_size=40))
def test_per_layer_thresholds_are_taken_as_given(first: float, others: list[float]) -> None:
    values = (first, *others)
    assert ExitPolicy.per_layer(values).thresholds(len(values)) == values


def test_per_layer_turns_numbers_into_floats() -> None:
    policy = ExitPolicy.per_layer((INF, 1))
    assert policy.layer_thresholds == (INF, 1.0)
    assert all(isinstance(value, float) for value in policy.layer_thresholds or ())


@pytest.mark.parametrize("threshold", [-1, -1.0, 0, 0.98, 1, 1.0])
def test_thresholds_at_the_bounds_are_taken(threshold: float) -> None:
    assert ExitPolicy.similarity(threshold).thresholds(2) == (INF, threshold)


@pytest.mark.parametrize("threshold", [-1.0001, 1.0001, 50, INF, -INF, NAN, None, "a", True])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: Any) -> None:
    with pytest.raises(ConfigError, match=r"the threshold is .*; .* choose one in \[-1, 1\]"):
        ExitPolicy.similarity(threshold)


@pytest.mark.parametrize("exit_layer", [-1, -30, None, "3", 1.5, 2.0, True])
def test_an_exit_layer_that_is_no_count_is_refused(exit_layer: Any) -> None:
    wanted = f"exit layer is {exit_layer!r}; it must be a whole number, 0 or more"
    with pytest.raises(ConfigError, match=wanted):
        ExitPolicy.fixed(exit_layer)


@pytest.mark.parametrize("first_layer", [0, -1, 1.5, "2", None, True])
def test_a_first_layer_that_is_none_is_refused(first_layer: Any) -> None:
    wanted = f"first layer is {first_layer!r}; give a whole number, layers count from 1"
    with pytest.raises(ConfigError, match=wanted):
        ExitPolicy.similarity(0.9, first_layer)


@pytest.mark.parametrize("thresholds", [(), (INF, NAN), (NAN,)])
def test_no_threshold_and_nan_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one threshold per layer, and none that is NaN"):
        ExitPolicy.per_layer(thresholds)


@pytest.mark.parametrize("thresholds", [0.5, None, "ab", [INF, "a"], [INF, None]])
def test_thresholds_that_are_no_numbers_are_refused(thresholds: Any) -> None:
    with pytest.raises(ConfigError, match=r"thresholds are .*; give one number for each"):
        ExitPolicy.per_layer(thresholds)


@pytest.mark.parametrize("first", [0.5, -1.0, 0.0, 7.0])
def test_a_finite_threshold_before_the_first_layer_is_refused(first: float) -> None:
    with pytest.raises(ConfigError, match=f"first threshold is {first}, .*; take inf .* or -inf"):
        ExitPolicy.per_layer((first, 0.5))


@pytest.mark.parametrize("policy", ["never", None, 0.9, ExitPolicy])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy is .*; give an ExitPolicy, such as ExitPolicy"):
        check_is_policy(policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExitPolicy.fixed(5), r"exit layer is 5, but the model has 4 layers; choose one in \[0, 4"),
        (ExitPolicy.similarity(0.9, 5), "first layer is 5, but the model has 4 layers"),
        (
            ExitPolicy.per_layer((INF, 0.5, 0.5)),
            "3 thresholds for a model of 4 layers; .*, 0 to 3$",
        ),
        (ExitPolicy.per_layer((INF,) * 5), "5 thresholds for a model of 4 layers; .*, 0 to 3$"),
    ],
)
def test_a_policy_for_another_depth_is_refused(policy: ExitPolicy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy.thresholds(4)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"prefill": "tokens"}, "prefill is 'tokens'; choose one of backbone, river, sequence"),
        ({"batch": "mean"}, "batch is 'mean'; choose one of sequence, minimum"),
        ({"kind": "sometimes"}, "kind is 'sometimes'; choose one of never, always, fixed"),
    ],
)
def test_unknown_rules_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExitPolicy(**rules)


@pytest.mark.parametrize(
    ("policy", "prefill"),
    [
        (ExitPolicy.never(), "backbone"),
        (ExitPolicy.always(), "river"),
        (ExitPolicy.always(prefill="backbone"), "backbone"),
        (ExitPolicy.fixed(0), "backbone"),
        (ExitPolicy.similarity(0.9), "backbone"),
        (ExitPolicy.similarity(0.9, prefill="token"), "token"),
        (ExitPolicy.per_layer((INF,), prefill="sequence"), "sequence"),
    ],
)
def test_the_prompt_runs_in_full_unless_told_otherwise(policy: ExitPolicy, prefill: str) -> None:
    assert policy.prefill == prefill
    assert policy.batch == "sequence"


POLICIES = {
    "never leaves": ExitPolicy.never(batch="minimum"),
    "leaves at once": ExitPolicy.always(),
    "exit after 7": ExitPolicy.fixed(7, prefill="river"),
    "similarity > 0.97": ExitPolicy.similarity(0.97),
    "similarity > -1 from layer 3": ExitPolicy.similarity(-1.0, 3, prefill="sequence"),
    "threshold per layer": ExitPolicy.per_layer((INF, 0.25), batch="minimum"),
}


@pytest.mark.parametrize(("words", "policy"), POLICIES.items())
def test_a_policy_is_described_in_words(words: str, policy: ExitPolicy) -> None:
    assert policy.describe() == words


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_survives_json(policy: ExitPolicy) -> None:
    fields = json.loads(json.dumps(policy.to_dict(), allow_nan=False))
    assert None not in fields.values()
    if "layer_thresholds" in fields:
        fields["layer_thresholds"] = tuple(map(float, fields["layer_thresholds"]))
    assert ExitPolicy(**fields) == policy


def test_infinite_thresholds_are_plain_json() -> None:
    policy = ExitPolicy.per_layer((INF, 0.9, -INF))
    json.dumps(policy.to_dict(), allow_nan=False)
