"""The frontier, the tests between arms, the sentences, and how a report is written down."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_items import ITEMS, write_items
from hypothesis import given
from hypothesis import strategies as st
from lossless_lm import lm_on, subject_with

from river_llm import ResultFileError
from river_llm.benchmark.workload import TokenSource, Workload
from river_llm.evaluation.requests import TaskSettings
from river_llm.evaluation.result_file import Result
from river_llm.report.arms import (
    BACKBONE,
    Arm,
    Variant,
    decided_depths,
    fixed,
    fixed_like,
    full,
    planned_arms,
    random_like,
    similarity,
)
from river_llm.report.document import Heading, Paragraph, Table, to_html, to_markdown
from river_llm.report.findings import (
    Contest,
    Point,
    contests,
    frontier,
    frontier_sentence,
    holm,
    mean_accuracy,
    mean_accuracy_errors,
    rule_sentence,
    same_speed_sentence,
    sign_flip_test,
)
from river_llm.report.models import Models
from river_llm.report.quality import TaskResults, run_task
from river_llm.report.saved import measured_once, measurement
from river_llm.report.speed import FollowingArm, _by_position

POINTS = [
    Point("full-4bit", "full", 600, 0.40),
    Point("similarity-0.9", "similarity", 500, 0.45),
    Point("random-0.9", "random", 480, 0.42),
    Point("exit-6", "fixed", 500, 0.44),
    Point("backbone", "backbone", 200, 0.50),
    Point("exit-20", "fixed", 190, 0.50),
]


def contest(arm: str, difference: float, p: float, question: str = "fixed depth") -> Contest:
    return Contest(question, "accuracy", arm, "exit-6", difference, p, p, 5.7, 6.0)


class TestArms:
    def test_the_plan_begins_with_the_backbone(self) -> None:
        arms = planned_arms(4, [0.9, 0.97], [3], ["mask"])
        assert [arm.name for arm in arms] == [
            "backbone", "full-4bit", "full-8bit", "exit-3", "similarity-0.9", "similarity-0.97",
            "mask-exit-3", "mask-0.9", "mask-0.97",
        ]  # fmt: skip
        assert arms[2].variant == Variant(bits=8)
        assert {arm.variant for arm in arms[-3:]} == {Variant(strategy="mask", engine="torch")}
        assert arms[-3].policy == fixed(3).policy
        assert arms[-1].policy == similarity(0.97).policy
        assert [arm.name for arm in planned_arms(8, [0.9])].count("full-8bit") == 1

    def test_arms_of_the_same_depth(self) -> None:
        depths = {2: 3, 5: 1, 30: 1}  # 8.2
        assert fixed_like(depths).policy.exit_layer == 8
        random = random_like(similarity(0.97), depths, seed=5)
        assert random.name == "random-0.97"
        assert random.policy.to_dict()["depths"] == [[2, 3], [5, 1], [30, 1]]

    def test_the_first_token_of_an_answer_is_not_the_policys(self) -> None:
        summary = {"exit_layers": {"2": 7, "4": 3}, "num_layers": 4, "items": 3}
        run: dict[str, Any] = {"form": "text", "policy": {"prefill": "backbone"}}
        assert decided_depths(Result(Path("x"), run, summary=summary)) == {2: 7}
        assert decided_depths(Result(Path("x"), {}, summary=summary)) == {2: 7, 4: 3}


class TestFrontier:
    def test_has_what_nothing_beats_in_both(self) -> None:
        best = [point.arm for point in frontier(POINTS)]
        assert best == ["full-4bit", "similarity-0.9", "backbone"]

    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
    def test_by_its_definition(self, pairs: list[tuple[int, int]]) -> None:
        points = [Point(str(i), "fixed", *pair) for i, pair in enumerate(pairs)]
        found = {(point.speed, point.quality) for point in frontier(points)}
        expected = {
            (p.speed, p.quality)
            for p in points
            if not any(
                q.speed >= p.speed
                and q.quality >= p.quality
                and (q.speed, q.quality) != (p.speed, p.quality)
                for q in points
            )
        }
        assert found == expected

    def test_in_words(self) -> None:
        assert frontier_sentence(POINTS, "accuracy") == (
            "Best at each speed, by accuracy, the fastest first: full-4bit (40.0 %, 600 tokens/s), "
            "similarity-0.9 (45.0 %, 500 tokens/s), backbone (50.0 %, 200 tokens/s); of the "
            "other arms (3) each is matched or beaten in both. By point values."
        )

    @pytest.mark.parametrize(
        ("measure", "told"),
        [("accuracy", "up to 3.2 points."), ("kld", "up to 0.0320 nats.")],
    )
    def test_tells_the_largest_standard_error_of_all_arms(self, measure: Any, told: str) -> None:
        points = [Point("backbone", "backbone", 200, 0.5, 0.01), Point("x", "fixed", 9, 0.1, 0.032)]
        sentence = frontier_sentence(points, measure)
        assert sentence.endswith(f". By point values; the standard error is {told}")


class TestTests:
    def test_holm_by_hand(self) -> None:
        assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
        assert holm([0.9, 0.6]) == [1.0, 1.0]
        assert holm([]) == []

    def test_signs_by_hand(self) -> None:
        assert sign_flip_test([1, 1, 1, 1]) == 2 / 16
        assert sign_flip_test([3, -1, 1]) == 6 / 8  # all but 3-1-1 and its opposite
        assert sign_flip_test([0, 0]) == 1

    def test_many_signs_are_drawn(self) -> None:
        differences = [0.3, -0.2, 0.5, 0.1, 0.4, -0.1, 0.2, 0.6, -0.3, 0.2, 0.1, 0.3, 0.2]
        sums = [
            sum(sign * d for sign, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        exact = sum(abs(one) >= sum(differences) - 1e-9 for one in sums) / len(sums)
        assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)


class TestSentences:
    def test_a_rule_that_wins_and_one_that_loses(self) -> None:
        rows = [
            contest("similarity-0.9", 0.031, 0.002),
            contest("similarity-0.97", -0.05, 0.01),
            contest("similarity-0.99", 0.01, 0.4),
        ]
        assert rule_sentence(rows) == (
            "Similarity against fixed depth at its own mean depth, by accuracy: better at 1 of 3 "
            "(similarity-0.9 +3.1 points, p = 0.002), worse at 1 of 3 (similarity-0.97 -5.0 "
            "points, p = 0.01), no difference shown at 1."
        )

    def test_no_difference_is_undecided_whatever_p(self) -> None:
        assert contest("similarity-0.9", 0.0, 0.001).verdict == "undecided"

    @pytest.mark.parametrize(
        ("speeds", "difference", "p", "expected"),
        [
            (1.1, 0.04, 0.01, "The river beats full-8bit at its own speed, by accuracy: of 2 "
             "similarity arms 1 are as fast or faster; better at 1 of 1"),
            (1.1, 0.04, 0.2, "The river doesn't beat full-8bit at its own speed"),
            (1.1, -0.04, 0.01, "The river doesn't beat full-8bit at its own speed"),
            (0.9, 0.04, 0.01, "No similarity arm is as fast as full-8bit (0.50 to 0.90 times its "
             "speed), so none beats it at its own speed"),
        ],
    )  # fmt: skip
    def test_at_the_speed_of_8_bits(
        self, speeds: float, difference: float, p: float, expected: str
    ) -> None:
        rows = [
            contest("similarity-0.9", difference, p, "full-8bit"),
            contest("similarity-0.99", 0.08, 0.001, "full-8bit"),  # slow: doesn't count
        ]
        ratios = {"similarity-0.9": speeds, "similarity-0.99": 0.5}
        assert same_speed_sentence(rows, ratios, "full-8bit").startswith(expected)


def choice_result(task: str, verdicts: list[bool], depth: float) -> Result:
    items: dict[int, Any] = {
        item: {"prediction": int(right), "correct": right} for item, right in enumerate(verdicts)
    }
    summary = {"accuracy": sum(verdicts) / len(verdicts), "mean_exit_layer": depth}
    return Result(Path(task), {"task": task}, items=items, summary=summary)


def text_result(klds: list[list[float]], depth: float) -> Result:
    items: dict[int, Any] = {item: {"kld": kld} for item, kld in enumerate(klds)}
    mean = sum(map(sum, klds)) / sum(map(len, klds))
    summary = {"mean_kld": mean, "mean_exit_layer": depth}
    return Result(Path("kld"), {"task": "kld"}, items=items, summary=summary)


def results(task: str, others: str, found: dict[str, Result]) -> TaskResults:
    """Of the backbone, one similarity arm, a fixed one and full 8-bit."""
    arms: dict[str, Arm] = {
        arm.name: arm for arm in (BACKBONE, similarity(0.9), fixed(int(others[5:])), full(8))
    }
    return TaskResults(task, arms, found, same_depth={"similarity-0.9": others})


class TestContests:
    def test_all_tasks_count_together(self) -> None:
        first = results("one", "exit-5", {
            "backbone": choice_result("one", [True] * 10, 30),
            "similarity-0.9": choice_result("one", [True] * 9 + [False], 5.2),
            "exit-5": choice_result("one", [True] * 3 + [False] * 7, 5),
            "full-8bit": choice_result("one", [True] * 9 + [False], 0),
        })  # fmt: skip
        second = results("two", "exit-7", {
            "backbone": choice_result("two", [True] * 2, 30),
            "similarity-0.9": choice_result("two", [True, False], 6.8),
            "exit-7": choice_result("two", [False, True], 7),
            "full-8bit": choice_result("two", [True, True], 0),
        })  # fmt: skip
        depth, eight = contests([first, second], ["full-8bit"])
        assert (depth.question, depth.against) == ("fixed depth", "exit-5, exit-7")
        assert depth.difference == pytest.approx(6 / 12)  # 7 items won, 1 lost
        assert depth.p == pytest.approx(2 * (1 + 8) / 2**8)
        assert (depth.depth, depth.other_depth) == (6, 6)
        assert depth.verdict == "undecided"
        assert (eight.difference, eight.p) == (pytest.approx(-1 / 12), 1)
        assert mean_accuracy([first, second]) == {
            "backbone": 1,
            "similarity-0.9": pytest.approx(0.7),
            "full-8bit": pytest.approx(0.95),
        }

    def test_divergence_is_compared_window_by_window(self) -> None:
        task = results("kld", "exit-5", {
            "backbone": text_result([[0, 0]] * 6, 30),
            "similarity-0.9": text_result([[0.1, 0.3]] * 6, 5.2),
            "exit-5": text_result([[0.4, 0.2]] * 6, 5),
            "full-8bit": text_result([[0.1, 0.1]] * 6, 0),
        })  # fmt: skip
        depth, eight = contests([task], ["full-8bit"])
        assert depth.difference == pytest.approx(0.1)
        assert depth.p == 2 / 2**6
        assert (depth.verdict, eight.verdict) == ("better", "worse")


def test_the_error_of_a_mean_over_tasks() -> None:
    def task(name: str, error: float | None) -> TaskResults:
        summary = {"accuracy": 0.5, "standard_error": error}
        return TaskResults(name, {}, {"backbone": Result(Path(name), {}, summary=summary)})

    three, four, unknown = task("one", 0.03), task("two", 0.04), task("three", None)
    assert mean_accuracy_errors([three, four]) == {"backbone": pytest.approx(0.025)}
    assert mean_accuracy_errors([three, unknown]) == {"backbone": None}
    assert mean_accuracy_errors([]) == {}


class TestTask:
    def run(self, folder: Path, limit: int, **options: Any) -> TaskResults:
        data = write_items(folder / "data", {"arc_easy_test.jsonl": ITEMS["arc_easy_test.jsonl"]})
        lm = lm_on("cpu", subject_with(512))
        settings = TaskSettings(model="tiny", limit=limit, data_dir=data)
        arms = planned_arms(8, [0.65])
        models = Models(lambda variant: lm)
        return run_task(models, "arc_easy", arms, settings, folder / "out", seed=1, **options)

    def test_similarity_arms_are_followed_at_their_own_depth(self, tmp_path: Path) -> None:
        found = self.run(tmp_path, 6)
        depth = found.summary("similarity-0.65")["mean_exit_layer"]
        assert found.same_depth == {"similarity-0.65": f"exit-{round(depth)}"}
        assert found.same_mean == {"similarity-0.65": "random-0.65"}
        depths = found.summary("similarity-0.65")["exit_layers"]
        assert len(depths) > 1
        assert set(found.summary("random-0.65")["exit_layers"]) <= set(depths)
        mean = found.summary("random-0.65")["mean_exit_layer"]
        assert mean == pytest.approx(depth, abs=0.5)

    def test_more_items_go_on_and_draw_anew(self, tmp_path: Path) -> None:
        self.run(tmp_path, 2)
        found = self.run(tmp_path, 6)
        whole = self.run(tmp_path / "at once", 6)
        assert len(found.results["similarity-0.65"].parts) == 2
        assert len(found.results["random-0.65"].parts) == 1
        for name in ("log_likelihoods", "exit_layers"):
            first, second = (
                [record.get(name) for record in one.results["random-0.65"].items.values()]
                for one in (found, whole)
            )
            assert first == second

    def test_random_routing_may_be_left_out(self, tmp_path: Path) -> None:
        found = self.run(tmp_path, 1, with_random=False)
        assert found.same_mean == {}
        assert not any(arm.kind == "random" for arm in found.arms.values())

    def test_the_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        lm = lm_on("cpu")
        engine = lm.engine
        models = Models(lambda variant: lm)
        arm = random_like(similarity(0.9), {1: 1}, seed=0)

        def fail() -> None:
            with models.running(arm) as running:
                assert running.engine is not engine
                running.engine.decode(torch.tensor([3]))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert lm.engine is engine
        assert lm.policy.kind == "never"
        assert engine.length == 0


class Steps:
    """An engine whose tokens take longer and longer, beside its clock."""

    name, length, context_length = "steps", 0, None

    def __init__(self) -> None:
        self.now = 0.0
        self.tokens: list[int] = []
        self.policy: Any = None

    def clock(self) -> float:
        return self.now

    def truncate(self, length: int) -> None:
        self.tokens = self.tokens[:length]

    def prefill(self, token_ids: Any) -> None:
        assert self.policy.kind == "never"
        self.tokens += token_ids[0].tolist()

    def decode(self, token_ids: Any) -> Any:
        from river_llm.engines.engine import StepResult

        self.tokens += token_ids.tolist()
        self.now += len(self.tokens)
        return StepResult(token_ids.float().unsqueeze(0), token_ids * 0 + 3, token_ids)


def test_every_arm_decodes_along_the_text_and_each_token_is_timed() -> None:
    steps = Steps()
    source = TokenSource(list(range(100)))
    arm = FollowingArm(fixed(3), steps, source, steps.clock)  # type: ignore[arg-type]
    workload = Workload("decode", 4)
    arm.prepare(workload)
    assert steps.tokens == list(range(16))
    assert steps.policy.exit_layer == 3
    timing = arm.run(workload)
    assert arm.times == [[17, 18, 19, 20]]
    assert (timing.seconds, timing.tokens, timing.mean_exit_layer) == (74, 4, 3)


def test_a_token_that_takes_long_counts_in_the_mean_of_its_stretch() -> None:
    passes = [[1.0, 1.0, 7.0] * 16, [1.0, 1.0, 4.0] * 16, [1.0, 1.0, 1.0] * 16]
    found = _by_position(passes, context=16)
    assert found["positions"][:2] == [17.0, 20.0]
    assert found["seconds_per_token"] == [1.0] * 16
    assert found["mean_seconds_per_token"] == [2.0] * 16


class TestSaved:
    def test_is_measured_once_for_each_identity(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "speed.json"
        values = iter(range(9))

        def measure() -> dict[str, Any]:
            return {"value": next(values)}

        assert measured_once(path, {"rounds": 5, "arms": ("a",)}, measure) == {"value": 0}
        assert measured_once(path, {"rounds": 5, "arms": ("a",)}, measure) == {"value": 0}
        assert measured_once(path, {"rounds": 6, "arms": ("a",)}, measure) == {"value": 1}
        assert measured_once(path, {"rounds": 6, "arms": ("a",)}, measure, True) == {"value": 2}
        path.write_text(path.read_text()[:-9])
        assert measured_once(path, {"rounds": 6, "arms": ("a",)}, measure) == {"value": 3}
        assert [file.name for file in path.parent.iterdir()] == ["speed.json"]

    def test_tells_when_and_by_which_command_it_was_taken(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "speed.json"
        monkeypatch.setattr("sys.argv", ["river-llm", "compare", "first"])
        first = measurement(path, {}, lambda: {"value": 1})
        assert first.part["command"] == "river-llm compare first"
        assert first.part.keys() == {"command", "date", "processor", "cores", "versions"}
        monkeypatch.setattr("sys.argv", ["river-llm", "compare", "second"])
        assert measurement(path, {}, lambda: {"value": 2}) == first
        again = measurement(path, {}, lambda: {"value": 2}, restart=True)
        assert (again.values, again.part["command"]) == ({"value": 2}, "river-llm compare second")

    @pytest.mark.parametrize("package", ["river-llm", "torch", "transformers"])
    def test_another_version_is_measured_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        path = tmp_path / "speed.json"
        versions = {"river-llm": "1", "torch": "2", "transformers": "5"}
        monkeypatch.setattr("river_llm.report.saved.installed_versions", lambda _: versions)
        assert measured_once(path, {}, lambda: {"value": 1}) == {"value": 1}
        versions = {**versions, package: "9"}
        assert measured_once(path, {}, lambda: {"value": 2}) == {"value": 2}

    def test_a_file_that_does_not_say_when_is_measured_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "speed.json"
        measured_once(path, {}, lambda: {"value": 1})
        old = json.loads(path.read_text())
        del old["part"]
        path.write_text(json.dumps(old))
        assert measured_once(path, {}, lambda: {"value": 2}) == {"value": 2}

    def test_that_it_can_not_be_written_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "folder").write_text("a file")
        with pytest.raises(ResultFileError, match="can't be written"):
            measured_once(tmp_path / "folder" / "speed.json", {}, dict)


def test_names_that_look_like_marks_stay_what_they_are(tmp_path: Path) -> None:
    blocks = [
        Heading("a <b> & *c*", 1),
        Paragraph("x_y_z [link](z)"),
        Table(["arm", "p|q"], [["<script>", "-3"]]),
    ]
    page = to_html(blocks, tmp_path)
    assert "<h1>a &lt;b&gt; &amp; *c*</h1>" in page
    assert "<td>&lt;script&gt;</td>" in page
    markdown = to_markdown(blocks)
    assert "# a \\<b\\> & \\*c\\*" in markdown
    assert "x\\_y\\_z \\[link\\](z)" in markdown
    assert "| arm | p\\|q |\n| --- | ---: |\n| \\<script\\> | -3 |" in markdown
