"""What holds for the native engine bit for bit: a row depends on the tokens of its sequence and on
their thresholds alone (batch invariance), and what was forgotten leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_engines import KERNELS, Subject, every_kernel_set, random_tokens, subject_of
from steps import append, begin, cached_states
from torch import Tensor

from river_llm import ContextFullError, ExitPolicy
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.step import Step

CASES = ("llama", "mistral, window", "gemma3_text", "llama, biases", "phi3, longrope")
NUM_LAYERS, CONTEXT = 4, 128
BROKEN = 2  # a token whose embedding is NaN

thresholds = st.builds(
    lambda row: torch.tensor(row, dtype=torch.float32),
    st.tuples(*[st.floats(0, 1, width=32) | st.sampled_from([-math.inf, math.inf])] * NUM_LAYERS),
)


@cache
def broken(case: str) -> Subject:
    """The model of a case, where `BROKEN` makes numbers that are none."""
    subject = subject_of(case).copy()
    subject.model.get_input_embeddings().weight.data[BROKEN] = math.nan
    return subject


@cache
def engine_of(case: str, kernels: str, threads: int, kv_bits: int, name: str = "") -> CpuEngine:
    return broken(case).engine(kernels=kernels, threads=threads, kv_bits=kv_bits)


def assert_same(one: Tensor, other: Tensor) -> None:
    """The same bits; a broken token of a tied head has logits of NaN."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Course:
    """Sequences of one engine, of which each row that still counts is remembered."""

    def __init__(self, engine: CpuEngine, data: st.DataObject) -> None:
        self._engine, self._data = engine, data
        self._source = iter(random_tokens(10_000, seed=data.draw(st.integers(0, 99), label="seed")))
        # by sequence: token, thresholds, logits, exit layer, similarities
        self.rows: dict[int, list[tuple[int, Tensor, Tensor, int, Tensor]]] = {}
        begin(engine, [])

    def act(self) -> None:
        actions: list[Callable[[], object]] = [self.add]
        if self.rows:
            actions += [self.step] * 4 + [self.truncate, self.drop, self.copy, self.forget]
        actions[self._data.draw(st.integers(0, len(actions) - 1), label="action")]()

    def add(self) -> int:
        sequence = self._engine.add_sequence()
        assert sequence not in self.rows
        self.rows[sequence] = []
        return sequence

    def step(self) -> None:
        """Some tokens of some sequences in any order, each with thresholds of its own or all with
        the same."""
        chosen = self._some()
        counts = {s: self._data.draw(st.integers(1, 5) | st.just(33)) for s in chosen}
        places = [s for s, count in counts.items() for _ in range(min(count, self._room(s)))]
        if not places:
            return
        places = self._data.draw(st.permutations(places), label="rows")
        kinds = self._data.draw(st.lists(thresholds, min_size=1, max_size=3), label="thresholds")
        own = [kinds[i % len(kinds)] for i in range(len(places))]
        tokens = [next(self._source) for _ in places]
        step = Step(
            tokens,
            places,
            torch.stack(own) if len(kinds) > 1 else kinds[0],
            range(len(places)),
            record_similarities=True,
        )
        result = self._engine.forward(step)
        assert result.similarities is not None
        for row, sequence in enumerate(places):
            self.rows[sequence].append(
                (
                    tokens[row],
                    own[row],
                    result.logits[row],
                    int(result.exit_layers[row]),
                    result.similarities[:, row],
                )
            )

    def truncate(self) -> None:
        (sequence,) = self._some(most=1)
        length = self._data.draw(st.integers(0, len(self.rows[sequence]) + 2), label="length")
        self._engine.truncate(sequence, length)
        del self.rows[sequence][length:]

    def drop(self) -> None:
        for sequence in self._some(most=2):
            self._engine.drop_sequence(sequence)
            del self.rows[sequence]

    def copy(self) -> None:
        """Through what the cache is written to a file as."""
        (sequence,) = self._some(most=1)
        length = self._data.draw(st.integers(0, len(self.rows[sequence])), label="length")
        other = self.add()
        tensors = self._engine.read_cache(sequence, length)
        self._engine.write_cache(other, tensors, length)
        self.rows[other] = self.rows[sequence][:length]

    def forget(self) -> None:
        """Tokens whose states are no numbers."""
        sequences = self._some()
        texts = {s: [BROKEN] * min(3, self._room(s)) for s in sequences if self._room(s)}
        if not texts:
            return
        result = append(self._engine, texts, self._data.draw(thresholds))
        assert bool(result.logits.isnan().any(1).all())
        assert set(result.best_tokens.tolist()) == {-1}
        for sequence in texts:
            self._engine.truncate(sequence, len(self.rows[sequence]))

    def _some(self, most: int = 9) -> list[int]:
        known = st.sampled_from(sorted(self.rows))
        return self._data.draw(
            st.lists(known, min_size=1, max_size=most, unique=True), label="sequences"
        )

    def _room(self, sequence: int) -> int:
        return CONTEXT - len(self.rows[sequence])


@every_kernel_set
@given(
    case=st.sampled_from(CASES),
    kv_bits=st.sampled_from([16, 8]),
    threads=st.integers(1, 3),
    actions=st.integers(2, 12),
    data=st.data(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_course_of_steps_is_that_of_single_rows_alone(
    kernels: str, case: str, kv_bits: int, threads: int, actions: int, data: st.DataObject
) -> None:
    """Sequences join, leave, are cut and copied; rows come in any number and order, with thresholds
    of their own, on any number of threads."""
    engine = engine_of(case, kernels, threads, kv_bits)
    alone = engine_of(case, kernels, 1, kv_bits, "alone")
    course = Course(engine, data)
    for _ in range(actions):
        course.act()
    assert engine.sequences() == sorted(course.rows)
    for sequence, rows in course.rows.items():
        assert engine.length(sequence) == len(rows)
        (own,) = begin(alone)
        for token, of_row, logits, exit_layer, similarities in rows:
            step = alone.forward(Step([token], [own], of_row, [0], record_similarities=True))
            assert step.exit_layers.tolist() == [exit_layer]
            assert step.similarities is not None
            assert_same(step.logits[0], logits)
            assert_same(step.similarities[:, 0], similarities)
        assert torch.equal(cached_states(alone, own), cached_states(engine, sequence))


@given(
    limit=st.integers(0, NUM_LAYERS),
    rows=st.lists(thresholds, min_size=1, max_size=9),
    grouped=st.booleans(),
)
@settings(max_examples=40)
def test_a_depth_limit_is_a_threshold_that_all_exceed(
    limit: int, rows: list[Tensor], grouped: bool
) -> None:
    engine = engine_of("llama", KERNELS[0], 1, 16)
    tokens = random_tokens(len(rows), seed=9)
    groups = {"mean_groups": [i % 2 for i in range(len(rows))]} if grouped and len(rows) > 1 else {}
    free, capped = torch.stack(rows), torch.stack(rows)
    if limit < NUM_LAYERS:
        capped[:, limit] = -math.inf
    results = []
    for of_rows, depth_limit in ((capped, None), (free, limit)):
        (sequence,) = begin(engine)
        engine.depth_limit = depth_limit
        before = engine.offload_statistics
        step = append(engine, {sequence: tokens}, of_rows, **groups)
        results.append((step.logits, step.exit_layers))
        held = engine.offload_statistics.since(before).depth_capped
    engine.depth_limit = None
    (logits, exits), (limited_logits, limited_exits) = results
    assert torch.equal(limited_logits, logits)
    assert torch.equal(limited_exits, exits)
    if limit == NUM_LAYERS or not bool(free[:, limit].isposinf().all()):
        assert held <= int((exits == limit).sum()) * (limit < NUM_LAYERS)
    else:  # nobody left there freely
        assert held == int((exits == limit).sum())


@pytest.mark.parametrize("context", [64, 100, 128])
def test_a_full_context_is_an_error_that_changes_nothing(context: int) -> None:
    engine = Subject("Llama", {"max_position_embeddings": context}).engine()
    assert engine.context_length == context
    tokens = random_tokens(context + 1, seed=3)
    message = f"{context + 1} tokens don't fit the model's context of {context}"
    first, second = begin(engine, [0, 0])
    append(engine, {first: tokens[:-1], second: tokens[:5]})
    states = cached_states(engine, first)
    for texts in ({first: [7]}, {second: [8], first: [7]}, {second: tokens[5:]}):
        with pytest.raises(ContextFullError, match=message):
            append(engine, texts, ExitPolicy.fixed(1))
    assert (engine.length(first), engine.length(second)) == (context, 5)
    assert torch.equal(cached_states(engine, first), states)
    engine.truncate(first, context - 1)
    append(engine, {first: tokens[context - 1 : context]})
    assert torch.equal(cached_states(engine, first), states)
