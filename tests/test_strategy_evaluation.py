"""Strategies measured: likelihoods beside single steps, `river-llm eval --strategy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run
from evaluation_items import ITEMS, write_items
from strategy_models import WITH_EXITS, engine_on, mixed_policy, model_of
from test_likelihood import ITEMS as CANDIDATES
from test_likelihood import assert_equal, step_by_step

from river_llm.config import Strategy
from river_llm.evaluation.likelihood import LikelihoodScorer
from river_llm.evaluation.result_file import read_result

pytest_plugins = ["cli_models"]

every_strategy = pytest.mark.parametrize("strategy", WITH_EXITS)


@every_strategy
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3Text"])
def test_likelihoods_are_those_of_single_steps_alone_and_in_batches(
    strategy: Strategy, architecture: str
) -> None:
    with engine_on(model_of(architecture), strategy, mixed_policy(architecture)) as engine:
        together = LikelihoodScorer(engine).score(CANDIDATES)
        for item, found in zip(CANDIDATES, together, strict=True):
            assert_equal(found, [step_by_step(engine, candidate) for candidate in item])
            (alone,) = LikelihoodScorer(engine).score([item])
            assert_equal(alone, found)
        depths = {layer for item in together for one in item for layer in one.exit_layers}
        assert len(depths) > 1


class TestCommand:
    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_items(tmp_path_factory.mktemp("data"), ITEMS)

    @pytest.fixture(autouse=True)
    def _somewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def evaluate(self, model: str, data: Path, *arguments: object) -> list[dict[str, Any]]:
        common = ("--model", model, "--data-dir", data, "--threads", 1, "--json")
        results: list[dict[str, Any]] = run("eval", *arguments, *common).json["results"]
        return results

    @every_strategy
    def test_a_result_names_its_strategy(self, strategy: str, model: str, data: Path) -> None:
        common = ("--strategy", strategy, "--exit-layer", 2, "--limit", 2, "--compare-backbone")
        answered = self.evaluate(model, data, "arc_easy", *common)
        answered += self.evaluate(model, data, "gsm8k", "--shots", 0, "-n", 4, *common)
        arms = [(one["task"], one["arm"]) for one in answered]
        assert arms == [
            (task, f"{strategy}-{arm}")
            for task in ("arc_easy", "gsm8k")
            for arm in ("backbone", "exit-2")
        ]
        for one in answered:
            assert one["file"] == f"eval-results/{one['task']}.{one['arm']}.jsonl"
            found = one["run"]
            assert (found["strategy"], found["engine"], found["river"]) == (strategy, "torch", None)
            assert found["weights"].startswith("sha256:")
        assert answered[1]["comparison"]["policy"]["kind"] == "never"
        assert set(answered[1]["summary"]["exit_layers"]) == {"2"}

    def test_the_backbone_is_the_same_with_and_without_a_strategy(
        self, model: str, data: Path
    ) -> None:
        plain = self.evaluate(model, data, "arc_easy", "--policy", "never", "--engine", "torch")
        none = self.evaluate(model, data, "arc_easy", "--strategy", "none")
        assert none[0]["arm"] == "none-backbone"
        assert "strategy" not in plain[0]["run"]
        assert none[0]["run"]["weights"] == plain[0]["run"]["weights"]
        first, second = (read_result(Path(one["file"])).items for one in (plain[0], none[0]))
        for item, record in first.items():
            assert record["log_likelihoods"] == pytest.approx(
                second[item]["log_likelihoods"], abs=1e-4
            )

    def test_quantised_is_the_river_alone(self, model: str, data: Path) -> None:
        river = self.evaluate(model, data, "arc_easy", "--policy", "always", "--engine", "torch")
        found = self.evaluate(model, data, "arc_easy", "--strategy", "quantised")
        assert (found[0]["arm"], found[0]["run"]["strategy"]) == (
            "quantised-full-4bit",
            "quantised",
        )
        first, second = (read_result(Path(one["file"])).items for one in (river[0], found[0]))
        assert [one["log_likelihoods"] for one in first.values()] == [
            one["log_likelihoods"] for one in second.values()
        ]

    def test_no_exit_is_the_backbone_and_has_nothing_to_compare_with(
        self, model: str, data: Path
    ) -> None:
        (found,) = self.evaluate(
            model, data, "arc_easy", "--strategy", "none", "--limit", 2, "--compare-backbone"
        )
        assert found["comparison"] is None

    def test_divergence_is_measured(self, model: str, data: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("The river runs to the sea. " * 40)
        arguments = ("kld", "--text", text, "--window", 32, "--limit", 2, "--strategy", "mask")
        (found,) = self.evaluate(model, data, *arguments, "--exit-layer", 2)
        assert found["summary"]["mean_kld"] > 0
        (found,) = self.evaluate(model, data, *arguments, "--policy", "never")
        assert found["summary"]["mean_kld"] == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("none", "--threshold", 0.5), "--strategy none has no exit policy"),
            (("mask", "--bits", 3), "--strategy mask has no river"),
            (("quantised", "--compare-backbone"), "--strategy quantised runs no backbone"),
        ],
    )
    def test_refuses_what_does_not_go_together(
        self, options: tuple[object, ...], message: str
    ) -> None:
        run("eval", "arc_easy", "--strategy", *options).check_fails(2, message)
