"""The scripts of experiments/ from end to end on a tiny model, their numbers beside references."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kv_strategies
import paper_tables
import pareto
import pytest
import second_look
import torch
from text_scores import WindowScores, read_windows
from tiny_lm import character_tokenizer
from tiny_models import fake_quantised, tiny_model

from river_llm import ExitPolicy, River, RiverConfig, attach_river
from river_llm.engines import TorchEngine
from river_llm.measure.pareto import pareto_front
from river_llm.measure.teacher_forcing import score

TEXT = "A river begins where water gathers: in a spring, under a glacier, in a marsh. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model and a text."""
    folder = tmp_path_factory.mktemp("experiments")
    model = tiny_model("Llama", intermediate_size=128)
    model.save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a script on the tiny model; what its JSON file holds."""

    def run(script: ModuleType, *options: object) -> Any:
        name = script.__name__
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, options)])
        script.main()
        output = Path(options[options.index("-o") + 1])
        assert (output / f"{name}.png").stat().st_size > 1000
        values = json.loads((output / f"{name}.json").read_text())
        assert values["command"].startswith(f"python experiments/{name}.py --")
        return values

    return run


def windows_of(size: int, count: int) -> list[list[int]]:
    tokens = character_tokenizer()(TEXT).input_ids
    return [tokens[i * size : (i + 1) * size] for i in range(count)]


def test_kv_strategies(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    values = run(
        kv_strategies,
        *("--model", folder / "model", "--text", folder / "text.txt", "--group-size", 32),
        *("--window", 24, "--windows", 2, "--thresholds", 0.6, "--exit-layers", 2),
        *("--prompt", "Hm", "--new-tokens", 5, "--dtype", "float32", "-o", tmp_path),
    )
    results = {result["variant"]: result for result in values["results"]}
    assert len(results) == 2 + 2 * 5
    backbone = results["backbone"]
    assert (backbone["mean_kld"], backbone["same_top"], backbone["speed_up"]) == (0, 1, 1)
    assert backbone["perplexity"] == pytest.approx(perplexity_of(windows_of(24, 2)), rel=1e-4)
    assert {len(result["milliseconds_by_position"]) for result in values["results"]} == {23}
    assert {len(result["answer"]) for result in values["results"]} == {5}
    for name in kv_strategies.STRATEGIES:  # at a fixed depth nobody misses what is missing
        fixed = results[f"{name}, exit after 2"]
        assert fixed["mean_exit_layer"] == 2
        assert fixed["mean_kld"] == pytest.approx(results["mask, exit after 2"]["mean_kld"])


@torch.no_grad()
def perplexity_of(windows: list[list[int]]) -> float:
    """Of the second halves, by `transformers`."""
    model = tiny_model("Llama", intermediate_size=128)
    losses = []
    for window in windows:
        logits = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
        losses += [float(-logits[i, t]) for i, t in enumerate(window[1:]) if i >= len(window) // 2]
    return math.exp(sum(losses) / len(losses))


def test_pareto(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    accuracies = {"results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
    (tmp_path / "eval.json").write_text(json.dumps(accuracies))
    values = run(
        pareto,
        *("--model", folder / "model", "--text", folder / "text.txt", "--group-size", 32),
        *("--window", 24, "--windows", 3, "--thresholds", 0.6, 0.7, "--exit-layers", 1),
        *("--rivers", "4bit", "8bit-rtn", "--second-looks", 1e-9, 1),
        *("--rounds", 2, "--speed-tokens", 8, "-o", tmp_path),
        *("--lm-eval", f"backbone={tmp_path / 'eval.json'}"),
    )
    results = {result["variant"]: result for result in values["results"]}
    plain = {"backbone", "full-4bit", "full-8bit-rtn", "exit-1", "similarity-0.6", "similarity-0.7"}
    fixed = {f"exit-{round(results[f'similarity-{t}']['mean_exit_layer'])}" for t in (0.6, 0.7)}
    looks = {"look-1e-09", "look-1"}
    assert set(results) == plain | {"random-0.6", "random-0.7"} | fixed | looks
    for name, other in (("look-1e-09", "full-4bit"), ("look-1", "backbone")):
        for measure in ("mean_kld", "mean_exit_layer"):
            assert results[name][measure] == pytest.approx(results[other][measure], abs=1e-4)
    backbone = results["backbone"]
    assert (backbone["mean_kld"], backbone["same_top"], backbone["speed_up"]) == (0, 1, 1)
    assert backbone["perplexity"] == pytest.approx(perplexity_of(windows_of(24, 3)), rel=0.03)
    assert backbone["tasks"]["arc"]["accuracy"] == 0.5
    assert results["full-8bit-rtn"]["mean_kld"] < results["full-4bit"]["mean_kld"]
    assert [c["against"] for c in values["comparisons"]][-4:] == ["full-4bit"] * 2 + [
        "full-8bit-rtn"
    ] * 2
    for c in values["comparisons"]:
        difference = results[c["against"]]["mean_kld"] - results[c["rule"]]["mean_kld"]
        assert c["difference"] == pytest.approx(difference, abs=1e-6)


def test_second_look(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Name a river.\nWhy?\n")
    values = run(
        second_look,
        *("--model", folder / "model", "--prompts", tmp_path / "prompts.txt", "--new-tokens", 6),
        *("--exit-layer", 1, "--second-looks", 1e-9, 1, "-o", tmp_path),
    )
    backbone, without, never_small, always = values["results"]
    assert backbone["agreement"] == always["agreement"] == 1
    assert without["agreement"] == never_small["agreement"] < 1
    looks = [one["second_looks"] for one in values["results"]]
    assert looks == [0, 0, 0, 1]
    assert {one["tokens"] for one in values["results"]} == {2 * 5}


class TestScores:
    def test_each_token_leaves_by_its_own_row(self) -> None:
        model = tiny_model("Llama", intermediate_size=128)
        river = River.build(model, RiverConfig(4, 32))
        quantised = fake_quantised(model, river)
        engine = TorchEngine(attach_river(model, river, policy=ExitPolicy.never()))
        (window,) = windows_of(20, 1)
        rule = pareto.plain_variants(4, ["4bit"], [], [0.6])[-1]
        drawn = pareto.random_variant(rule, [0, 1, 1, 4], 20, seed=3)
        _, depths = score(engine, window, drawn.along(20))
        assert set(depths) == {0, 1, 4}
        assert depths == [int((row == math.inf).sum()) for row in drawn.thresholds]
        always = torch.full((4,), -math.inf)
        logits, depths = score(engine, window, always)
        assert depths == [0] * 20
        expected = quantised(torch.tensor([window])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)

    def test_are_those_of_the_second_half(self) -> None:
        torch.manual_seed(0)
        window, total = list(range(8)), WindowScores()
        logits, reference = torch.randn(7, 11), torch.randn(7, 11)
        total.add(window, logits, reference, [9, 9, 9, 9, 1, 2, 3])
        found = total.summarise()
        p, q = reference[4:].softmax(-1), logits[4:].softmax(-1)
        kld = (p * (p / q).log()).sum(-1)
        assert found["num_tokens"] == 3
        assert found["mean_exit_layer"] == 2
        assert found["mean_kld"] == pytest.approx(float(kld.mean()), rel=1e-5)
        assert found["mean_kld_error"] == pytest.approx(float(kld.std()) / math.sqrt(3), rel=1e-5)
        nll = -q[torch.arange(3), torch.tensor(window[5:])].log().mean()
        assert found["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-5)

    def test_a_text_that_is_too_short_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("abc")
        with pytest.raises(SystemExit, match="has 3 tokens"):
            read_windows(character_tokenizer(), tmp_path / "text.txt", 8, None)


def test_no_point_of_the_front_is_beaten() -> None:
    generator = torch.Generator().manual_seed(1)
    points = [tuple(point) for point in torch.rand(40, 2, generator=generator).tolist()]
    beaten = [any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    assert sorted(pareto_front(points)) == [
        i for i, is_beaten in enumerate(beaten) if not is_beaten
    ]


class TestStatistics:
    def test_signs(self) -> None:
        differences = [0.3, -0.1, 0.4, 0.2, 0.25]
        sums = [
            sum(map(math.prod, zip(s, differences, strict=True)))
            for s in product((1, -1), repeat=5)
        ]
        expected = sum(abs(s) >= abs(sums[0]) - 1e-12 for s in sums) / 32
        assert pareto.sign_flip_p(differences) == expected
        drawn = pareto.sign_flip_p(differences * 4)
        assert 0 < drawn < 0.01
        assert pareto.sign_flip_p([0.0] * 30) == 1

    def test_holm(self) -> None:
        assert pareto.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])

    def test_mcnemar(self) -> None:
        assert paper_tables.mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == 2 / 32
        assert paper_tables.mcnemar([1, 0], [0, 1]) == 1

    def test_interval(self) -> None:
        low, high = paper_tables.interval({"accuracy": 0.5, "items": [0, 1] * 50})
        assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Wilson, n = 100


class TestPaper:
    def test_figures_stand_beside_the_variant_that_they_are_of(self) -> None:
        policies = paper_tables.variants([0.5, 0.7])
        model = paper_tables.PAPER["models"]["llama-3.2-1b-instruct"]
        found = [
            paper_tables.paper_figures(model, "gsm8k", policy).get("accuracy")
            for policy in policies.values()
        ]
        assert found == [33.2, 25.1, 29.3, None]
        assert paper_tables.paper_figures({}, "gsm8k", ExitPolicy.never()) == {}
        assert paper_tables.bandwidth_share(model) == pytest.approx(84.5 * 2.47 / 696)

    def test_items_are_those_of_the_metrics_filter(self) -> None:
        samples = [
            {"filter": "strict", "exact_match": 0.0},
            {"filter": "flexible", "exact_match": 1.0},
        ] * 2
        found = {"samples": {"t": samples}, "results": {"t": {"exact_match,flexible": 1.0}}}
        kept = paper_tables.summarise(found, "t", "exact_match,flexible")
        assert kept == {"accuracy": 1.0, "standard_error": 0.0, "items": [1.0, 1.0]}

    def test_tables_go_on_where_they_were_cut(
        self, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[str, str]] = []

        def answer(self: object, task: str, policy: ExitPolicy) -> dict[str, Any]:
            calls.append((task, policy.describe()))
            if len(calls) == 3:
                raise KeyboardInterrupt
            right = [1.0, 0.0, float(policy.kind == "never"), 1.0]
            depth = None if policy.kind == "never" else 2.2
            return {
                "accuracy": sum(right) / 4,
                "standard_error": 0.1,
                "items": right,
                "mean_exit_layer": depth,
            }

        monkeypatch.setattr(paper_tables.Tasks, "run", answer)
        monkeypatch.setattr(paper_tables.subprocess, "run", bench_of_a_model)
        options = ("--model", "llama-3.2-1b-instruct", "--weights", "m", "--tasks", "gsm8k")
        options = (*options, "-o", tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run(paper_tables, *options)
        values = run(paper_tables, *options)
        assert len(calls) == 5  # the third one twice
        rows = {row["variant"]: row for row in values["accuracies"]}
        assert [row["accuracy"] for row in rows.values()] == [0.75, 0.5, 0.5, 0.5]
        assert [row["verdict"] for row in rows.values()] == ["within"] * 3 + [None]
        assert values["memory"]["exit after 3, offloaded"]["context"] == 65_536
        assert values["speeds"]["similarity > 0.5"]["speed_up"]["median"] == 2
        with pytest.raises(SystemExit, match="is of other settings"):
            run(paper_tables, *options, "--limit", 3)


def bench_of_a_model(command: list[str], **_: object) -> SimpleNamespace:
    """Stands for a process of `river-llm bench --json`."""
    parser = argparse.ArgumentParser()
    for name in ("--threshold", "--exit-layer", "--depth", "--engine", "--model"):
        parser.add_argument(name)
    given, _ = parser.parse_known_args(command[4:])
    rate, ratio = {"median": 9.0}, {"backbone": {"median": 2.0}}
    if given.threshold is not None:
        names = ["backbone", "full 4-bit"]
        names += [f"similarity > {tau}" for tau in given.threshold.split(",")]
        results: list[dict[str, Any]] = [
            {"variant": name, "tokens_per_second": rate, "ratios": ratio, "mean_exit_layer": 1.0}
            for name in names
        ]
    else:
        sizes = dict.fromkeys(("steady_bytes", "peak_bytes", "expected_bytes"), 1 << 30)
        results = [
            {"variant": name, "context": int(given.depth), **sizes, "tokens_per_second": 5.0}
            for name in ("backbone", f"exit after {given.exit_layer}, offloaded")
        ]
    return SimpleNamespace(returncode=0, stdout=json.dumps({"results": results}))
