"""The benchmark: what it runs in which order, and its arithmetic, on a fake clock and engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import ConfigError, ExitPolicy, River, RiverConfig
from river_llm.benchmark import suite
from river_llm.benchmark.arms import Arm, EngineArm, EngineSession, Timing
from river_llm.benchmark.measure import Round, Spread, measure_rounds, ratio
from river_llm.benchmark.step_bytes import ModelBytes, step_bytes
from river_llm.benchmark.suite import Plan, run_suite
from river_llm.benchmark.workload import TokenSource, Workload, check_fits, make_workloads
from river_llm.engines import Draft, DraftRule, StepResult
from river_llm.engines.drafting import Choose
from river_llm.residency import OffloadStatistics

DECODE = Workload("decode", 3)
PROMPT = Workload("prompt", 5)
SIZES = ModelBytes((100, 100), (25, 25), head=40, position=2, windows=(None, None))


class FakeEngine:
    """Two layers; each sequence leaves after as many as its row says; n is followed by n + 1."""

    name = "fake"
    num_layers = 2
    context_length = None
    layer_bytes = (100, 100)
    rest_bytes = 90
    resident_layers = 2
    depth_limit: int | None = None
    offload_statistics = OffloadStatistics(2)
    device = torch.device("cpu")
    record_similarities = False

    def __init__(self, exit_layers: Sequence[int] = (1,)) -> None:
        self.policy = ExitPolicy.always()
        self.length = 0
        self.draft_head_bits = (16,)
        self.angle_limit = None
        self.exit_layers = list(exit_layers)
        self.prefills: list[tuple[int, str]] = []  # (tokens, policy)
        self.decoded: list[list[int]] = []

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        self.prefills.append((token_ids.shape[1], self.policy.kind))
        self.length += token_ids.shape[1]
        return self._result(token_ids[:, -1])

    def decode(self, token_ids: Tensor) -> StepResult:
        self.decoded.append(token_ids.tolist())
        self.length += 1
        return self._result(token_ids)

    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        raise NotImplementedError

    def keep_layers(self, count: int) -> None:
        raise NotImplementedError

    def prepare_drafts(self, lm_head_bits: int) -> None:
        raise NotImplementedError

    def draft(
        self,
        token_ids: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        raise NotImplementedError

    def rewind(self, counts: Sequence[int]) -> None:
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)

    def _result(self, token_ids: Tensor) -> StepResult:
        logits = torch.nn.functional.one_hot(token_ids + 1, 1000).float()
        return StepResult(exit_layers=torch.tensor(self.exit_layers), logits=logits)


class FakeArm:
    """Takes a second for its first pass, then `faster` times less for each one more."""

    def __init__(self, name: str, log: list[str], peer: bool = False, speed: float = 1) -> None:
        self.name = name
        self.engine = "fake"
        self.policy = None if peer else ExitPolicy.never()
        self._log = log
        self._speeds = (speed * count for count in itertools.count(1))

    def takes(self, workload: Workload) -> bool:
        return workload.kind == "decode" or self.name != "river"

    def prepare(self, workload: Workload) -> None:
        self._log.append(f"prepare {self.name}")

    def run(self, workload: Workload) -> Timing:
        self._log.append(self.name)
        read = 10.0 if workload.kind == "decode" else None
        return Timing(workload.tokens / next(self._speeds), workload.tokens, read)


class TestWorkloads:
    @pytest.mark.parametrize(
        ("workload", "name", "context", "end"),
        [
            (Workload("prompt", 512), "pp512", 0, 512),
            (Workload("prompt", 512, 4096), "pp512 @ d4096", 4096, 4608),
            (Workload("decode", 128), "tg128", 16, 144),
            (Workload("decode", 128, 4096, 8), "tg128 b8 @ d4096", 4096, 4224),
        ],
    )
    def test_are_named_as_llama_bench_names_them(
        self, workload: Workload, name: str, context: int, end: int
    ) -> None:
        assert (workload.name, workload.context, workload.end) == (name, context, end)

    def test_every_test_at_every_depth_and_only_decoding_in_batches(self) -> None:
        names = [workload.name for workload in make_workloads([512, 0], [128], [0, 64], [1, 2])]
        assert names == [
            "pp512",
            "pp512 @ d64",
            "tg128",
            "tg128 b2",
            "tg128 @ d64",
            "tg128 b2 @ d64",
        ]

    def test_that_do_not_fit_the_context_are_refused(self) -> None:
        workloads = make_workloads([8], [4], [32])
        check_fits(workloads, 40)
        check_fits(workloads, None)
        with pytest.raises(ConfigError, match=r"pp8 @ d32 needs 40 tokens .* has 39"):
            check_fits(workloads, 39)

    def test_tokens_continue_where_they_stopped_and_differ_between_sequences(self) -> None:
        source = TokenSource.for_model(None, 97)
        whole = source.take(2, 0, 2000)
        assert whole.shape == (2, 2000)
        assert whole.max() < 97
        assert torch.equal(source.take(2, 5, 3), whole[:, 5:8])
        assert not torch.equal(whole[0], whole[1])


class TestBytes:
    def test_of_a_real_model_are_those_of_its_tensors(self, tiny_llama: PreTrainedModel) -> None:
        model = tiny_llama.to(torch.bfloat16)
        sizes = ModelBytes.of(model, River.build(model, RiverConfig(4, 64, "rtn")))
        weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
        assert sizes.backbone_layers == (2 * weights,) * 4
        assert sizes.river_layers == (weights * 4.5 / 8,) * 4
        assert sizes.head == 2 * 97 * 64
        assert sizes.position == 2 * 2 * 16 * 2  # key and value, heads, width, bfloat16

    def test_of_a_step_are_the_layers_that_ran_the_head_and_the_cache(self) -> None:
        assert SIZES.step([2], 0) == 100 + 100 + 40
        assert SIZES.step([1], 0) == 100 + 25 + 40
        assert SIZES.step([0], 7) == 25 + 25 + 40 + 2 * 2 * 7

    def test_a_batch_reads_both_weights_where_it_is_split(self) -> None:
        assert SIZES.step([0, 2], 3) == 200 + 50 + 40 + 2 * (2 * 2 * 3)
        assert SIZES.step([1, 1], 0) == SIZES.step([1], 0)

    def test_a_window_bounds_the_cache_that_is_read(self) -> None:
        sizes = ModelBytes((1, 1), (1, 1), 0, position=2, windows=(None, 4))
        assert sizes.cache(3) == 2 * (3 + 3)
        assert sizes.cache(10) == 2 * (10 + 4)

    def test_an_engine_with_an_account_of_its_own_is_asked(self) -> None:
        class Accountant(FakeEngine):
            def step_bytes(self, exit_layer: int, position: int) -> int:
                return 1000 * exit_layer + 3 * position

        assert step_bytes(FakeEngine(), SIZES, [2], 5) == SIZES.step([2], 5)
        assert step_bytes(Accountant(), SIZES, [2], 5) == 2000 + 15
        # two sequences: the cache of both, and the one river layer that only one of them ran
        assert step_bytes(Accountant(), SIZES, [2, 1], 5) == 2000 + 2 * 15 + 25


class TestEngineArm:
    def test_decodes_its_own_greedy_tokens_between_two_looks_at_the_clock(self) -> None:
        engine = FakeEngine()
        session = EngineSession(engine, TokenSource(range(500)), SIZES)
        clock = iter([10.0, 12.5])
        arm = EngineArm("river", session, ExitPolicy.fixed(1), lambda: next(clock))
        arm.prepare(DECODE)
        timing = arm.run(DECODE)
        assert engine.policy == ExitPolicy.fixed(1)
        assert engine.decoded == [[16], [17], [18]]
        read = sum(SIZES.step([1], position) for position in (16, 17, 18))
        assert timing == Timing(2.5, 3, read / 3, mean_exit_layer=1)

    def test_counts_the_tokens_of_all_sequences(self) -> None:
        engine = FakeEngine(exit_layers=(0, 2))
        session = EngineSession(engine, TokenSource(range(500)), SIZES)
        clock = itertools.count(0.0)
        arm = EngineArm("river", session, ExitPolicy.similarity(0.9), lambda: next(clock))
        workload = Workload("decode", 1, depth=20, batch=2)
        arm.prepare(workload)
        assert arm.run(workload) == Timing(1, 2, SIZES.step([0, 2], 20) / 2, mean_exit_layer=1)

    def test_a_context_is_filled_once_by_the_backbone_for_all_arms(self) -> None:
        engine = FakeEngine()
        session = EngineSession(engine, TokenSource(range(500)), SIZES)
        arms = [EngineArm("a", session, ExitPolicy.never())]
        arms.append(EngineArm("b", session, ExitPolicy.always()))
        for arm in arms * 2:
            arm.prepare(DECODE)
            assert engine.length == 16
            arm.run(DECODE)
        assert engine.prefills == [(16, "never")]

    def test_a_deeper_context_is_added_to_and_another_batch_begins_anew(self) -> None:
        engine = FakeEngine()
        session = EngineSession(engine, TokenSource(range(500)), SIZES)
        for workload in (DECODE, Workload("decode", 3, 32), Workload("decode", 3, 32, 2), PROMPT):
            session.fill(workload)
            assert engine.length == workload.context
        assert [tokens for tokens, _ in engine.prefills] == [16, 32, 32]

    def test_times_a_prompt_only_where_the_policy_has_a_way_of_its_own(self) -> None:
        session = EngineSession(FakeEngine(), TokenSource(range(500)), SIZES)
        taking = {
            policy.kind: EngineArm("", session, policy).takes(PROMPT)
            for policy in (ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(1))
        }
        assert taking == {"never": True, "always": True, "fixed": False}
        sequence = ExitPolicy.similarity(0.9, prefill="sequence")
        assert EngineArm("", session, sequence).takes(PROMPT)


class TestRounds:
    def test_go_forth_and_back_each_between_two_readings_after_one_that_warms_up(self) -> None:
        log: list[str] = []

        def read_bandwidth(threads: int) -> float:
            log.append(f"read {threads}")
            return 1.0

        arms: list[Arm] = [FakeArm("a", log), FakeArm("b", log)]
        results = measure_rounds(arms, DECODE, 2, 3, read_bandwidth)
        a = ["prepare a", "read 3", "a", "read 3"]
        b = ["prepare b", "read 3", "b", "read 3"]
        assert log == ["prepare a", "a", "prepare b", "b", *b, *a, *a, *b]
        assert [len(rounds) for rounds in results] == [2, 2]

    def test_are_of_their_own_arm_in_either_order(self) -> None:
        arms: list[Arm] = [FakeArm("a", [], speed=1), FakeArm("b", [], speed=10)]
        results = measure_rounds(arms, DECODE, 3, 1, lambda threads: 1.0)
        speeds = [[round.tokens_per_second for round in rounds] for rounds in results]
        assert speeds == [[2, 3, 4], [20, 30, 40]]

    def test_speed_bandwidth_and_fraction_of_the_limit(self) -> None:
        readings = iter([100.0, 300.0])
        (rounds,) = measure_rounds(
            [FakeArm("a", [], speed=4)], DECODE, 1, 1, lambda threads: next(readings), warm_up=0
        )
        assert rounds == [Round(4, 200, 10, limit_fraction=4 * 10 / 200)]

    def test_a_prompt_has_no_limit(self) -> None:
        (rounds,) = measure_rounds([FakeArm("a", [])], PROMPT, 1, 1, lambda threads: 1.0)
        assert rounds[0].limit_fraction is rounds[0].bytes_per_token is None

    def test_spread(self) -> None:
        assert Spread.of([3, 1, 9]) == Spread(3, 1, 9)
        assert Spread.of([1, 2]).median == 1.5

    def test_a_ratio_is_taken_round_by_round(self) -> None:
        mine, others = ([Round(speed, 1) for speed in speeds] for speeds in ([2, 8, 9], [1, 2, 9]))
        assert ratio(mine, others) == Spread(2, 1, 4)


class TestSuite:
    @staticmethod
    def run(
        plan: Plan, log: list[str] | None = None, progress: suite.Progress | None = None
    ) -> list[suite.Result]:
        log = [] if log is None else log

        @contextmanager
        def make_arms(threads: int) -> Iterator[list[Arm]]:
            log.append(f"{threads} threads")
            yield [
                FakeArm("backbone", log),
                FakeArm("river", log, speed=2),
                FakeArm("peer", log, peer=True, speed=4),
            ]
            log.append("end")

        return list(run_suite(make_arms, plan, lambda threads: 100.0, progress))

    def test_runs_every_test_with_every_number_of_threads(self) -> None:
        log: list[str] = []
        results = self.run(Plan([PROMPT, DECODE], [1, 2], rounds=2), log)
        assert [(r.threads, r.workload.name, r.arm) for r in results] == [
            (threads, test, arm)
            for threads in (1, 2)
            for test, arms in (
                ("pp5", ("backbone", "peer")),
                ("tg3", ("backbone", "river", "peer")),
            )
            for arm in arms
        ]
        assert [entry for entry in log if "threads" in entry or entry == "end"] == [
            "1 threads",
            "end",
            "2 threads",
            "end",
        ]

    def test_compares_with_the_backbone_and_with_each_peer(self) -> None:
        results = self.run(Plan([DECODE], [1], rounds=3))
        ratios = {r.arm: {name: s.median for name, s in r.ratios.items()} for r in results}
        assert ratios == {
            "backbone": {"backbone": 1, "peer": 0.25},
            "river": {"backbone": 2, "peer": 0.5},
            "peer": {"backbone": 4, "peer": 1},
        }

    def test_gives_plain_values_with_every_round(self) -> None:
        river = self.run(Plan([DECODE], [2], rounds=3))[1].to_dict()
        assert river["arm"] == "river"
        assert (river["test"], river["threads"]) == ("tg3", 2)
        assert river["policy"]["kind"] == "never"
        # the first pass, at speed 2, warmed up
        assert river["tokens_per_second"] == {"median": 6, "lowest": 4, "highest": 8}
        assert river["bytes_per_token"] == 10
        assert river["limit_fraction"]["median"] == pytest.approx(0.6)
        assert [round_["tokens_per_second"] for round_ in river["rounds"]] == [4, 6, 8]
        assert river["disturbed_rounds"] == []
        assert river["worst_disturbed_over_quiet_median"] is None

    def test_disturbed_rounds_come_after_and_are_set_against_the_quiet_median(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cores = []
        monkeypatch.setattr(suite, "busy_core", lambda core: cores.append(core) or nullcontext())
        counted: list[tuple[int, int]] = []
        plan = Plan([DECODE], [1], rounds=3, disturbed_core=5)
        result = self.run(plan, progress=lambda done, total: counted.append((done, total)))[0]
        assert cores == [5]
        assert [round_.tokens_per_second for round_ in result.disturbed] == [5, 6, 7]
        assert result.worst_disturbed == 5 / 3
        assert counted == [(done, 21) for done in range(1, 22)]
