"""`river-llm eval`: what it prints, resumption, comparison, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, run, start
from evaluation_items import ITEMS, write_items

from river_llm.evaluation.result_file import read_result

pytest_plugins = ["cli_models"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("data"), ITEMS)


class TestRuns:
    @pytest.fixture(autouse=True)
    def _somewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def evaluate(self, model: str, data: Path, *arguments: object) -> Outcome:
        common = ("--model", model, "--data-dir", data, "--engine", "torch", "--threads", 1)
        return run("eval", *arguments, *common)

    def test_a_result_carries_all_that_a_figure_needs(self, model: str, data: Path) -> None:
        output = self.evaluate(
            model, data, "gsm8k", "--shots", 1, "-n", 8, "--exit-layer", 2, "--limit", 3, "--json"
        ).json
        (result,) = output["results"]
        assert (result["task"], result["arm"]) == ("gsm8k", "exit-2")
        assert result["file"] == "eval-results/gsm8k.exit-2.jsonl"
        found = result["run"]
        assert found["model"] == model
        assert found["weights"].startswith("sha256:")
        assert found["river"] == {"bits": 4, "group_size": 64, "quantizer": "hqq"}
        assert found["policy"]["exit_layer"] == 2
        assert found["engine"] == "torch"
        assert (found["shots"], found["form"], found["max_new_tokens"]) == (1, "text", 8)
        assert found["data"].startswith("sha256:")
        (part,) = result["parts"]
        assert part["command"].startswith("river-llm eval gsm8k")
        assert part["versions"].keys() >= {"python", "river-llm", "torch", "transformers"}
        assert part.keys() >= {"date", "processor", "cores", "batch_size", "engine_setting"}
        summary = result["summary"]
        assert summary["items"] == 3
        assert summary["tokens_per_second"] > 0
        assert set(summary["exit_layers"]) <= {"2", "4"}  # the first token is the prompt's
        assert result["comparison"] is None
        records = read_result(Path(result["file"])).items
        assert set(records) == {0, 1, 2}
        assert {"prediction", "correct", "answer", "exit_layers", "tokens"} <= set(records[0])

    def test_a_kv_cache_of_8_bits_is_another_run(self, model: str, data: Path) -> None:
        task = ("arc_easy", "--limit", 2, "--json")
        (result,) = self.evaluate(model, data, *task, "--kv-bits", 8).json["results"]
        assert result["run"]["engine_setting"]["kv_bits"] == 8
        assert "KV cache 8 bits" in result["parts"][0]["engine_setting"]
        self.evaluate(model, data, *task).check_fails(1, "engine_setting.kv_bits is 8 there")

    def test_the_backbone_is_compared_item_by_item(self, model: str, data: Path) -> None:
        outcome = self.evaluate(
            model, data, "arc_easy", "blimp", "--policy", "always", "--compare-backbone", "--json"
        )
        results = outcome.json["results"]
        assert [(r["task"], r["arm"]) for r in results] == [
            ("arc_easy", "backbone"),
            ("arc_easy", "full-4bit"),
            ("blimp", "backbone"),
            ("blimp", "full-4bit"),
        ]
        assert [r["comparison"] is None for r in results] == [True, False, True, False]
        compared = results[1]["comparison"]
        assert compared["policy"]["kind"] == "never"
        assert compared["items"] == 6
        assert 0 <= compared["agreement"] <= 1
        assert 0 < compared["mcnemar_p"] <= 1

    def test_a_table_is_for_people(self, model: str, data: Path) -> None:
        outcome = self.evaluate(model, data, "arc_easy", "--policy", "never", "--compare-backbone")
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.stdout.count("backbone") == 1  # the policy is the backbone
        assert " ± " in outcome.stdout
        assert "eval-results/arc_easy.backbone.jsonl" in outcome.stderr

    def test_it_is_compared_with_a_result_file(self, model: str, data: Path) -> None:
        self.evaluate(model, data, "arc_easy", "--policy", "never", "-o", "first")
        outcome = self.evaluate(
            model, data, "arc_easy", "--policy", "never", "-o", "second",
            "--against", "first/arc_easy.backbone.jsonl", "--json",
        )  # fmt: skip
        compared = outcome.json["results"][0]["comparison"]
        assert compared["agreement"] == 1
        assert compared["with"] == "first/arc_easy.backbone.jsonl"

    @pytest.mark.parametrize(
        ("options", "arms"),
        [
            (["--policy", "never"], ["backbone"]),
            (["--policy", "never", "--prefill", "backbone"], ["backbone"]),
            (["--policy", "never", "--prefill", "river"], ["backbone", "backbone-prefill-river"]),
        ],
    )
    def test_only_the_untouched_model_is_the_backbone(
        self, model: str, data: Path, options: list[str], arms: list[str]
    ) -> None:
        output = self.evaluate(model, data, "arc_easy", *options, "--compare-backbone", "--json")
        results = output.json["results"]
        assert [result["arm"] for result in results] == arms
        assert [result["comparison"] is None for result in results] == [True, False][: len(arms)]

    def test_a_result_of_another_task_is_refused_before_loading(
        self, model: str, data: Path
    ) -> None:
        self.evaluate(model, data, "arc_easy", "--policy", "never")
        path = Path("eval-results/arc_easy.backbone.jsonl")
        against = ("--against", path)
        outcome = self.evaluate("no-such-model", data, "piqa", *against)
        outcome.check_fails(1, f"{path} is of the task arc_easy, not piqa")
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))
        outcome = self.evaluate("no-such-model", data, "arc_easy", *against)
        outcome.check_fails(1, f"{path} is not whole")

    def test_a_result_of_other_items_is_refused_before_any_is_answered(
        self, model: str, data: Path
    ) -> None:
        self.evaluate(model, data, "arc_easy", "--policy", "never")
        against = ("--against", "eval-results/arc_easy.backbone.jsonl")
        outcome = self.evaluate(model, data, "arc_easy", "--limit", 2, "-o", "second", *against)
        outcome.check_fails(1, "it has 6 items, not the 2 of this run")
        assert not Path("second").exists()

    def test_a_text_gets_its_block(self, model: str, data: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("The river runs to the sea. " * 40)
        arguments = ["--text", text, "--window", 32, "--limit", 2]
        outcome = run(
            "eval", "kld", "perplexity", *arguments, "--model", model, "--policy", "never"
        )
        assert outcome.exit_code == 0, outcome.stderr
        assert "Mean    KLD:   0.000000 ±   0.000000" in outcome.stdout
        assert "Same top p: 100.000 ±" in outcome.stdout
        assert "backbone: perplexity " in outcome.stdout

    def test_the_same_command_goes_on(self, model: str, data: Path) -> None:
        first = self.evaluate(model, data, "arc_easy", "--json").json["results"][0]
        path = Path(first["file"])
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:4]) + lines[4][:-20])  # two items and a part of a third
        second = self.evaluate(model, data, "arc_easy", "--json").json["results"][0]
        assert len(second["parts"]) == 2
        assert second["summary"]["accuracy"] == first["summary"]["accuracy"]
        assert second["summary"]["items"] == 6

    def test_another_config_is_refused(self, model: str, data: Path) -> None:
        self.evaluate(model, data, "arc_easy")
        outcome = self.evaluate(model, data, "arc_easy", "--bits", 8)
        outcome.check_fails(1, "is of another run (river.bits is 4 there and 8 here)", "--restart")
        again = self.evaluate(model, data, "arc_easy", "--bits", 8, "--restart")
        assert again.exit_code == 0, again.stderr

    def test_ctrl_c_keeps_what_was_answered(self, model: str, data: Path, tmp_path: Path) -> None:
        many = write_items(
            tmp_path / "many", {"arc_easy_test.jsonl": ITEMS["arc_easy_test.jsonl"] * 400}
        )
        arguments = ["--data-dir", many, "--model", model, "--threads", 1, "--batch-size", 1]
        process = start("eval", "arc_easy", *arguments)
        path = tmp_path / "eval-results" / "arc_easy.similarity-0.9.jsonl"
        while not path.exists() or path.read_bytes().count(b'"item"') < 3:
            assert process.poll() is None, process.stderr
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert output == b""
        assert b"interrupted after " in errors
        assert b"the same command goes on" in errors
        assert errors.count(b"\n") == 1
        result = read_result(path)
        assert result.summary is None
        assert 3 <= len(result.items) < 2400


USAGE: dict[str, tuple[list[object], str]] = {
    "no task": ([], "Missing argument"),
    "an unknown task": (["gsm8"], "no task 'gsm8'; did you mean gsm8k"),
    "a task twice": (["piqa", "piqa"], "named twice"),
    "no text": (["kld"], "kld needs --text FILE"),
    "a text for nothing": (["piqa", "--text", "x"], "read a text; leave --text out"),
    "against for two": (["piqa", "boolq", "--against", "x"], "--against goes with one task"),
    "against for a text": (["kld", "--text", "x", "--against", "x"], "task that has answers"),
    "a window for nothing": (["piqa", "--window", 64], "leave --window out"),
    "a text that is not there": (["kld", "--text", "/none"], "/none can't be read as text"),
    "shots for a text": (
        ["kld", "--text", __file__, "--shots", 3],
        "leave --shots out",
    ),
    "a chat for a text": (["kld", "--text", __file__, "--no-chat"], "leave --chat out"),
    "a length for a text": (
        ["kld", "--text", __file__, "-n", 3],
        "leave --max-new-tokens out",
    ),
    "a first layer too many": (["piqa", "--exit-layer", 1, "--first-layer", 2], "not fixed"),
    "a threshold too many": (["piqa", "--threshold", 0.9, "--exit-layer", 1], "not both"),
    "no items": (["piqa", "--limit", 0], "--limit"),
}


class TestRefusals:
    @pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
    def test_wrong_usage_is_told_before_the_model_is_loaded(
        self, arguments: list[object], message: str
    ) -> None:
        run("eval", *arguments, "--model", "no-such-model").check_fails(2, message)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["humaneval"],
                "humaneval: humaneval runs programs that the model wrote; --allow-code",
            ),
            (["piqa", "--chat"], "piqa: --chat and --max-new-tokens are for generated answers"),
            (["blimp", "--shots", 2], "blimp: this task has no examples"),
            (["gsm8k", "--shots", 10], "gsm8k: --shots is 10, but there are 9 examples"),
        ],
    )
    def test_what_does_not_go_with_the_task_is_told(
        self, model: str, data: Path, tmp_path: Path, arguments: list[object], message: str
    ) -> None:
        common = ["--model", model, "--data-dir", data, "-o", tmp_path / "out"]
        run("eval", *arguments, *common).check_fails(2, message)
        assert not (tmp_path / "out").exists()

    def test_data_that_is_not_there_is_told(self, model: str, tmp_path: Path) -> None:
        common = ["--model", model, "-o", tmp_path / "out"]
        outcome = run("eval", "piqa", *common, "--data-dir", tmp_path / "none")
        outcome.check_fails(1, "there is no data directory", "--data-dir names it")
        outcome = run("eval", "piqa", *common, "--data-dir", tmp_path)
        outcome.check_fails(1, "has no file piqa_valid*.jsonl")

    def test_a_line_that_is_no_json_is_told(self, model: str, tmp_path: Path) -> None:
        (tmp_path / "piqa_valid.jsonl").write_text(json.dumps(ITEMS["piqa_valid.jsonl"][0]) + "\n{")
        outcome = run("eval", "piqa", "--model", model, "--data-dir", tmp_path)
        outcome.check_fails(1, "piqa_valid.jsonl, line 2: this is no JSON")

    def test_a_result_file_to_compare_with_that_is_none_is_told(
        self, model: str, data: Path, tmp_path: Path
    ) -> None:
        notes = tmp_path / "notes.txt"
        notes.write_text("my notes\n")
        common: list[Any] = ["--model", model, "--data-dir", data, "-o", tmp_path / "out"]
        run("eval", "piqa", *common, "--against", notes).check_fails(1, "line 1: this is no line")
