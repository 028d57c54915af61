"""`river-llm reproduce`: the paper's tables on a tiny model that the paper is made to have."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from evaluation_items import ITEMS, write_items
from html_page import Page
from packed_models import save_model

from river_llm.benchmark.memory import MemoryArm, MemoryResult, memory_arms
from river_llm.evaluation.result_file import read_result
from river_llm.reproduction import paper
from river_llm.reproduction.paper import Figures, MemoryFigures, PaperModel, TaskFigures

TINY = PaperModel(
    "tiny-1b",
    "Tiny-1B",
    "nobody/Tiny-1B",
    4,
    64,
    (0.5, 0.7),
    (0.5, 0.5),
    {
        "gsm8k": TaskFigures(Figures(99.9, 84.5), Figures(0.0), Figures(99.5, 182.9, 1e6)),
        "arc_easy": TaskFigures(river=Figures(50.0), awq=Figures(60.0, 1.0)),
    },
    MemoryFigures(22.0, 12.0, 14.0, "12.00 comes out of nothing."),
)
ARMS = ["backbone", "full-4bit", "river-0.5", "river-0.7"]


@pytest.fixture(scope="module", autouse=True)
def _quick_and_known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("river_llm.benchmark.bandwidth.read_bandwidth", lambda threads: 5e10)
        patch.setattr(paper, "MODELS", (*paper.MODELS, TINY))
        patch.setitem(sys.modules, "math_verify", None)  # as where the extra isn't installed
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = ("gsm8k", "arc_easy", "mmlu", "math500", "humaneval")
    items = {name: records for name, records in ITEMS.items() if name.startswith(kept)}
    return write_items(tmp_path_factory.mktemp("data"), items)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a model that speaks in characters, of 4 layers of width 64."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return str(save_model(directory, max_position_embeddings=100_000))


def arguments(model: str, inputs: Path, output: Path, *more: object) -> list[object]:
    speed = [] if "--no-speed" in more else ["--speed-tokens", 4, "--rounds", 2]
    return [
        "reproduce", *more, "--model", model, "--limit", 3, "-n", 4, "--data-dir", inputs,
        *speed, "--engine", "torch", "--dtype", "float32", "--threads", 1, "-o", output, "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(model: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole reproduction."""
    output = tmp_path_factory.mktemp("reproduce") / "out"
    outcome = run(*arguments(model, inputs, output, "tiny-1b"))
    assert outcome.json == report(output)
    lines = outcome.stderr.splitlines()
    assert [line.partition(" is left out: ")[0] for line in lines] == [
        "river-llm: math500",
        "river-llm: humaneval",
        "river-llm: boolq",
        "river-llm: hellaswag",
        "river-llm: arc_challenge",
    ]
    return output


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


class TestReport:
    def test_has_the_papers_arms_on_the_papers_tasks(self, folder: Path) -> None:
        tasks = report(folder)["tasks"]
        shots = {name: task["shots"] for name, task in tasks.items()}
        assert shots == {"gsm8k": 5, "arc_easy": 0, "mmlu": 0}
        for name, task in tasks.items():
            assert list(task["arms"]) == ARMS
            for arm, one in task["arms"].items():
                result = read_result(folder / one["file"])
                assert result.path.name == f"{name}.{arm}.jsonl"
                assert result.summary == one["summary"]
                assert result.run["shots"] == shots[name]
                assert one["summary"]["items"] == 3
        assert len({p.name for p in (folder / "results").iterdir()}) == len(ARMS) * len(tasks)
        gsm8k = read_result(folder / "results" / "gsm8k.river-0.5.jsonl").run
        assert (gsm8k["form"], gsm8k["max_new_tokens"]) == ("text", 4)
        assert gsm8k["policy"]["prefill"] == "sequence"
        assert gsm8k["policy"]["threshold"] == 0.5

    def test_the_backbone_is_the_measure(self, folder: Path) -> None:
        for task in report(folder)["tasks"].values():
            assert task["arms"]["backbone"]["beside_backbone"]["agreement"] == 1
            assert task["arms"]["backbone"]["summary"]["mean_exit_layer"] == 4
            assert task["arms"]["full-4bit"]["summary"]["mean_exit_layer"] == 0

    def test_speed_is_along_the_backbones_answers(self, folder: Path) -> None:
        tasks = report(folder)["tasks"]
        assert [name for name, task in tasks.items() if task["speed"]] == ["gsm8k"]
        speed = tasks["gsm8k"]["speed"]
        prompts = [
            item["prompt_tokens"]
            for item in read_result(folder / "results" / "gsm8k.backbone.jsonl").items.values()
        ]
        assert (speed["context"], speed["tokens"], speed["rounds"]) == (prompts[0], 4, 2)
        arms = tasks["gsm8k"]["arms"]
        assert arms["backbone"]["speed"]["ratios"]["backbone"]["median"] == 1
        assert arms["full-4bit"]["speed"]["mean_exit_layer"] == 0
        assert len(arms["river-0.7"]["speed"]["rounds"]) == 2

    def test_the_papers_figures_stand_beside_and_accuracies_are_marked(self, folder: Path) -> None:
        tasks = report(folder)["tasks"]
        gsm8k = tasks["gsm8k"]["arms"]
        assert gsm8k["backbone"]["paper"]["tokens_per_second"] == 84.5
        assert gsm8k["backbone"]["accuracy_against_paper"] == "lower"
        assert gsm8k["full-4bit"]["accuracy_against_paper"] == "within"
        assert gsm8k["river-0.5"]["paper"]["speed_up"] == 1e6
        assert gsm8k["river-0.7"]["paper"]["accuracy"] is None  # its table is of 0.5
        assert gsm8k["river-0.7"]["accuracy_against_paper"] is None
        assert tasks["arc_easy"]["arms"]["river-0.5"]["accuracy_against_paper"] == "within"
        assert tasks["mmlu"]["arms"]["backbone"]["accuracy_against_paper"] is None

    def test_says_what_can_be_compared_and_what_is_missing(self, folder: Path) -> None:
        found = report(folder)
        text = " ".join(found["what_can_be_compared"])
        assert "4 layers of width 64" in text
        assert "tokens/s can't be compared, at most ratios" in text
        assert "GB/s" not in text  # what a token of the tiny model reads is not known
        assert "River's arms too, whose accuracy is with the prompt leaving as a whole." in text
        assert "No speed-up is marked" in text
        assert "--limit 3" in text
        assert "--max-new-tokens 4" in text
        assert "AWQ the paper has 60.0 % on arc_easy" in text
        assert "math500 is a part" not in text  # it did not run
        left_out = {"math500", "humaneval", "boolq", "hellaswag", "arc_challenge"}
        assert found["left_out"].keys() == left_out
        assert "needs the package math-verify" in found["left_out"]["math500"]
        assert "has no file boolq_dev*.jsonl" in found["left_out"]["boolq"]

    def test_markdown_and_html_hold_the_tables(self, folder: Path) -> None:
        markdown = (folder / "report.md").read_text(encoding="utf-8")
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert markdown.startswith("# The paper's tables: Tiny-1B\n")
        assert "(99.9, ours lower)" in markdown
        assert "(1000000.00) |" in markdown  # a speed-up, without a mark
        assert "not corrected for the number of rows" in markdown
        assert "not checked against its tables" in markdown
        assert "arXiv 2604.18396" in html
        assert f"    {report(folder)['command']}" in markdown
        assert markdown.count("unknown") > 4
        tables = [line for line in markdown.splitlines() if line.startswith("| mmlu")]
        assert len(tables) == 1 + len(ARMS)
        widths = {line.count(" | ") for line in tables[1:]}
        assert len(widths) == 1
        assert Page(html).references == []

    def test_memory_is_reckoned_at_64k_beside_the_papers(self, folder: Path) -> None:
        memory = report(folder)["memory"]
        assert memory["context"] == 65_536
        sizes = memory["expected_bytes"]
        assert sizes["full-4bit"] < sizes["river-0.5, offloaded"] <= sizes["river-0.5"]
        assert sizes["backbone"] < sizes["river-0.5"]
        markdown = (folder / "report.md").read_text(encoding="utf-8")
        assert "| 22.00 |" in markdown
        assert "The paper's figures: 12.00 comes out of nothing." in markdown
        rows = {line.split(" | ")[0]: line for line in markdown.splitlines()}
        assert rows["| river-0.5, offloaded"].endswith("| 14.00 |")
        assert rows["| river-0.7, offloaded"].endswith("| unknown |")


def test_a_second_run_computes_nothing_anew(
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
    second = run(*arguments(model, inputs, output, "tiny-1b")).json
    for name in ("tasks", "memory", "left_out", "what_can_be_compared"):
        assert second[name] == first[name]
    assert (output / "report.html").is_file()


def test_a_run_that_was_cut_short_goes_on(
    model: str, inputs: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    path = output / "results" / "arc_easy.river-0.7.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:3]) + whole[3][:-9])  # one item, and a part of the next
    first, second = report(folder), run(*arguments(model, inputs, output, "tiny-1b")).json
    one, other = (r["tasks"]["arc_easy"]["arms"]["river-0.7"] for r in (first, second))
    for name in ("accuracy", "exit_layers"):
        assert one["summary"][name] == other["summary"][name]
    assert len(read_result(path).parts) == 2


def test_results_of_other_settings_are_refused(
    model: str, inputs: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    outcome = run(*arguments(model, inputs, output, "tiny-1b", "--group-size", 32))
    assert outcome.exit_code == 1
    assert "is of another run (river.group_size is 64 there and 32 here)" in outcome.stderr
    assert report(output) == report(folder)


class TestOtherModels:
    def common(self, model: str, inputs: Path, output: Path, *more: object) -> list[object]:
        tasks = ["--tasks", "arc_easy,humaneval", "--no-speed"]
        return arguments(model, inputs, output, *tasks, *more)

    def test_stand_beside_the_papers_figures_with_no_mark(
        self, model: str, inputs: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        found = run(*self.common(model, inputs, output, "--as", "tiny-1b")).json
        assert list(found["tasks"]) == ["arc_easy"]
        arms = found["tasks"]["arc_easy"]["arms"]
        assert arms["river-0.5"]["paper"]["accuracy"] == 50
        assert arms["river-0.5"]["accuracy_against_paper"] is None
        assert "none of them can be compared" in found["what_can_be_compared"][0]
        markdown = (output / "report.md").read_text(encoding="utf-8")
        assert "ours is" not in markdown
        assert "## Speed" not in markdown

    def test_have_no_figures_of_the_paper_unless_it_is_asked(
        self, model: str, inputs: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        options = ["--thresholds", "0.9", "--prefill", "backbone"]
        found = run(*self.common(model, inputs, output, *options)).json
        assert list(found["tasks"]["arc_easy"]["arms"]) == ["backbone", "full-4bit", "river-0.9"]
        assert found["paper"]["model"] is None
        assert "has no figures of it" in found["what_can_be_compared"][0]
        markdown = (output / "report.md").read_text(encoding="utf-8")
        assert "unknown" not in markdown
        assert "(paper" not in markdown

    def test_are_not_taken_for_the_papers(self, model: str, inputs: Path, tmp_path: Path) -> None:
        outcome = run(*arguments(model, inputs, tmp_path / "out", "phi-4-mini"))
        outcome.check_fails(
            1, "has 4 layers of width 64, Phi-4-mini has 32 of 3072", "--as phi-4-mini --model"
        )
        assert not (tmp_path / "out").exists()


def test_a_table_is_for_people(model: str, inputs: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(folder, output)
    outcome = run(*arguments(model, inputs, output, "tiny-1b")[:-1])
    assert outcome.exit_code == 0, outcome.stderr
    assert "river-0.5 speed-up" in outcome.stdout
    assert "(99.9, ours lower)" in outcome.stdout
    assert "report.html, report.md, report.json" in outcome.stdout


def test_memory_is_measured_where_it_is_asked(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("river_llm._core", reason="the native engine was not built")
    asked: list[tuple[list[MemoryArm], list[int], int]] = []

    def measure(
        directory: Path, arms: list[MemoryArm], contexts: list[int], tokens: int, rounds: int,
        threads: int, kv_bits: int, step_done: Any,
    ) -> list[MemoryResult]:  # fmt: skip
        assert (directory / "engine.json").is_file()
        assert kv_bits == 16
        asked.append((arms, contexts, rounds))
        sizes = [(place + 1) << 30 for place in range(len(arms))]
        return [
            MemoryResult(arm.name, contexts[0], 9.0, size, size + (1 << 28), 1 << 29, size, 0)
            for arm, size in zip(arms, sizes, strict=True)
        ]

    monkeypatch.setattr("river_llm.reproduction.measured_memory.measure_memory", measure)
    model = save_model(tmp_path / "model", max_position_embeddings=256)
    command: list[object] = [
        "reproduce", "--as", "tiny-1b", "--model", model, "--tasks", "mmlu", "--limit", 1,
        "--data-dir", inputs, "--thresholds", 0.5, "--measure-memory", "--rounds", 1,
        "--threads", 1, "-o", tmp_path / "out", "--json",
    ]  # fmt: skip
    memory = run(*command).json["memory"]
    assert (memory["context"], memory["measured_context"]) == (256, 192)
    depth = memory["offload_depths"]["river-0.5"]
    backbone, quantised, *river = memory_arms(4, depth, 4)
    assert asked == [([backbone, replace(quantised, name="full-4bit"), *river], [192], 1)]
    assert memory["measured"]["backbone"]["held_bytes"] == 1 << 29
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Measured at 192 tokens" in markdown
    assert "| full-4bit | 2.00 | 1.50 | 2.00 | 2.25 | 9.0 |" in markdown
    assert "full 4-bit" not in markdown
    assert f"every token leaves after {depth} backbone layers, the mean depth of river" in markdown
    assert "The model takes no more tokens; the paper's figures are at 65,536." in markdown
    assert run(*command).json["memory"] == memory
    assert len(asked) == 1


def test_the_list_needs_no_model() -> None:
    outcome = run("reproduce", "--list")
    assert outcome.exit_code == 0
    assert "math500: MATH, 4-shot" in outcome.stdout
    assert "llama-3.1-8b-instruct: meta-llama/Llama-3.1-8B-Instruct, 32 layers" in outcome.stdout
    assert "thresholds 0.8 and 0.9" in outcome.stdout
    assert "River, AWQ" in outcome.stdout
    listed = run("reproduce", "--list", "--json").json
    assert listed["models"][0]["figures"]["gsm8k"]["river"]["speed_up"] == 2.16
    assert listed["tasks"][0] == {"name": "gsm8k", "title": "GSM8K", "shots": 5}


def test_the_list_may_be_of_one_model() -> None:
    outcome = run("reproduce", "--list", "ministral-3-8b")
    assert outcome.exit_code == 0
    assert "ministral-3-8b: " in outcome.stdout
    assert "llama" not in outcome.stdout
    assert f"{ARMS[1]}" in outcome.stdout
    listed = run("reproduce", "Ministral-3-8B", "--list", "--json").json
    assert [model["name"] for model in listed["models"]] == ["ministral-3-8b"]


USAGE: dict[str, tuple[list[object], str]] = {
    "nothing": ([], "give one of the paper's models (--list shows them), or --model"),
    "a model that the paper lacks": (["phi-4"], "no model 'phi-4'; did you mean phi-4-mini?"),
    "as what it lacks": (["--model", "x", "--as", "gpt"], "the paper has no model 'gpt'; it has"),
    "as without a model": (["--as", "phi-4-mini"], "--as phi-4-mini needs --model"),
    "both": (["phi-4-mini", "--as", "phi-4-mini"], "give MODEL or --as"),
    "an unknown task": (["phi-4-mini", "--tasks", "gsm8"], "did you mean gsm8k"),
    "a task twice": (["phi-4-mini", "--tasks", "mmlu,mmlu"], "named twice"),
    "no thresholds": (["phi-4-mini", "--thresholds", ","], "give one threshold or more"),
    "a threshold that is a word": (["phi-4-mini", "--thresholds", "x"], "--thresholds is 'x'"),
    "no cosine": (["phi-4-mini", "--thresholds", "1.5"], "choose one in [-1, 1]"),
    "a list of what the paper lacks": (["--list", "phi-4"], "did you mean phi-4-mini?"),
    "a list with options": (
        ["--list", "phi-4-mini", "--tasks", "mmlu", "-n", 4],
        "--list runs nothing; leave --max-new-tokens, --tasks out",
    ),
    "tokens of no speed": (
        ["phi-4-mini", "--no-speed", "--speed-tokens", 256],
        "--no-speed measures none; leave --speed-tokens out",
    ),
    "rounds of no speed": (
        ["phi-4-mini", "--no-speed", "--rounds", 5],
        "--no-speed measures none; leave --rounds out",
    ),
    "tokens of no speed, beside memory": (
        ["phi-4-mini", "--no-speed", "--speed-tokens", 4, "--rounds", 1, "--measure-memory"],
        "leave --speed-tokens out",
    ),
    "no items": (["phi-4-mini", "--limit", 0], "--limit"),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_told_before_the_model_is_sought(
    options: list[object], message: str
) -> None:
    run("reproduce", *options).check_fails(2, message)


@pytest.fixture
def model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny Llama under a name that transformers lacks, whose code comes with it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    directory = save_model(tmp_path / "creek")
    (directory / "creek.py").write_text(CREEK)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": "creek",
        "architectures": ["CreekForCausalLM"],
        "auto_map": {
            "AutoConfig": "creek.CreekConfig",
            "AutoModelForCausalLM": "creek.CreekForCausalLM",
        },
    }
    path.write_text(json.dumps(config))
    return str(directory)


CREEK = """\
from transformers import LlamaConfig, LlamaForCausalLM

class CreekConfig(LlamaConfig):
    model_type = "creek"

class CreekForCausalLM(LlamaForCausalLM):
    config_class = CreekConfig
"""


def test_code_that_comes_with_a_model_runs_where_it_is_trusted(
    model_with_code: str, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    common = ["--tasks", "mmlu", "--no-speed"]
    command = arguments(model_with_code, inputs, output, "tiny-1b", *common)
    run(*command).check_fails(1, "comes with code of its own", "--trust-remote-code")
    memory = run(*command, "--trust-remote-code").json["memory"]
    assert memory["expected_bytes"]["backbone"] > 0


def test_a_model_that_can_not_be_sized_is_told_before_it_is_loaded(
    model_with_code: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr("river_llm.cli.reproduce.load", refuse)
    (Path(model_with_code) / "creek.py").write_text(CREEK + "\n    def __init__(self): pass\n")
    common = ["tiny-1b", "--tasks", "mmlu", "--no-speed", "--trust-remote-code"]
    outcome = run(*arguments(model_with_code, inputs, tmp_path / "out", *common))
    outcome.check_fails(1, "creek can't be loaded", "check that its files are whole")


def test_what_only_the_data_or_the_river_can_tell_is_told(
    model: str, inputs: Path, tmp_path: Path
) -> None:
    common = ["reproduce", "--model", model, "-o", tmp_path / "out", "--threads", 1]
    outcome = run(*common, "--data-dir", tmp_path / "none")
    outcome.check_fails(1, "there is no data directory", "--data-dir names it")
    outcome = run(*common, "--data-dir", inputs, "--tasks", "boolq")
    outcome.check_fails(1, "boolq: ", "has no file boolq_dev*.jsonl")
    outcome = run(*common, "--data-dir", inputs, "--tasks", "humaneval")
    outcome.check_fails(1, "humaneval: it runs programs that the model wrote")
    river = tmp_path / "river"
    assert run("build", model, "--bits", 8, "-o", river).exit_code == 0
    tasks = ["--data-dir", inputs, "--tasks", "mmlu"]
    outcome = run(*common, *tasks, "--river", river)
    outcome.check_fails(1, "the river has 8 bits, the paper's has 4")
    outcome = run(*common, *tasks, "--engine", "torch", "--measure-memory")
    outcome.check_fails(1, "memory is measured on the native engine")
    assert not (tmp_path / "out").exists()
