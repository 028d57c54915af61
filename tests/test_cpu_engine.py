"""The native engine on every architecture that it supports, held against float32: logits, greedy
tokens, exits, similarities and what stands in the KV cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from native_engines import (
    BACKBONE_TOLERANCE,
    CASES,
    LONG_CONTEXT,
    RIVER_TOLERANCE,
    Subject,
    check_logits,
    long_subject,
    random_tokens,
    relative_errors,
    subject_of,
)
from steps import Texts, append, begin, cached_states, decode_along, thresholds_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy
from river_llm.engines.llama import SUPPORTED_MODEL_TYPES
from river_llm.engines.step import Engine, StepResult

PROMPT, LENGTH = 12, 24
CACHE_TOLERANCE = 0.012  # relative L2 of one layer's keys or values
SIMILARITY_TOLERANCE = 0.005  # absolute
CLEAR = 0.003  # distance to a threshold that no rounding of the models used here bridges

every_case = pytest.mark.parametrize("subject", CASES, indirect=True)
two_cases = pytest.mark.parametrize("subject", ["llama", "gemma3_text, untied head"], indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def test_no_supported_architecture_is_left_out() -> None:
    tested = {subject_of(case).model.config.model_type for case in CASES}
    assert tested == set(SUPPORTED_MODEL_TYPES)


@torch.no_grad()
def decoded(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits `[steps, vocabulary]` of a prompt's last token and of single tokens after it, from
    plain `transformers`."""
    cache = DynamicCache()
    pieces = torch.tensor([tokens]).split([PROMPT, *[1] * (len(tokens) - PROMPT)], 1)
    return torch.cat([model(piece, past_key_values=cache).logits[0, -1:] for piece in pieces])


@every_case
def test_never_leaving_is_the_model_of_transformers(subject: Subject) -> None:
    """A text at once beside another, and token by token."""
    tokens, engine = random_tokens(LENGTH, seed=1), subject.engine(threads=2)
    first, second = begin(engine, [5, LENGTH])
    step = append(engine, {first: tokens[:5], second: tokens})
    with torch.no_grad():
        expected = subject.exact(torch.tensor([tokens])).logits[0]
    check_logits(step.logits[5:], expected, BACKBONE_TOLERANCE)
    assert torch.equal(step.best_tokens, step.logits.argmax(-1))
    assert bool((step.exit_layers == subject.num_layers).all())
    logits, _ = decode_along(engine, tokens, PROMPT)
    check_logits(logits, decoded(subject.exact, tokens), BACKBONE_TOLERANCE)


@every_case
def test_leaving_at_once_is_the_quantised_model(subject: Subject) -> None:
    tokens, engine = random_tokens(LENGTH, seed=3), subject.engine()
    (sequence,) = begin(engine, [LENGTH])
    step = append(engine, {sequence: tokens}, ExitPolicy.always())
    with torch.no_grad():
        expected = subject.quantised(torch.tensor([tokens])).logits[0]
    check_logits(step.logits, expected, RIVER_TOLERANCE)
    assert step.exit_layers.tolist() == [0] * LENGTH


@every_case
def test_every_exit_layer_is_that_of_the_torch_engine(subject: Subject) -> None:
    tokens, engine, reference = random_tokens(20, seed=4), subject.engine(), subject.reference()
    for exit_layer in range(subject.num_layers + 1):
        policy = ExitPolicy.fixed(exit_layer)
        logits, exits = decode_along(engine, tokens, PROMPT, policy)
        expected, expected_exits = decode_along(reference, tokens, PROMPT, policy)
        assert exits.tolist() == [subject.num_layers] + [exit_layer] * 8
        assert torch.equal(exits, expected_exits)
        check_logits(logits, expected, BACKBONE_TOLERANCE)
        check_states(engine, reference, engine.sequences(), reference.sequences())


def check_states(engine: Any, reference: Any, ours: list[int], theirs: list[int]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        states, written = cached_states(engine, one), cached_states(reference, other)
        errors = relative_errors(states.flatten(2), written.flatten(2))  # [keys or values, L]
        assert float(errors.max()) < CACHE_TOLERANCE


def similar(engine: Engine, texts: Texts, thresholds: Tensor, groups: Any) -> StepResult:
    """A step over new sequences, with similarities."""
    sequences = begin(engine, [0] * len(texts))
    renamed = dict(zip(sequences, texts.values(), strict=True))
    return append(engine, renamed, thresholds, record_similarities=True, **groups)


@two_cases
@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"mean_groups": [0] * 9 + [1] * 4 + [2] * 7},
        {"minimum_groups": [0, 1, 2, 3, 4] * 4},
        {"mean_groups": [0] * 9 + [1] * 4 + [2] * 7, "minimum_groups": [0] * 13 + [1] * 7},
    ],
    ids=["rows", "by mean", "by minimum", "both"],
)
def test_rows_leave_where_the_torch_engine_lets_them(
    subject: Subject, groups: dict[str, list[int]]
) -> None:
    """Three texts, each row by its own similarity or by that of its groups; a third of the rows
    has thresholds of its own."""
    texts = {i: random_tokens(length, seed=5 + i) for i, length in enumerate((9, 4, 7))}
    engine, reference = subject.engine(), subject.reference()
    thresholds = thresholds_of(engine).repeat(20, 1)
    if not groups:
        thresholds[::3, 2] = -math.inf
    for layer in range(1, subject.num_layers):  # the widest gap: no exit is a matter of rounding
        found = similar(reference, texts, thresholds, groups)
        assert found.similarities is not None
        values = joined(found.similarities[layer - 1], **groups)
        ordered = values[~values.isnan()].unique()
        gaps = ordered.diff()
        gaps[: len(gaps) // 4] = 0
        if len(gaps) and float(gaps.max()) > 2 * CLEAR:
            rows = thresholds[:, layer].isposinf()
            thresholds[rows, layer] = float(ordered[gaps.argmax()] + gaps.max() / 2)
    step = similar(engine, texts, thresholds, groups)
    expected = similar(reference, texts, thresholds, groups)
    assert len(expected.exit_layers.unique()) > 1
    assert torch.equal(step.exit_layers, expected.exit_layers)
    torch.testing.assert_close(
        step.similarities,
        expected.similarities,
        rtol=0,
        atol=SIMILARITY_TOLERANCE,
        equal_nan=True,
    )
    check_logits(step.logits, expected.logits, BACKBONE_TOLERANCE)
    check_states(engine, reference, engine.sequences(), reference.sequences())


def joined(
    similarities: Tensor,
    mean_groups: list[int] = (),
    minimum_groups: list[int] = (),  # type: ignore[assignment]
) -> Tensor:
    """What each row `[R]` compares, NaN where it has left, by definition."""
    values = similarities.clone()
    for groups, join in ((mean_groups, Tensor.nanmean), (minimum_groups, _nanmin)):
        for group in set(groups):
            of_group = torch.tensor(groups) == group
            values[of_group & ~values.isnan()] = join(values[of_group])
    return values


def _nanmin(values: Tensor) -> Tensor:
    return values.nan_to_num(math.inf).min()


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_long_texts_up_to_the_contexts_end_are_those_of_float32(case: str) -> None:
    """Longer than what a layer computes at a time (256 rows), than the 2048 positions whose rotary
    angles an engine makes at a time, and cut at the borders of pages and chunks."""
    subject, tokens = long_subject(case), random_tokens(LONG_CONTEXT, seed=2)
    engine = subject.engine(threads=2)
    with torch.no_grad():
        expected = subject.exact(torch.tensor([tokens]), logits_to_keep=130).logits[0]
    states = []
    for pieces in ([LONG_CONTEXT - 130, 110, *[1] * 20], [1, 63, 1, 190, 1, 255, 257, 1382]):
        (sequence,) = begin(engine)
        logits, done = [], 0
        for piece in pieces:
            logits.append(append(engine, {sequence: tokens[done : done + piece]}).logits)
            done += piece
        assert engine.length(sequence) == LONG_CONTEXT
        check_logits(torch.cat(logits)[-130:], expected, BACKBONE_TOLERANCE)
        states.append(cached_states(engine, sequence))
    assert torch.equal(*states)


def test_longrope_takes_each_texts_own_angles() -> None:
    """A prompt's tokens those of the whole prompt, single tokens those of the text so far."""
    subject, tokens = subject_of("phi3, longrope"), random_tokens(30, seed=8)
    engine = subject.engine()
    boundary = engine.rope_boundary
    assert boundary is not None
    assert boundary.positions == 16
    with torch.no_grad():
        long = subject.exact(torch.tensor([tokens])).logits[0]
        short = subject.exact(torch.tensor([tokens[:16]])).logits[0]
    first, second = begin(engine, [30, 10])
    append(engine, {first: tokens[:7]})
    step = append(engine, {second: tokens[:16], first: tokens[7:]})
    check_logits(step.logits[:16], short, BACKBONE_TOLERANCE)
    check_logits(step.logits[16:], long[7:], BACKBONE_TOLERANCE)
    assert float(relative_errors(short, long[:16]).max()) > 5 * BACKBONE_TOLERANCE
    crossing, _ = decode_along(engine, tokens, 10)
    expected, _ = decode_along(subject.reference(), tokens, 10)
    check_logits(crossing, expected, BACKBONE_TOLERANCE)
