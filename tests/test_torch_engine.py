"""The torch engine: whatever steps came before, a sequence is what it is alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exit_reference import decode_with_exits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import append
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor
from torch_engines import CLOSE, CONFIG, both_widths, engine_of, tokens_of

from river_llm import ContextFullError, River, RiverError, attach_river
from river_llm.engines.step import NO_TOKEN, Step, StepResult
from river_llm.engines.torch import TorchEngine

INF = math.inf
LAYERS = 4
some_architectures = pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Bloom"])

NEVER = (INF,) * LAYERS
thresholds_of_a_row = st.tuples(
    st.sampled_from([INF, INF, INF, -INF]),
    *[st.sampled_from([INF, INF, -INF, 0.3, 0.7, 0.9])] * (LAYERS - 1),
)


def fixed(exit_layer: int) -> tuple[float, ...]:
    return (INF,) * exit_layer + (-INF,) * (LAYERS - exit_layer)


Row = tuple[int, tuple[float, ...]]  # a token, and by what it leaves


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, dict[int, Any]]]:
    """Steps over some of four sequences, and truncations between them."""
    schedule: list[tuple[str, dict[int, Any]]] = []
    for _ in range(draw(st.integers(1, 8))):
        some = draw(st.lists(st.integers(0, 3), unique=True, min_size=1))
        if draw(st.integers(0, 3)) == 0:
            schedule.append(("truncate", {s: draw(st.integers(0, 12)) for s in some}))
            continue
        most = draw(st.sampled_from([1, 1, 4, 20]))
        rows = st.tuples(st.integers(3, VOCABULARY - 1), thresholds_of_a_row)
        lists = st.lists(rows, min_size=1, max_size=most)
        schedule.append(("step", {s: draw(lists) for s in some}))
    return schedule


@pytest.fixture(scope="module")
def engines() -> dict[tuple[str, int], TorchEngine]:
    attached = {
        name: attach_river(tiny_model(name, **ARCHITECTURES[name]), CONFIG)
        for name in ("Llama", "Mistral", "Bloom")
    }
    return {
        (name, bits): TorchEngine(river, bits)
        for name, river in attached.items()
        for bits in (16, 8)
    }


@some_architectures
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(few_rows=st.sampled_from([1, 16]), schedule=schedules())
def test_after_any_schedule_each_sequence_is_what_it_is_alone(
    engines: dict[tuple[str, int], TorchEngine],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    few_rows: int,
    schedule: list[tuple[str, dict[int, Any]]],
) -> None:
    engine = engines[architecture, 16]
    monkeypatch.setattr("river_llm.engines.torch._FEW_ROWS", few_rows)
    numbers = [engine.add_sequence() for _ in range(4)]
    texts: list[list[Row]] = [[] for _ in range(4)]
    results: list[dict[int, tuple[Tensor, list[int]]]] = [{} for _ in range(4)]  # by position
    for kind, of in schedule:
        if kind == "truncate":
            for sequence, length in of.items():
                engine.truncate(numbers[sequence], length)
                texts[sequence] = texts[sequence][:length]
            continue
        if any(len(texts[s]) + len(rows) > 128 for s, rows in of.items()):
            continue
        rows = [row for of_sequence in of.values() for row in of_sequence]
        result = append(
            engine,
            {numbers[s]: [token for token, _ in of_sequence] for s, of_sequence in of.items()},
            torch.tensor([thresholds for _, thresholds in rows]),
        )
        first = 0
        for sequence, of_sequence in of.items():
            start = len(texts[sequence])
            texts[sequence] += of_sequence
            for place in range(len(of_sequence)):
                exits = result.exit_layers[first + place].tolist()
                results[sequence][start + place] = result.logits[first + place], exits
            first += len(of_sequence)
    for sequence, text in enumerate(texts):
        assert engine.length(numbers[sequence]) == len(text)
        engine.drop_sequence(numbers[sequence])
        alone = engine.add_sequence()
        for place, (token, thresholds) in enumerate(text):
            expected = append(engine, {alone: [token]}, thresholds)
            logits, exit_layer = results[sequence][place]
            assert exit_layer == int(expected.exit_layers)
            torch.testing.assert_close(logits, expected.logits[0], **CLOSE[16])
        engine.drop_sequence(alone)
    assert engine.sequences() == []


def test_tokens_leave_as_the_slow_reference_lets_them() -> None:
    engine = engine_of()
    detached = tiny_model("Llama")
    river = River.build(detached, CONFIG)
    tokens = tokens_of(24)
    similarities = append(
        engine, {engine.add_sequence(): tokens}, record_similarities=True
    ).similarities
    assert similarities is not None
    thresholds = (INF, *similarities[:-1].quantile(0.65, dim=1).tolist())
    logits, exit_layers = decode_with_exits(detached, river, tokens, thresholds)
    assert len(set(exit_layers)) > 2
    for count in (1, 3, 24):
        sequence = engine.add_sequence()
        for start in range(0, 24, count):
            result = append(engine, {sequence: tokens[start : start + count]}, thresholds)
            assert result.exit_layers.tolist() == exit_layers[start : start + count]
            expected = logits[start : start + count]
            torch.testing.assert_close(result.logits, expected, **CLOSE[16])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@both_widths
def test_every_architecture_runs_sequences_of_different_lengths(
    architecture: str, kv_bits: int
) -> None:
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    texts = [tokens_of(length, seed) for seed, length in enumerate((12, 3, 6))]
    with torch.no_grad():
        expected = [model(torch.tensor([text])).logits[0] for text in texts]
    engine = TorchEngine(attach_river(model, CONFIG), kv_bits)
    a, b, c = (engine.add_sequence() for _ in range(3))
    found: dict[int, list[Tensor]] = {a: [], b: [], c: []}
    for rows in (
        {a: (0, 5), b: (0, 1)},
        {a: (5, 8), b: (1, 3), c: (0, 4)},
        {a: (8, 12), c: (4, 6)},
    ):
        given = {s: texts[s][start:end] for s, (start, end) in rows.items()}
        logits = append(engine, given).logits.split([len(text) for text in given.values()])
        for sequence, part in zip(given, logits, strict=True):
            found[sequence].append(part)
    for sequence in (a, b, c):
        error = (torch.cat(found[sequence]) - expected[sequence]).norm()
        assert error < (1e-4 if kv_bits == 16 else 0.1) * expected[sequence].norm()


class TestSteps:
    def test_give_the_logits_that_were_asked_for(self) -> None:
        engine = engine_of()
        texts = {engine.add_sequence(): tokens_of(5), engine.add_sequence(): tokens_of(40, 1)}
        every = append(engine, texts)
        for rows in ([], [4], [0], [4, 44], [1, 3, 7, 44], [44]):
            for sequence in texts:
                engine.truncate(sequence, 0)
            some = append(engine, texts, logit_rows=rows)
            torch.testing.assert_close(some.logits, every.logits[rows], **CLOSE[16])
            assert some.exit_layers.tolist() == [LAYERS] * 45

    def test_take_rows_in_any_order(self) -> None:
        engine = engine_of()
        a, b = engine.add_sequence(), engine.add_sequence()
        thresholds = torch.tensor([fixed(3), fixed(1), fixed(2), NEVER])
        mixed = engine.forward(Step([5, 6, 7, 8], [b, a, b, a], thresholds, [0, 1, 2, 3]))
        assert mixed.exit_layers.tolist() == [3, 1, 2, 4]
        c = engine.add_sequence()
        alone = append(engine, {c: [5, 7]}, thresholds[[0, 2]])
        torch.testing.assert_close(mixed.logits[[0, 2]], alone.logits, **CLOSE[16])

    @pytest.mark.parametrize("kind", ["mean", "minimum", "both"])
    def test_join_the_rows_of_groups(self, kind: str) -> None:
        """Against the similarities of single rows, joined by hand."""
        engine = engine_of()
        texts = {engine.add_sequence(): tokens_of(6, seed) for seed in range(3)}
        single = append(engine, texts, record_similarities=True).similarities
        assert single is not None
        after = single[1].view(3, 6)  # the second layer's
        if kind == "mean":
            joined = after.mean(1, keepdim=True).expand(3, 6)
        elif kind == "minimum":
            joined = after.amin(0, keepdim=True).expand(3, 6)
        else:
            joined = after.mean(1).amin().expand(3, 6)
        sequences = [s for s in range(3) for _ in range(6)]
        means = sequences if kind != "minimum" else ()
        minima = {"mean": (), "minimum": list(range(6)) * 3, "both": [0] * 18}[kind]
        for threshold in (*(joined.unique() + 1e-4).tolist(), *(joined.unique() - 1e-4).tolist()):
            for sequence in texts:
                engine.truncate(sequence, 0)
            result = append(
                engine,
                texts,
                (INF, INF, threshold, INF),
                mean_groups=means,
                minimum_groups=minima,
            )
            expected = torch.where(joined > threshold, 2, LAYERS)
            assert torch.equal(result.exit_layers.view(3, 6), expected)

    def test_of_groups_are_joined_across_prompts_of_any_length(self) -> None:
        engine = engine_of()
        texts = {engine.add_sequence(): tokens_of(n, n) for n in (3, 40)}
        single = append(engine, texts, record_similarities=True).similarities
        assert single is not None
        means = [of.mean() for of in single[1].split([3, 40])]
        between = float(sum(means) / 2)
        for sequence in texts:
            engine.truncate(sequence, 0)
        groups = {"mean_groups": [0] * 3 + [1] * 40}
        apart = append(engine, texts, (INF, INF, between, INF), **groups).exit_layers
        assert set(apart.tolist()) == {2, LAYERS}
        for sequence in texts:
            engine.truncate(sequence, 0)
        groups["minimum_groups"] = [0] * 43
        together = append(engine, texts, (INF, INF, between, INF), **groups).exit_layers
        assert set(together.tolist()) == {LAYERS}

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            (Step([], [], torch.tensor(NEVER), []), "no rows"),
            (
                Step([VOCABULARY], [0], torch.tensor(NEVER), []),
                "no token 97: the model's embedding",
            ),
            (
                Step([NO_TOKEN], [0], torch.tensor(NEVER), []),
                "comes from logits that are no numbers",
            ),
            (Step([5], [7], torch.tensor(NEVER), []), "no sequence 7"),
            (Step([5], [0], torch.zeros(3), []), r"thresholds are \[3\]; give 4"),
            (Step([5] * 2, [0] * 2, torch.zeros(3, 4), []), r"thresholds are \[3, 4\]"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, step: Step, message: str) -> None:
        engine = engine_of()
        assert engine.add_sequence() == 0
        with pytest.raises(RiverError, match=message):
            engine.forward(step)
        assert engine.length(0) == 0

    def test_a_full_context_is_an_error_that_changes_nothing(self) -> None:
        engine = engine_of(max_position_embeddings=64)
        a, b = engine.add_sequence(), engine.add_sequence()
        append(engine, {a: tokens_of(63), b: [5]})
        with pytest.raises(ContextFullError, match="65 tokens don't fit the model's context of 64"):
            append(engine, {a: [5, 6], b: [5]})
        assert (engine.length(a), engine.length(b)) == (63, 1)
        append(engine, {a: [7], b: tokens_of(40)})  # the fillers behind a's last token don't count

    def test_numbers_of_sequences_are_given_again(self) -> None:
        engine = engine_of()
        assert [engine.add_sequence() for _ in range(3)] == [0, 1, 2]
        engine.drop_sequence(1)
        assert engine.sequences() == [0, 2]
        assert engine.add_sequence() == 1
        for use in (engine.drop_sequence, engine.length):
            with pytest.raises(RiverError, match="no sequence 5"):
                use(5)


def test_errors_of_one_sequence_never_reach_another() -> None:
    engine = engine_of(tie_word_embeddings=False)
    broken, sane, alone = (engine.add_sequence() for _ in range(3))
    engine.model.get_input_embeddings().weight.data[50] = math.nan
    text = tokens_of(30)
    text = [token if token != 50 else 51 for token in text]
    half = (INF, INF, 0.5, -INF)
    minima = {"minimum_groups": [0] * 6}
    append(engine, {broken: [5]}, half)
    result = append(engine, {broken: [5, 50, 6], sane: text[:3]}, half, **minima)
    assert result.best_tokens.tolist()[1:3] == [NO_TOKEN] * 2
    expected = [append(engine, {alone: text[:3]}, half, minimum_groups=[0] * 3)]
    found = [StepResult(result.logits[3:], result.exit_layers[3:])]
    engine.truncate(broken, 1)  # shorter than the other, so that it is padded from here on
    for place in range(3, 12, 3):
        result = append(engine, {broken: [50], sane: text[place : place + 3]}, half)
        found.append(StepResult(result.logits[1:], result.exit_layers[1:]))
        expected.append(append(engine, {alone: text[place : place + 3]}, half))
        engine.truncate(broken, 1)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.exit_layers, other.exit_layers)
        torch.testing.assert_close(one.logits, other.logits, **CLOSE[16])
    again = append(engine, {broken: text[:3]}, half).logits
    assert again.isfinite().all()
    fresh = engine.add_sequence()
    append(engine, {fresh: [5]}, half)
    torch.testing.assert_close(again, append(engine, {fresh: text[:3]}, half).logits, **CLOSE[16])


ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("Llama", {"max_position_embeddings": 16}),
    "longrope": ("Phi3", {"original_max_position_embeddings": 16}),
}


@pytest.mark.parametrize("kind", ROPE)
class TestRopeBoundary:
    @staticmethod
    def engine(kind: str) -> TorchEngine:
        architecture, settings = MODELS[kind]
        engine = engine_of(architecture, rope_parameters=ROPE[kind], **settings)
        engine.context_length = 64
        assert engine.rope_boundary is not None
        assert engine.rope_boundary.positions == 16
        return engine

    def test_is_crossed_by_each_sequence_for_itself(self, kind: str) -> None:
        engine, other = self.engine(kind), self.engine(kind)
        lengths = (3, 14, 20, 30)
        sequences = [engine.add_sequence() for _ in lengths]
        first = append(engine, {s: tokens_of(lengths[s], s) for s in sequences})
        found = [append(engine, {s: [5 + s + step] for s in sequences}) for step in range(6)]
        for s, logits in zip(sequences, first.logits.split(lengths), strict=True):
            alone = other.add_sequence()
            expected = append(other, {alone: tokens_of(lengths[s], s)}).logits
            torch.testing.assert_close(logits, expected, **CLOSE[16])
            for step in range(6):
                expected = append(other, {alone: [5 + s + step]}).logits[0]
                torch.testing.assert_close(found[step].logits[s], expected, **CLOSE[16])

    def test_is_that_of_transformers(self, kind: str) -> None:
        engine = self.engine(kind)
        text = tokens_of(26)
        with torch.no_grad():
            expected = engine.model(torch.tensor([text])).logits[0]
        a, b = engine.add_sequence(), engine.add_sequence()
        found = append(engine, {a: text, b: tokens_of(5)}).logits[:26]
        torch.testing.assert_close(found, expected, **CLOSE[16])

    def test_counts_for_a_prompt_in_parts_from_the_first_on(self, kind: str) -> None:
        engine = self.engine(kind)
        text = tokens_of(25)
        whole, parts, neighbour = (engine.add_sequence(n) for n in (0, 25, 0))
        expected = append(engine, {whole: text}).logits
        found = [
            append(engine, {parts: text[start : start + 10], neighbour: [9]}).logits[:-1]
            for start in (0, 10, 20)
        ]
        torch.testing.assert_close(torch.cat(found), expected, **CLOSE[16])
