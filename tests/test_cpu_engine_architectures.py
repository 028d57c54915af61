"""The native engine on every architecture that it supports, held against float32: logits, greedy
tokens, exits, similarities and what stands in the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from native_engines import (
    BACKBONE_TOLERANCE,
    CASES,
    RIVER_TOLERANCE,
    Subject,
    cached_states,
    check_logits,
    random_tokens,
    relative_errors,
    subject_of,
)
from river_llm.engines.llama_family import SUPPORTED_MODEL_TYPES
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy
from river_llm.engines import CpuEngine, Engine, StepResult, TorchEngine
from river_llm.exit_policy import BatchRule, PrefillRule

PROMPT_LENGTH = 12
CACHE_TOLERANCE = 0.012  # relative L2 of one layer's keys or values
SIMILARITY_TOLERANCE = 0.005  # absolute
CLEAR = 0.003  # distance to a threshold that no rounding of the models used here bridges

RULES = [
    (prefill, batch, padding)
    for prefill in get_args(PrefillRule)
    for batch in get_args(BatchRule)
    for padding in ("", "padded")
]

every_case = pytest.mark.parametrize("subject", CASES, indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


@dataclass(frozen=True)
class Text:
    """A prompt of `PROMPT_LENGTH` and tokens to decode, `[batch, tokens]`, whatever the greedy ones
    would be; the mask is the prompt's."""

    tokens: Tensor
    padding_mask: Tensor | None = None

    def passes(self, engine: Engine) -> Iterator[StepResult]:
        """The prompt, then one token at a time."""
        yield engine.prefill(self.tokens[:, :PROMPT_LENGTH], self.padding_mask)
        for position in range(PROMPT_LENGTH, self.tokens.shape[1]):
            yield engine.decode(self.tokens[:, position])

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits `[passes, batch, vocabulary]` of the same passes, from plain `transformers`."""
        cache = DynamicCache()
        pieces = self.tokens.split(
            [PROMPT_LENGTH, *[1] * (self.tokens.shape[1] - PROMPT_LENGTH)], 1
        )
        return torch.stack([model(piece, past_key_values=cache).logits[:, -1] for piece in pieces])


def test_no_supported_architecture_is_left_out() -> None:
    tested = {subject_of(case).model.config.model_type for case in CASES}
    assert tested == set(SUPPORTED_MODEL_TYPES)


@every_case
def test_the_backbone_is_the_model_of_transformers(subject: Subject) -> None:
    tokens = random_tokens(2, 32, seed=1)
    step = subject.engine().verify(tokens)
    with torch.no_grad():
        check_logits(step.logits, subject.exact(tokens).logits, BACKBONE_TOLERANCE)
    assert torch.equal(step.best_tokens, step.logits.argmax(-1))
    assert bool((step.exit_layers == subject.num_layers).all())


@every_case
def test_decoding_is_that_of_transformers(subject: Subject) -> None:
    text = Text(random_tokens(2, 30, seed=2))
    logits = torch.stack([step.logits for step in text.passes(subject.engine())])
    check_logits(logits, text.logits(subject.exact), BACKBONE_TOLERANCE)


@every_case
def test_leaving_at_once_is_the_quantised_model(subject: Subject) -> None:
    text = Text(random_tokens(2, 30, seed=3))
    logits = []
    for step in text.passes(subject.engine(ExitPolicy.always())):
        logits.append(step.logits)
        assert step.exit_layers.tolist() == [0, 0]
    check_logits(torch.stack(logits), text.logits(subject.quantised), RIVER_TOLERANCE)


@every_case
def test_every_exit_layer_is_that_of_the_torch_engine(subject: Subject) -> None:
    text = Text(random_tokens(2, 20, seed=4))
    engine = subject.engine()
    for exit_layer in range(subject.num_layers + 1):
        engine.policy = ExitPolicy.fixed(exit_layer)
        exits = _check_run(engine, subject.reference(engine.policy), text)
        assert exits == {exit_layer, subject.num_layers}  # the prompt runs the backbone
        engine.truncate(0)


@pytest.mark.parametrize("rules", RULES, ids=" ".join)
@pytest.mark.parametrize("subject", ["llama", "gemma3_text, untied head"], indirect=True)
def test_tokens_leave_where_the_torch_engine_lets_them(
    subject: Subject, rules: tuple[PrefillRule, BatchRule, str]
) -> None:
    """Three sequences, each of which leaves by its own similarities or all by the smallest."""
    prefill, batch, padding = rules
    mask = torch.ones(3, PROMPT_LENGTH, dtype=torch.bool)
    mask[0, :9], mask[2, :3] = False, False
    text = Text(random_tokens(3, 18, seed=5), mask if padding else None)
    policy = _clear_policy(subject, text, prefill=prefill, batch=batch)
    exits = _check_run(subject.engine(policy), subject.reference(policy), text)
    assert len(exits) > 1


@pytest.mark.parametrize("subject", ["llama, biases", "olmo2", "qwen3"], indirect=True)
def test_one_threshold_for_all_layers_lets_tokens_leave_at_several(subject: Subject) -> None:
    text = Text(random_tokens(2, 24, seed=6))
    policies = [ExitPolicy.similarity(0.6 + 0.04 * step, first_layer=2) for step in range(8)]
    policy = max(policies, key=lambda policy: _margin(subject, text, policy))
    assert _margin(subject, text, policy) > CLEAR
    exits = _check_run(subject.engine(policy), subject.reference(policy), text)
    assert len(exits) > 1
    assert min(exits) >= 2


@pytest.mark.parametrize("batch", get_args(BatchRule))
@pytest.mark.parametrize("prefill", get_args(PrefillRule))
@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_padding_of_a_sequence_alone_counts_nowhere(
    subject: Subject, prefill: PrefillRule, batch: BatchRule
) -> None:
    thresholds = (math.inf, 0.3, 0.6, 0.75)
    engine = subject.engine(ExitPolicy.per_layer(thresholds, prefill=prefill, batch=batch))
    tokens = random_tokens(1, 12, seed=7)
    alone = engine.prefill(tokens[:, 7:])
    logits, states = alone.logits, cached_states(engine)
    engine.truncate(0)
    padded = engine.prefill(tokens, torch.arange(12).unsqueeze(0) >= 7)
    assert torch.equal(padded.logits, logits)
    assert torch.equal(padded.exit_layers, alone.exit_layers)
    assert torch.equal(cached_states(engine), states)
    assert engine.length == 12


@pytest.mark.parametrize("subject", ["phi3, longrope"], indirect=True)
def test_other_angles_begin_where_a_real_token_stands_beyond_the_limit(subject: Subject) -> None:
    """Padding on every row: the cache is longer than the position of any token."""
    mask = torch.ones(2, PROMPT_LENGTH, dtype=torch.bool)
    mask[0, :9], mask[1, :5] = False, False
    text = Text(random_tokens(2, 24, seed=8), mask)
    _check_run(subject.engine(), subject.reference(), text)


def _check_run(engine: CpuEngine, reference: TorchEngine, text: Text) -> set[int]:
    """See that both engines give the same on a text; the exit layers that occurred."""
    engine.record_similarities = reference.record_similarities = True
    logits, expected, exits = [], [], set()
    for step, right in zip(text.passes(engine), text.passes(reference), strict=True):
        logits.append(step.logits)
        expected.append(right.logits)
        assert step.exit_layers.tolist() == right.exit_layers.tolist()
        exits |= set(step.exit_layers.tolist())
        assert step.similarities is not None
        assert right.similarities is not None
        torch.testing.assert_close(
            step.similarities,
            right.similarities,
            rtol=0,
            atol=SIMILARITY_TOLERANCE,
            equal_nan=True,
        )
        assert torch.equal(step.best_tokens, step.logits.argmax(-1))
    check_logits(torch.stack(logits), torch.stack(expected), BACKBONE_TOLERANCE)
    for sequence in range(len(text.tokens)):
        states = cached_states(engine, sequence)
        written = cached_states(reference, sequence)[..., -states.shape[-2] :, :]  # no padding
        errors = relative_errors(states.flatten(2), written.flatten(2))  # [keys or values, L]
        assert float(errors.max()) < CACHE_TOLERANCE
    return exits


def _compared(subject: Subject, text: Text, policy: ExitPolicy) -> Tensor:
    """What a run in float32 holds against the thresholds, `[L, values]`, NaN behind an exit."""
    reference = subject.reference(policy)
    reference.record_similarities = True
    values = [torch.empty(subject.num_layers, 0)]
    rule = policy.prefill
    for _ in text.passes(reference):
        similarities = reference.attached.router.similarities  # [L, batch, tokens]
        assert similarities is not None
        if text.padding_mask is not None and similarities.shape[2] == PROMPT_LENGTH:
            similarities = similarities.where(text.padding_mask, math.nan)
        if rule == "sequence":
            similarities = similarities.nanmean(2, True)
        if policy.batch == "minimum":
            similarities = similarities.nan_to_num(math.inf).amin(1, keepdim=True)
            similarities = similarities.where(similarities < math.inf, math.nan)
        if rule in ("token", "sequence"):
            values.append(similarities.flatten(1))
        rule = "token"
    return torch.cat(values, 1)


def _clear_policy(subject: Subject, text: Text, **rules: Any) -> ExitPolicy:
    """Layer by layer the threshold in the middle of the widest gap among those similarities that
    let some leave and some stay, so that no exit is a matter of rounding."""
    thresholds = [math.inf] * subject.num_layers
    for layer in range(1, subject.num_layers):
        policy = ExitPolicy.per_layer(tuple(thresholds), **rules)
        values = _compared(subject, text, policy)[layer - 1]
        ordered = values[~values.isnan()].sort().values
        gaps = ordered.diff()
        gaps[: len(gaps) // 4] = 0
        if len(gaps) and float(gaps.max()) > 2 * CLEAR:
            thresholds[layer] = float(ordered[gaps.argmax()] + gaps.max() / 2)
    return ExitPolicy.per_layer(tuple(thresholds), **rules)


def _margin(subject: Subject, text: Text, policy: ExitPolicy) -> float:
    """How near any similarity of a run comes to its threshold."""
    thresholds = torch.tensor(policy.thresholds(subject.num_layers)[1:])
    distances = _compared(subject, text, policy)[:-1] - thresholds.unsqueeze(1)
    return float(distances.abs().nan_to_num(math.inf).min())
