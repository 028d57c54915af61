"""`river-llm bench`: interleaved rounds and their arithmetic, the variants, what it prints."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any
from unittest import mock

import pytest
import torch
from command_line import Outcome, run
from native_engines import subject_of
from steps import append, begin
from toy_engine import ToyEngine

from river_llm import ConfigError, ExitPolicy, River, RiverConfig, RiverLM, attach_river
from river_llm.engines import TorchEngine
from river_llm.measure import bandwidth, bench
from river_llm.measure.bench import EngineVariant, LosslessVariant, Session, Text, make_variants
from river_llm.measure.random_weights import SHAPES, random_model, random_river
from river_llm.measure.rounds import (
    Result,
    Spread,
    Timing,
    Workload,
    interleaved,
    make_workloads,
    measure,
)

pytest_plugins = ["cli_models"]

DECODE, PROMPT = Workload("decode", 3), Workload("prompt", 5)
QUICK = ("--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 2, "--threads", 1)
TINY_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a small buffer: nobody looks at the bandwidth here."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)


class FakeVariant:
    """Takes a second for its first pass, then `faster` times less for each one more."""

    engine = "fake"

    def __init__(self, name: str, log: list[str], speed: float = 1) -> None:
        self.name = name
        self._log = log
        self._speeds = (speed * count for count in itertools.count(1))

    def takes(self, workload: Workload) -> bool:
        return workload.kind == "decode" or self.name != "b"

    def prepare(self, workload: Workload) -> None:
        self._log.append(f"prepare {self.name}")

    def run(self, workload: Workload) -> Timing:
        self._log.append(self.name)
        read = 10.0 if workload.kind == "decode" else None
        return Timing(workload.tokens / next(self._speeds), workload.tokens, read)


class TestWorkloads:
    def test_every_test_at_every_depth_and_only_decoding_in_batches(self) -> None:
        found = make_workloads([512, 0], [128], [0, 4096], [1, 2])
        assert [(one.name, one.context, one.end) for one in found] == [
            ("pp512", 0, 512),  # named as llama-bench names them
            ("pp512 @ d4096", 4096, 4608),
            ("tg128", 16, 144),
            ("tg128 b2", 16, 144),
            ("tg128 @ d4096", 4096, 4224),
            ("tg128 b2 @ d4096", 4096, 4224),
        ]

    def test_that_do_not_fit_the_context_are_refused(self) -> None:
        assert len(make_workloads([8], [4], [32], context_length=40)) == 2
        with pytest.raises(ConfigError, match=r"pp8 @ d32 needs 40 tokens .* has 39"):
            make_workloads([8], [4], [32], context_length=39)

    def test_tokens_continue_where_they_stopped_and_differ_between_sequences(self) -> None:
        text = Text(None, 97)
        whole = text.tokens(2, 0, 2000)
        assert whole.shape == (2, 2000)
        assert whole.max() < 97
        assert torch.equal(text.tokens(2, 5, 3), whole[:, 5:8])
        assert not torch.equal(whole[0], whole[1])


class TestRounds:
    def test_go_forth_and_back_each_between_two_readings_after_one_that_warms_up(self) -> None:
        log: list[str] = []
        variants = [FakeVariant("a", log), FakeVariant("b", log, speed=10)]
        (results,) = measure(variants, [DECODE], 3, lambda: log.append("read") or 1.0)
        a, b = (["prepare " + x, "read", x, "read"] for x in "ab")
        assert log == ["prepare a", "a", "prepare b", "b", *b, *a, *a, *b, *b, *a]
        speeds = [[one.tokens_per_second for one in result.rounds] for result in results]
        assert speeds == [[2, 3, 4], [20, 30, 40]]
        assert list(interleaved("ab", 3)) == ["ab", "ba", "ab"]

    def test_variants_take_the_tests_that_say_something_of_them(self) -> None:
        done: list[tuple[int, int]] = []
        variants = [FakeVariant("a", []), FakeVariant("b", [])]
        of_tests = measure(variants, [PROMPT, DECODE], 2, lambda: 1.0, lambda *x: done.append(x))
        assert [[result.variant for result in results] for results in of_tests] == [
            ["a"],
            ["a", "b"],
        ]
        assert done == [(number, 9) for number in range(1, 10)]

    def test_results_have_the_bandwidth_of_the_moment_and_ratios_round_by_round(self) -> None:
        readings = iter([100.0, 300.0])
        ((result,),) = measure([FakeVariant("a", [], 2)], [DECODE], 1, lambda: next(readings))
        assert result.rounds == [Timing(3 / 4, 3, 10, bandwidth=200)]
        assert result.median("bandwidth_fraction") == 4 * 10 / 200
        mine, other = (
            Result(name, "fake", PROMPT, [Timing(1, tokens) for tokens in speeds])
            for name, speeds in (("a", [2, 8, 9]), ("b", [1, 2, 9]))
        )
        assert mine.times_as_fast_as(other) == Spread(2, 1, 4)
        plain = json.loads(json.dumps(mine.to_dict([other])))
        assert plain["ratios"] == {"b": {"median": 2, "lowest": 1, "highest": 4}}
        assert plain["tokens_per_second"]["median"] == 8
        assert plain["bandwidth_fraction"] is plain["bytes_per_token"] is None
        assert str(Spread(8, 2, 120)) == "8.0 [2.0 - 120.0]"


class TestEngineVariant:
    def test_decodes_its_own_greedy_tokens_and_counts_what_was_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, text, steps = subject_of("llama").engine(), Text(None, 97), []
        decode = Session.decode

        def spy(session: Session, tokens: list[int], *settings: Any) -> Any:
            steps.append((tokens, decode(session, tokens, *settings)))
            return steps[-1][1]

        monkeypatch.setattr(Session, "decode", spy)
        variant = EngineVariant("x", Session(engine), ExitPolicy.fixed(1), text)
        variant.prepare(DECODE)
        timing = variant.run(DECODE)
        given, found = [tokens for tokens, _ in steps], [best for _, (best, *_) in steps]
        assert given == [text.tokens(1, 16, 1).flatten().tolist(), *found[:2]]
        (expected,) = begin(engine)
        append(engine, {expected: text.tokens(1, 0, 16)[0].tolist()})
        for tokens, best in zip(given, found, strict=True):
            step = append(engine, {expected: tokens}, ExitPolicy.fixed(1))
            assert step.best_tokens.tolist() == best
        read = sum(engine.step_bytes(1, position) for position in (16, 17, 18))
        assert (timing.tokens, timing.bytes_per_token, timing.mean_exit_layer) == (3, read / 3, 1)

    def test_a_batch_reads_both_weights_where_it_is_split(self) -> None:
        subject = subject_of("llama")
        engine = subject.engine()
        full, cache = engine.step_bytes(0, 0), engine.step_bytes(0, 20) - engine.step_bytes(0, 0)
        session = Session(engine)
        assert session.step_bytes([2, 0], 20) == full + sum(engine.layer_bytes[:2]) + 2 * cache
        assert session.step_bytes([2, 2], 20) == engine.step_bytes(2, 20) + cache
        twice = engine.step_bytes(2, 20) + cache + engine.step_bytes(4, 20)
        assert session.step_bytes([2, 4], 20, {1: 2}) == twice
        assert Session(subject.reference()).step_bytes([0, 2], 20) is None

    @pytest.mark.parametrize("prefill_rows", [None, 7])
    def test_a_context_is_filled_once_and_another_batch_begins_anew(
        self, prefill_rows: int | None
    ) -> None:
        engine = ToyEngine(None, prefill_rows)
        session, text = Session(engine), Text(None, 97)
        filled = []
        deep = Workload("decode", 3, 32)
        for workload in (DECODE, DECODE, deep, Workload("decode", 3, 32, 2), DECODE, PROMPT):
            engine.steps = []
            session.fill(workload, text)
            sequences = engine.sequences()
            assert [engine.length(n) for n in sequences] == [workload.context] * workload.batch
            filled.append(sum(len(step.tokens) for step in engine.steps))
            for n, tokens in zip(sequences, text.tokens(workload.batch, 0, 32), strict=True):
                held = [token for token, _ in engine._rows[n]]
                assert held == tokens[: workload.context].tolist()
            if workload is DECODE:
                session.decode([1], torch.full((4,), -math.inf))
        assert filled == [16, 0, 32, 64, 16, 0]
        session.restart(2)
        best = session.prefill(text.tokens(2, 0, 11), ExitPolicy.never())
        whole = Session(ToyEngine(None))
        whole.restart(2)
        assert best == whole.prefill(text.tokens(2, 0, 11), ExitPolicy.never())

    def test_times_a_prompt_only_where_the_policy_has_a_way_of_its_own(self) -> None:
        variants = make_variants(ToyEngine(), Text(None, 97), "4", [1], [0.9], [0.3], ", tiny")
        taking = {variant.name: variant.takes(PROMPT) for variant in variants}
        names = ["backbone", "full 4-bit", "exit after 1", "similarity > 0.9"]
        names += [f"{name}, second look 0.3" for name in names[1:]]
        takes = [1, 1, 0, 0, 0, 0, 0]
        assert taking == dict(zip([f"{name}, tiny" for name in names], takes, strict=True))
        with pytest.raises(ConfigError, match="exit layer is 5"):
            make_variants(ToyEngine(), Text(None, 97), "4", [5])


def test_lossless_mode_decodes_as_many_tokens_without_an_end(lm: RiverLM) -> None:
    lm.stop_tokens = frozenset(range(lm.engine.vocab_size))
    lm.policy = ExitPolicy.always()
    variant = LosslessVariant("lossless", lm, Text(None, 97))
    for workload in (DECODE, Workload("decode", 4, 20, 2), Workload("decode", 1, 63)):
        variant.prepare(workload)
        timing = variant.run(workload)
        assert timing.tokens == workload.batch * workload.tokens
        assert 0 < timing.seconds < math.inf
    assert not variant.takes(PROMPT)


def test_pytorch_reads_where_the_core_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "is_built", lambda: False)
    bandwidth._buffer.cache_clear()
    assert bandwidth.read_bandwidth(1) > 0
    bandwidth._buffer.cache_clear()


class TestRandomWeights:
    @pytest.mark.parametrize("tied", [True, False])
    def test_layers_are_copies_in_memory_of_their_own_and_run_with_their_river(
        self, tied: bool
    ) -> None:
        config = RiverConfig(4, 64, "rtn")
        model = random_model({**TINY_SHAPE, "tie_word_embeddings": tied})
        river = random_river(model, config)
        first, *others = [layer.mlp.up_proj.weight for layer in model.model.layers]
        assert first.dtype == torch.bfloat16
        assert first.detach().float().std() == pytest.approx(0.02, rel=0.1)
        for weight in others:
            assert torch.equal(weight, first)
            assert weight.data_ptr() != first.data_ptr()
        codes = [layer["mlp.up_proj"].packed for layer in river.exit_layers]
        assert len({one.data_ptr() for one in codes}) == 4
        built = River.build(model, config).exit_layers[3]["mlp.up_proj"].packed
        assert torch.equal(built, codes[3])
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == tied
        session = Session(TorchEngine(attach_river(model, river)))
        session.restart(1)
        session.prefill(torch.arange(5).unsqueeze(0), ExitPolicy.never())
        thresholds = torch.tensor(ExitPolicy.fixed(2).thresholds(4))
        assert session.decode([5], thresholds)[1].tolist() == [2]

    def test_are_marked_and_have_fixed_depths_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SHAPES, "llama-3.2-1b", TINY_SHAPE)
        output = bench_json("--shape", "llama-3.2-1b", "--exit-layer", 2)
        assert output["model"] == "llama-3.2-1b (random weights)"
        for options in (("--threshold", 0.9), ("--model", "smollm2"), ("--lossless",)):
            run("bench", "--shape", "llama-3.2-1b", *options).check_fails(2, options[0])
        run("bench", "--shape", "x").check_fails(1, "there is no shape 'x'; take one of llama-3.2")


def bench_json(*options: object) -> dict[str, object]:
    """Of `river-llm bench`."""
    return run("bench", "--json", "--engine", "torch", *QUICK, *options).json


class TestCommand:
    def test_has_every_variant_in_every_test(self, model: str) -> None:
        options = ("--exit-layer", "1,2", "--threshold", 0.5, "--batch", "1,2", "--lossless")
        options += ("--second-look", 1)
        output = bench_json("--model", model, *options)
        tests: dict[str, dict[str, float]] = {}
        for result in output["results"]:
            of_test = tests.setdefault(result["test"], {})
            of_test[result["variant"]] = result["mean_exit_layer"]
            speed = result["tokens_per_second"]
            assert len(result["rounds"]) == 2
            assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]
            assert list(result["ratios"]) == ["backbone"]
        names = ["backbone", "full 4-bit", "exit after 1", "exit after 2", "similarity > 0.5"]
        looking = [f"{name}, second look 1" for name in names[1:]]
        decoding = [*names, *looking, "lossless"]
        assert {test: list(found) for test, found in tests.items()} == {
            "pp4": names[:2],
            "tg2": decoding,
            "tg2 b2": decoding,
        }
        assert (output["model"], output["engine"]) == (model, "torch")
        assert output["river"] == RiverConfig().to_dict()
        assert output["versions"].keys() >= {"python", "river-llm", "torch", "transformers"}
        assert output["command"].startswith("river-llm bench")
        assert (output["rounds"], output["threads"], output["interrupted"]) == (2, 1, False)
        assert {"date", "processor", "cores", "dtype", "fingerprint"} <= output.keys()
        assert [tests["tg2"][name] for name in names[:4]] == [4, 0, 1, 2]
        assert [tests["tg2"][name] for name in looking] == [4] * 4
        looks = {result["variant"]: result["second_looks"] for result in output["results"]}
        assert [looks[name] for name in (*names[:3], *looking[:3])] == [*[None] * 3, 1, 1, 1]
        lines = run("bench", "--model", model, "--engine", "torch", *QUICK).stdout.splitlines()
        assert lines[0].startswith(f"{model}, river of 4 bits in groups of 64 (hqq)")
        assert [line.split()[0] for line in lines[1:]] == ["engine", *["torch"] * 4]

    def test_8_bits_run_beside_and_read_fewer_bytes(self, model: str) -> None:
        pytest.importorskip("river_llm._core")
        options = ("--kv-bits", 8, "--lm-head-bits", 8, "--depth", 20, "--prompt-tokens", 0)
        output = run("bench", "--json", *QUICK, "--model", model, *options).json
        read = {result["variant"]: result["bytes_per_token"] for result in output["results"]}
        suffixes = ["", ", 8-bit KV cache", ", 8-bit head", ", 8-bit head, 8-bit KV cache"]
        assert list(read) == [n + s for s in suffixes for n in ("backbone", "full 4-bit")]
        saved = 20.5 * 4 * 2 * 2 * (2 * 16 - (16 + 4))  # positions, layers, heads, bytes
        assert read["backbone"] - read["backbone, 8-bit KV cache"] == saved
        assert read["backbone, 8-bit head"] < read["backbone"]

    @pytest.mark.parametrize(
        ("options", "exit_code", "part"),
        [
            (("--batch", "1,x"), 2, "--batch takes numbers of 1 or more"),
            (("--depth", ""), 2, "--depth takes numbers of 0 or more"),
            (("--threshold", "1.5"), 2, "--threshold takes numbers from -1 to 1"),
            (("--threshold", "nan"), 2, "--threshold takes numbers from -1 to 1"),
            (("--second-look", "0,1"), 2, "--second-look 0 looks at no token again"),
            (("--prompt-tokens", 0, "--new-tokens", 0), 2, "nothing to time"),
            (("--exit-layer", 5), 1, "the model has 4 layers"),
            (("--offload", 1), 2, "No such option: --offload"),
            (("--depth", 99_999), 1, "pp512 @ d99999 needs 100511 tokens"),
        ],
    )
    def test_what_cannot_be_is_one_line(
        self, model: str, options: tuple[object, ...], exit_code: int, part: str
    ) -> None:
        run("bench", "--model", model, *options).check_fails(exit_code, part)

    @pytest.mark.parametrize("tests_done", [0, 1])
    def test_ctrl_c_leaves_the_tests_that_were_done(self, model: str, tests_done: int) -> None:
        def interrupted(*arguments: object) -> object:
            yield from itertools.islice(measure(*arguments), tests_done)
            raise KeyboardInterrupt

        with mock.patch.object(bench, "measure", interrupted):
            outcome: Outcome = run("bench", "-m", model, "--engine", "torch", *QUICK, "--json")
        assert outcome.exit_code == 130
        if not tests_done:
            assert (outcome.stdout, outcome.stderr) == ("", "river-llm: interrupted\n")
            return
        assert "interrupted; the results are of the tests that were done" in outcome.stderr
        output = json.loads(outcome.stdout)
        assert output["interrupted"] is True
        assert {result["test"] for result in output["results"]} == {"pp4"}
