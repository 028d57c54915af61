"""`river-llm bench`: what it prints, as a table and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import Outcome, run
from test_benchmark_models import TINY_SHAPE

from river_llm.benchmark import bandwidth, disturbance, peers, suite
from river_llm.benchmark.random_weights import SHAPES

pytest_plugins = ["cli_models"]

QUICK = ("--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 2, "--threads", 1)
RESULT = {
    "command",
    "date",
    "processor",
    "cores",
    "last_level_cache_bytes",
    "bandwidth_buffer_bytes",
    "bandwidth_source",
    "versions",
    "model",
    "random_weights",
    "architecture",
    "num_layers",
    "fingerprint",
    "river",
    "engine",
    "same_top",
    "llama_cpp_build",
    "notes",
    "rounds",
    "threads",
    "disturbed_core",
    "interrupted",
    "results",
}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a small buffer: nobody looks at the bandwidth here."""
    monkeypatch.setattr(bandwidth, "buffer_bytes", lambda: 1 << 20)


def bench(*options: object) -> dict[str, Any]:
    """The JSON of `river-llm bench`."""
    return run("bench", "--json", "--engine", "torch", *QUICK, *options).json


class TestJson:
    def test_carries_all_that_a_figure_needs(self, model: str) -> None:
        output = bench("--model", model, "--exit-layer", 2, "--threshold", 0.5)
        assert set(output) == RESULT
        assert output["model"] == model
        assert output["random_weights"] is False
        assert output["interrupted"] is False
        assert output["fingerprint"].startswith("sha256:")
        assert output["river"] == {"bits": 4, "group_size": 64, "quantizer": "hqq"}
        assert output["versions"].keys() >= {"python", "river-llm", "torch"}
        assert output["command"].startswith("river-llm bench")
        assert output["engine"] == "torch"
        assert (output["rounds"], output["threads"]) == (2, [1])

    def test_has_every_arm_in_every_test(self, model: str) -> None:
        output = bench(
            "--model", model, "--exit-layer", "1,2", "--threshold", 0.5, "--batch", "1,2"
        )
        tests: dict[str, list[str]] = {}
        for result in output["results"]:
            tests.setdefault(result["test"], []).append(result["arm"])
        arms = ["backbone", "full 4-bit", "exit after 1", "exit after 2", "similarity > 0.5"]
        assert tests == {"pp4": arms[:2], "tg2": arms, "tg2 b2": arms}
        exits = {r["arm"]: r["mean_exit_layer"] for r in output["results"] if r["test"] == "tg2"}
        assert exits["backbone"] == 4
        assert exits["full 4-bit"] == 0
        assert exits["exit after 2"] == 2

    def test_each_result_has_rounds_ratios_and_its_limit(self, model: str) -> None:
        output = bench("--model", model, "--depth", 20)
        for result in output["results"]:
            assert result["test"].endswith("@ d20")
            assert len(result["rounds"]) == 2
            speed = result["tokens_per_second"]
            assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]
            assert set(result["ratios"]) == {"backbone"}
            decodes = result["workload"]["kind"] == "decode"
            assert (result["limit_fraction"] is not None) == decodes
        backbone, river = (r["bytes_per_token"] for r in output["results"][2:])
        weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
        assert backbone - river == 2 * weights - weights * 4.5 / 8

    def test_8_bit_caches_run_beside_and_read_fewer_bytes(self, model: str) -> None:
        output = bench("--model", model, "--kv-bits", 8, "--depth", 20, "--prompt-tokens", 0)
        read = {result["arm"]: result["bytes_per_token"] for result in output["results"]}
        names = ["backbone", "full 4-bit"]
        assert list(read) == [*names, *(f"{name}, 8-bit KV cache" for name in names)]
        positions = 20.5  # in the cache, the mean of two steps
        saved = positions * 4 * 2 * 2 * (2 * 16 - (16 + 4))  # layers, keys and values, heads
        for name in names:
            assert read[name] - read[f"{name}, 8-bit KV cache"] == saved

    def test_transformers_runs_beside(self, model: str) -> None:
        output = bench("--model", model, "--peers", "transformers")
        peer = output["results"][-1]
        assert (peer["arm"], peer["policy"]) == ("transformers bf16", None)
        assert set(output["results"][0]["ratios"]) == {"backbone", "transformers bf16"}
        assert peer["ratios"]["transformers bf16"]["median"] == 1

    @pytest.mark.slow
    def test_llama_cpp_runs_beside_from_files_that_are_kept(
        self, model: str, tmp_path: Path
    ) -> None:
        pytest.importorskip("llama_cpp")
        output = bench("--model", model, "--peers", "llama.cpp", "--work-dir", tmp_path)
        names = ["llama.cpp bf16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
        assert [r["arm"] for r in output["results"] if r["test"] == "tg2"][2:] == names
        assert list(output["same_top"]) == names
        assert "CPU" in output["llama_cpp_build"]
        assert len(list(tmp_path.glob("*.gguf"))) == 3

    @pytest.mark.skipif(not disturbance.can_disturb(), reason="no pinning of processes here")
    def test_disturbed_rounds_are_told_apart(self, model: str) -> None:
        output = bench("--model", model, "--disturb", "--prompt-tokens", 0)
        assert output["disturbed_core"] == disturbance.disturbed_core()
        for result in output["results"]:
            assert len(result["disturbed_rounds"]) == 2
            assert result["worst_disturbed_over_quiet_median"] > 0


class TestRandomWeights:
    @pytest.fixture(autouse=True)
    def _tiny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SHAPES, "llama-3.2-1b", TINY_SHAPE)

    def test_are_marked_in_every_output(self) -> None:
        output = bench("--random-weights", "llama-3.2-1b", "--exit-layer", 2)
        assert output["model"] == "llama-3.2-1b (random weights)"
        assert output["random_weights"] is True
        assert any("random weights" in note for note in output["notes"])
        table = run("bench", "--random-weights", "llama-3.2-1b", "--engine", "torch", *QUICK)
        assert table.exit_code == 0
        assert "llama-3.2-1b (random weights)" in table.stdout

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--threshold", 0.9), "take --exit-layer"),
            (("--model", "smollm2"), "not both"),
            (("--river", "somewhere"), "leave --river out"),
        ],
    )
    def test_go_with_fixed_depths_of_their_own_model_only(
        self, options: tuple[object, ...], part: str
    ) -> None:
        run("bench", "--random-weights", "llama-3.2-1b", *options).check_fails(2, part)


class TestTable:
    def test_has_a_row_for_each_arm_and_test(self, model: str) -> None:
        outcome = run(
            "bench", "--model", model, "--engine", "torch", *QUICK, "--peers", "transformers"
        )
        assert outcome.exit_code == 0, outcome.stderr
        lines = outcome.stdout.splitlines()
        assert lines[0].startswith(f"{model}, 4 layers, river of 4 bits in groups of 64")
        rows = [line.split() for line in lines if line.startswith(("torch", "transformers"))]
        assert [row[0] for row in rows][:3] == ["torch", "torch", "transformers"]
        assert sum("tg2" in row for row in rows) == 4  # three speeds, and the peer's ratios
        assert "times as fast as" in outcome.stdout
        assert outcome.stderr == ""


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--threads", "0"), "--threads takes numbers from 1 to 1024"),
            (("--threads", "1,5000"), "--threads takes numbers from 1 to 1024"),
            (("--threads", "5000", "--memory"), "--threads takes numbers from 1 to 1024"),
            (("--batch", "1,x"), "--batch takes numbers"),
            (("--depth", ""), "--depth takes numbers of 0 or more"),
            (("--threshold", "1.5"), "--threshold takes numbers from -1 to 1"),
            (("--threshold", "nan"), "--threshold takes numbers from -1 to 1"),
            (("--exit-layer", "-1"), "--exit-layer takes numbers of 0 or more"),
            (("--peers", "vllm"), "--peers takes transformers, llama.cpp; not 'vllm'"),
            (("--work-dir", "x"), "--work-dir goes with --peers llama.cpp"),
            (("--prompt-tokens", 0, "--new-tokens", 0), "nothing to time"),
        ],
    )
    def test_wrong_usage_is_one_line(self, options: tuple[object, ...], part: str) -> None:
        run("bench", *options).check_fails(2, part)

    def test_a_missing_peer_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "llama_cpp_is_installed", lambda: False)
        outcome = run("bench", "--peers", "llama.cpp")
        outcome.check_fails(2, "pip install 'river-llm[bench]'")

    def test_a_test_longer_than_the_context(self, other_model: str) -> None:
        outcome = run("bench", "--model", other_model, "--depth", 90, "--prompt-tokens", 8)
        outcome.check_fails(1, "pp8 @ d90 needs 98 tokens", "has 96")

    def test_an_exit_layer_that_the_model_has_not(self, model: str) -> None:
        outcome = run("bench", "--model", model, "--exit-layer", 5, *QUICK)
        outcome.check_fails(1, "the model has 4 layers")

    def test_an_8_bit_head_without_the_native_engine(self, model: str) -> None:
        options = ("--engine", "torch", "--lm-head-bits", 8)
        run("bench", "--model", model, *options, *QUICK).check_fails(1, "--engine cpu")


class TestCtrlC:
    def bench(self, model: str, tests_done: int, *options: str) -> Outcome:
        """One that is interrupted after so many tests."""
        measured = [*tests_done * [suite.measure_rounds], mock.Mock(side_effect=KeyboardInterrupt)]
        with mock.patch.object(
            suite, "measure_rounds", lambda *args, **more: measured.pop(0)(*args, **more)
        ):
            return run("bench", "--model", model, "--engine", "torch", *QUICK, *options)

    def test_leaves_the_tests_that_were_done(self, model: str) -> None:
        outcome = self.bench(model, 1, "--json")
        assert outcome.exit_code == 130
        assert outcome.stderr.startswith("river-llm: interrupted; the results are of the tests")
        output = json.loads(outcome.stdout)
        assert output["interrupted"] is True
        assert [(r["test"], r["arm"]) for r in output["results"]] == [
            ("pp4", "backbone"),
            ("pp4", "full 4-bit"),
        ]
        outcome = self.bench(model, 1)
        assert outcome.exit_code == 130
        assert "pp4" in outcome.stdout
        assert "tg2" not in outcome.stdout

    def test_before_the_first_is_one_line(self, model: str) -> None:
        outcome = self.bench(model, 0, "--json")
        outcome.check_fails(130)
        assert outcome.stderr == "river-llm: interrupted\n"
