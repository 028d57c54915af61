"""`river-llm compare`: a whole comparison of a tiny model, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from evaluation_items import ITEMS, write_items
from html_page import Page

from river_llm.evaluation.result_file import read_result

pytest_plugins = ["cli_models"]

TEXT = "The river runs to the sea, slowly, and the sea is wide. " * 12
SIMILARITY = ["similarity-0.7", "similarity-0.9"]
FIGURES = {
    "frontier",
    "exit_depths",
    "exit_positions",
    "similarity",
    "cosines",
    "correlation",
    "token_times",
}


@pytest.fixture(scope="module", autouse=True)
def _memory_that_is_not_read() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("river_llm.benchmark.bandwidth.read_bandwidth", lambda threads: 5e10)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_items(tmp_path_factory.mktemp("data"), ITEMS)
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    return directory


def arguments(model: str, inputs: Path, output: Path) -> list[object]:
    return [
        "compare", model, "--tasks", "arc_easy,gsm8k", "--limit", 3, "-n", 4, "--shots", 0,
        "--text", inputs / "text.txt", "--window", 32, "--windows", 2,
        "--data-dir", inputs, "--thresholds", "0.9,0.7", "--exit-layers", "1",
        "--speed-tokens", 4, "--rounds", 2, "--engine", "torch", "--dtype", "float32",
        "--threads", 1, "-o", output, "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(model: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole comparison."""
    output = tmp_path_factory.mktemp("compare") / "out"
    summary = run(*arguments(model, inputs, output)).json
    assert summary == report(output)
    return output


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


class TestReport:
    def test_has_every_arm_on_every_task(self, folder: Path) -> None:
        found = report(folder)
        assert set(found["tasks"]) == {"arc_easy", "gsm8k", "kld"}
        planned = {"backbone", "full-4bit", "full-8bit", "exit-1", *SIMILARITY}
        planned |= {"random-0.7", "random-0.9"}
        for name, task in found["tasks"].items():
            same_depth = set(task["fixed_arm_of_the_same_depth"].values())
            assert set(task["arms"]) == planned | same_depth
            for arm, one in task["arms"].items():
                result = read_result(folder / one["file"])
                assert result.path.name == f"{name}.{arm}.jsonl"
                assert result.summary == one["summary"]
                assert one["summary"]["items"] == (2 if name == "kld" else 3)
                assert (one["beside_backbone"] is None) == (name == "kld")
        assert set(found["arms"]) == set(found["speed"]["arms"])
        assert set(found["arms"]) >= planned
        assert found["arms"]["full-8bit"]["bits"] == 8
        eight = read_result(folder / "results" / "arc_easy.full-8bit.jsonl")
        assert eight.run["river"]["bits"] == 8

    def test_the_backbone_is_the_measure(self, folder: Path) -> None:
        found = report(folder)
        for name in ("arc_easy", "gsm8k"):
            assert found["tasks"][name]["arms"]["backbone"]["beside_backbone"]["agreement"] == 1
        kld = found["tasks"]["kld"]["arms"]
        assert kld["backbone"]["summary"]["mean_kld"] == pytest.approx(0, abs=1e-9)
        means = [kld[arm]["summary"]["mean_kld"] for arm in ("full-8bit", "full-4bit")]
        assert 0 < means[0] < means[1]
        assert found["speed"]["arms"]["backbone"]["ratios"]["backbone"]["median"] == 1
        assert found["speed"]["arms"]["backbone"]["mean_exit_layer"] == 4
        assert found["speed"]["arms"]["exit-1"]["mean_exit_layer"] == 1

    def test_random_arms_draw_from_the_depths_of_their_task(self, folder: Path) -> None:
        tasks = report(folder)["tasks"]
        assert len(tasks["kld"]["arms"]["random-0.9"]["policy"]["depths"]) > 1
        for name, task in tasks.items():
            for tau in ("0.7", "0.9"):
                depths = dict(task["arms"][f"similarity-{tau}"]["summary"]["exit_layers"])
                if name == "gsm8k":  # the first token of each answer is the prompt's
                    depths["4"] -= 3
                drawn = task["arms"][f"random-{tau}"]["policy"]["depths"]
                assert drawn == [[int(layer), n] for layer, n in depths.items() if n]
                ran = task["arms"][f"random-{tau}"]["summary"]["exit_layers"]
                assert set(ran) <= {str(layer) for layer, _ in drawn} | {"4"}

    def test_random_arms_carry_the_weights_that_they_ran_on(self, folder: Path) -> None:
        runs = [
            read_result(folder / "results" / f"arc_easy.{arm}.jsonl").run
            for arm in ("backbone", "random-0.7")
        ]
        assert runs[0]["weights"] == runs[1]["weights"]
        assert runs[0]["engine_setting"] == runs[1]["engine_setting"]

    def test_each_question_is_put_to_each_threshold(self, folder: Path) -> None:
        contests = report(folder)["contests"]
        questions = {"fixed depth", "random routing", "full-4bit", "full-8bit"}
        assert {(c["measure"], c["question"], c["arm"]) for c in contests} == {
            (measure, question, arm)
            for measure in ("accuracy", "kld")
            for question in questions
            for arm in SIMILARITY
        }
        for contest in contests:
            if contest["question"] == "fixed depth":
                assert abs(contest["depth"] - contest["other_depth"]) <= 0.5
            assert 0 < contest["p"] <= contest["p_adjusted"] <= 1

    def test_every_file_is_there(self, folder: Path) -> None:
        found = report(folder)
        assert set(found["figures"]) == FIGURES
        for path in found["figures"].values():
            assert (folder / path).read_bytes().startswith(b"\x89PNG")
        left = {path.name for path in folder.iterdir()}
        assert left == {"report.json", "report.md", "report.html", "figures", "results",
                        "measurements"}  # fmt: skip

    def test_the_page_needs_nothing_else(self, folder: Path) -> None:
        text = (folder / "report.html").read_text(encoding="utf-8")
        references = Page(text).references
        assert len(references) == len(FIGURES)
        assert all(reference.startswith("data:image/png;base64,") for reference in references)
        assert "http" not in text
        assert "<script" not in text

    def test_tells_the_findings_and_how_they_came_about(self, folder: Path) -> None:
        found = report(folder)
        page = (folder / "report.html").read_text(encoding="utf-8")
        markdown = (folder / "report.md").read_text(encoding="utf-8")
        assert markdown.index("## Findings") < markdown.index("## How it was measured")
        assert len(found["findings"]) == 11
        assert "Best at each speed, by accuracy" in found["findings"][0]
        first, second = (found["tasks"][name]["arms"] for name in ("arc_easy", "gsm8k"))
        errors = [  # of the mean over two tasks
            sum(one[arm]["summary"]["standard_error"] ** 2 for one in (first, second)) ** 0.5 / 2
            for arm in set(first) & set(second)
        ]
        told = f"the standard error is up to {100 * max(errors):.1f} points."
        assert found["findings"][0].endswith(told)
        errors = [
            one["summary"]["mean_kld_error"] for one in found["tasks"]["kld"]["arms"].values()
        ]
        assert found["findings"][1].endswith(f"is up to {max(errors):.4f} nats.")
        assert f"    {found['command']}" in markdown
        assert found["model"]["weights"] in page
        assert found["processor"] in page
        for name in found["figures"].values():
            assert f"]({name})" in markdown

    def test_layers_are_read_along_the_text(self, folder: Path) -> None:
        layers = report(folder)["layers"]
        for name in SIMILARITY:
            assert [len(window) for window in layers["exits"][name]] == [32, 32]
        for name in ("key_cosine", "value_cosine", "correlation_by_layer"):
            assert len(layers[name]) == 4
        assert layers["tokens"] == 2 * 31
        assert -1 <= layers["early_correlation"] <= 1


def test_a_second_run_only_writes_the_report(
    model: str, inputs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    first = report(output)
    (output / "report.html").unlink()

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("it ran again")

    for name in ("prefill", "decode", "score"):
        monkeypatch.setattr(f"river_llm.engines.TorchEngine.{name}", refuse)
    monkeypatch.setattr("river_llm.report.compare.read_layers", refuse)
    second = run(*arguments(model, inputs, output), "--batch-size", 2).json
    for name in ("tasks", "speed", "layers", "measured_by", "contests", "findings"):
        assert second[name] == first[name]
    assert second["command"].endswith("--batch-size 2")
    for name in ("speed", "layers"):
        assert second["measured_by"][name]["command"] == first["command"]
        line = f"| {name} measured | {first['measured_by'][name]['date']} by river-llm compare "
        assert line in (output / "report.md").read_text(encoding="utf-8")
    assert (output / "report.html").is_file()


def test_a_run_that_was_cut_short_goes_on(
    model: str, inputs: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    path = output / "results" / "arc_easy.random-0.7.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:3]) + whole[3][:-9])  # one item, and a part of the next
    (output / "measurements" / "layers.json").write_text('{"identity"', encoding="utf-8")
    first, second = report(folder), run(*arguments(model, inputs, output)).json
    kept = ("accuracy", "exit_layers", "mean_exit_layer")
    one, other = (r["tasks"]["arc_easy"]["arms"]["random-0.7"]["summary"] for r in (first, second))
    assert [one[name] for name in kept] == [other[name] for name in kept]
    assert first["layers"] == second["layers"]
    assert len(read_result(path).parts) == 2


def test_without_speed_and_random_routing(model: str, inputs: Path, tmp_path: Path) -> None:
    outcome = run(
        "compare", model, "--tasks", "blimp", "--limit", 2, "--data-dir", inputs, "--no-speed",
        "--no-random", "--thresholds", 0.7, "--window", 16, "--windows", 1, "--threads", 1,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    assert "- Similarity against fixed depth at its own mean depth, by accuracy" in outcome.stdout
    found = report(tmp_path / "out")
    assert found["speed"] is None
    assert not any(name.startswith("random") for name in found["arms"])
    assert "token_times" not in found["figures"]
    assert found["text"] == "the benchmark's own prose"


class TestStrategies:
    STRATEGIES = ("mask", "monotonic")
    ON_TORCH = ("backbone", "full-4bit", "exit-2", *SIMILARITY)

    @pytest.fixture(scope="class")
    def folder(self, model: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Of a comparison whose backbone and river run on the native engine."""
        pytest.importorskip("river_llm._core")
        output = tmp_path_factory.mktemp("strategies") / "out"
        with pytest.MonkeyPatch.context() as patch:
            # layers are read on the model that was loaded for the torch engine
            patch.setattr("river_llm.cli.compare.load_attached", lambda _: pytest.fail("again"))
            outcome = run(
                "compare", model, "--tasks", "arc_easy", "--limit", 3, "--data-dir", inputs,
                "--text", inputs / "text.txt", "--window", 32, "--windows", 1,
                "--thresholds", "0.7,0.9", "--exit-layers", 2, "--no-random",
                "--strategies", "mask, monotonic", "--speed-tokens", 6, "--rounds", 1,
                "--threads", 1, "--engine", "cpu", "-o", output,
            )  # fmt: skip
        assert outcome.exit_code == 0, outcome.stderr
        assert "- Best at each speed on the torch engine, by accuracy" in outcome.stdout
        return output

    def test_run_at_every_threshold_and_exit_layer(self, folder: Path) -> None:
        found = report(folder)
        for strategy in self.STRATEGIES:
            for rule in ("exit-2", "0.7", "0.9"):
                arm = found["arms"][f"{strategy}-{rule}"]
                assert (arm["kind"], arm["strategy"]) == ("strategy", strategy)
                result = read_result(folder / "results" / f"arc_easy.{strategy}-{rule}.jsonl")
                assert (result.run["strategy"], result.run["engine"]) == (strategy, "torch")
                assert result.run["river"] is None
        assert found["arms"]["similarity-0.7"]["strategy"] == "river"
        assert found["tasks"]["kld"]["arms"]["mask-exit-2"]["summary"]["mean_kld"] > 0

    def test_are_timed_beside_backbone_and_river_on_their_own_engine(self, folder: Path) -> None:
        found = report(folder)
        speed = found["speed"]["arms"]
        assert set(self.ON_TORCH) <= set(found["arms_on_torch"])
        assert {"full-8bit", "mask-0.7"}.isdisjoint(found["arms_on_torch"])
        for name, timed in found["arms_on_torch"].items():
            assert timed == f"{name}-torch"
            assert (speed[name]["engine"], speed[timed]["engine"]) == ("cpu", "torch")
        for name in ("mask-exit-2", "monotonic-0.7"):
            assert speed[name]["engine"] == "torch"
            assert speed[name]["ratios"].keys() >= {"backbone-torch", "full-4bit-torch"}
        assert speed["mask-exit-2"]["mean_exit_layer"] == 2
        markdown = (folder / "report.md").read_text(encoding="utf-8")
        first, second = markdown.split("## The other strategies")
        assert "| mask-exit-2 | torch |" in second
        assert "| backbone-torch | torch |" in second
        assert "| backbone | cpu |" in first
        assert "| mask-exit-2 |" not in first
        heading = next(line for line in second.splitlines() if line.startswith("| arm | engine"))
        assert "times backbone-torch | times full-4bit-torch |" in heading

    def test_have_figures_of_their_own(self, folder: Path) -> None:
        figures = report(folder)["figures"]
        assert set(figures) == FIGURES | {"strategies", "strategy_times"}
        for path in figures.values():
            assert (folder / path).read_bytes().startswith(b"\x89PNG")

    def test_are_held_against_the_river_at_the_same_threshold(self, folder: Path) -> None:
        found = report(folder)
        for strategy in self.STRATEGIES:
            rows = [c for c in found["contests"] if c["question"] == strategy]
            assert [(row["measure"], row["arm"], row["against"]) for row in rows] == [
                (measure, f"similarity-{tau}", f"{strategy}-{tau}")
                for measure in ("accuracy", "kld")
                for tau in ("0.7", "0.9")
            ]
        start = "Similarity against monotonic at the same threshold, by accuracy"
        assert any(finding.startswith(start) for finding in found["findings"])

    def test_need_no_second_model_where_all_run_on_torch(
        self, model: str, inputs: Path, tmp_path: Path
    ) -> None:
        found = run(
            "compare", model, "--tasks", "blimp", "--limit", 2, "--data-dir", inputs,
            "--no-random", "--thresholds", 0.7, "--strategies", "recompute,propagate",
            "--window", 16, "--windows", 1, "--speed-tokens", 4, "--rounds", 1, "--threads", 1,
            "--engine", "torch", "-o", tmp_path / "out", "--json",
        ).json  # fmt: skip
        assert all(name == timed for name, timed in found["arms_on_torch"].items())
        assert set(found["speed"]["arms"]) == set(found["arms"])

    def test_without_speed_have_no_figure(self, model: str, inputs: Path, tmp_path: Path) -> None:
        found = run(
            "compare", model, "--tasks", "blimp", "--limit", 2, "--data-dir", inputs,
            "--no-speed", "--no-random", "--thresholds", 0.7, "--strategies", "mask",
            "--window", 16, "--windows", 1, "--threads", 1, "-o", tmp_path / "out", "--json",
        ).json  # fmt: skip
        assert set(found["figures"]) == FIGURES - {"token_times"}
        assert found["arms"]["mask-0.7"]["kind"] == "strategy"
        markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert "## The other strategies" not in markdown
        assert "No speed was measured: the backbone layers that are spared" in markdown


USAGE: dict[str, tuple[list[object], str]] = {
    "an unknown task": (["--tasks", "gsm8"], "no task 'gsm8'; did you mean gsm8k"),
    "a task twice": (["--tasks", "piqa,piqa"], "named twice"),
    "a task of a text": (["--tasks", "kld"], "kld is no task with answers; --text FILE"),
    "nothing": (["--tasks", ""], "there is nothing to compare on"),
    "no thresholds": (["--thresholds", ","], "give one threshold or more"),
    "a threshold that is a word": (["--thresholds", "0.9,x"], "--thresholds is '0.9,x'"),
    "a threshold that is no cosine": (["--thresholds", "1.5"], "choose one in [-1, 1]"),
    "no seed": (["--seed", -1], "--seed"),
    "half a layer": (["--exit-layers", "1.5"], "--exit-layers is '1.5'; give numbers"),
    "a strategy that has no exits": (["--strategies", "mask,none"], "--strategies is 'none'; give"),
    "an unknown strategy": (["--strategies", "hope"], "some of mask, recompute, propagate, monot"),
    "a strategy twice": (["--strategies", "mask,mask"], "a strategy is named twice"),
    "a strategy's cache in 8 bits": (
        ["--strategies", "mask", "--kv-bits", 8],
        "--strategies keep their KV cache in the model's dtype",
    ),
    "a seed for nothing": (["--no-random", "--seed", 0], "--no-random leaves random routing out"),
    "tokens of no speed": (["--no-speed", "--speed-tokens", 256], "none; leave --speed-tokens out"),
    "rounds of no speed": (
        ["--no-speed", "--rounds", 5],
        "--no-speed measures none; leave --rounds out",
    ),
    "a text that is not there": (["--text", "no-such-file"], "no-such-file can't be read"),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_told_before_the_model_is_loaded(
    options: list[object], message: str
) -> None:
    run("compare", "no-such-model", *options).check_fails(2, message)


def test_what_only_the_model_can_tell_is_told(model: str, inputs: Path, tmp_path: Path) -> None:
    common = ["compare", model, "--data-dir", inputs, "--threads", 1]
    output = tmp_path / "out"
    outcome = run(*common, "--exit-layers", 9, "-o", output)
    outcome.check_fails(1, "the exit layer is 9, but the model has 4 layers")
    outcome = run(*common, "--tasks", "humaneval", "-o", output)
    outcome.check_fails(1, "humaneval runs programs that the model wrote")
    outcome = run(*common, "--speed-tokens", 100_000, "-o", output)
    outcome.check_fails(1, "--speed-tokens is 100000; the model's context has room for 99984")
    assert not output.exists()
    output.write_text("a file")
    outcome = run(*common, "--tasks", "piqa", "-o", output)
    outcome.check_fails(1, "can't be written")
