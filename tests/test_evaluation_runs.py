"""Tasks on a model: what is asked, what is recorded, batches, resumption, comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_items import ITEMS, write_items
from lossless_lm import lm_on, subject_with

from river_llm import (
    ConfigError,
    ContextFullError,
    DataError,
    ExitPolicy,
    ResultFileError,
    RiverError,
    RiverLM,
)
from river_llm.evaluation import generation_run
from river_llm.evaluation.choice_run import ChoiceRun
from river_llm.evaluation.data import Record
from river_llm.evaluation.generation_run import GenerationRun
from river_llm.evaluation.harness import compare_results, evaluate
from river_llm.evaluation.result_file import Result, read_result
from river_llm.evaluation.run import Run, select
from river_llm.evaluation.tasks import TASKS
from river_llm.evaluation.tasks.task import ChoiceTask, GenerationTask, Scorer

MIXED = ExitPolicy.similarity(0.65)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("data"), ITEMS)


@pytest.fixture(params=["torch", "cpu"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    """A tiny model that reads characters, with room for few-shot prompts."""
    lm = lm_on(request.param, subject_with(1024))
    lm.policy = MIXED
    return lm


def choice_run(lm: RiverLM, name: str, directory: Path, **options: Any) -> ChoiceRun:
    task = TASKS[name]
    assert isinstance(task, ChoiceTask)
    return ChoiceRun(lm, task, model_name="tiny", directory=directory, **options)


def generation_run_of(lm: RiverLM, name: str, directory: Path, **options: Any) -> GenerationRun:
    task = TASKS[name]
    assert isinstance(task, GenerationTask)
    settings = {"new_tokens": 12, **options}
    return GenerationRun(lm, task, model_name="tiny", directory=directory, **settings)


def items_of(result: Result) -> list[dict[str, Any]]:
    """The records without what is measured."""
    measured = {"seconds", "tokens", "time_to_first_token", "decode_tokens_per_second"}
    return [
        {name: value for name, value in record.items() if name not in measured}
        for record in result.items.values()
    ]


class TestChoices:
    @pytest.mark.parametrize("name", [n for n, t in TASKS.items() if isinstance(t, ChoiceTask)])
    def test_the_likeliest_is_chosen(self, lm: RiverLM, name: str, directory: Path) -> None:
        task = TASKS[name]
        assert isinstance(task, ChoiceTask)
        run = choice_run(lm, name, directory, shots=min(task.shots, 1))
        for item, record in zip(run.ids, run.answer(run.ids), strict=True):
            question = run._questions[item]
            chosen = {
                "acc": max(range(len(question.choices)), key=record["log_likelihoods"].__getitem__),
                "acc_norm": max(
                    range(len(question.choices)),
                    key=lambda i: record["log_likelihoods"][i] / len(question.choices[i].lstrip()),
                ),
            }
            assert record["prediction"] == chosen["acc_norm" if task.by_length else "acc"]
            assert record["correct"] == (record["prediction"] == question.answer)
            assert record["metrics"] == {k: v == question.answer for k, v in chosen.items()}

    def test_likelihoods_are_those_of_the_plain_model(self, directory: Path) -> None:
        subject = subject_with(1024)
        lm = lm_on("torch", subject)
        lm.policy = ExitPolicy.never()
        run = choice_run(lm, "arc_challenge", directory, shots=2)
        (record,) = run.answer([1])
        examples = "".join(f"Question: What follows on {n}?\nAnswer: {n + 1}\n\n" for n in (10, 11))
        context = f"{examples}Question: What follows on 1?\nAnswer:"
        for choice, found in zip(
            (" 3", " 2", " nothing at all"), record["log_likelihoods"], strict=True
        ):
            tokens = torch.tensor([lm.tokenizer(context + choice).input_ids])
            with torch.no_grad():
                logits = subject.exact(tokens).logits[0].double().log_softmax(-1)
            start = tokens.shape[1] - len(choice)
            expected = sum(
                float(logits[place - 1, tokens[0, place]])
                for place in range(start, tokens.shape[1])
            )
            assert found == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("name", ["arc_easy", "mmlu", "blimp", "winogrande"])
    def test_a_batch_of_eight_scores_as_eight_single_runs(
        self, lm: RiverLM, name: str, directory: Path, tmp_path: Path
    ) -> None:
        shots = 1 if name == "mmlu" else None
        one, eight = (
            evaluate(
                choice_run(lm, name, directory, shots=shots), tmp_path / f"{n}.jsonl", batch_size=n
            )
            for n in (1, 8)
        )
        if lm.engine.name == "cpu":
            assert items_of(one) == items_of(eight)
        for first, second in zip(items_of(one), items_of(eight), strict=True):
            assert first["prediction"] == second["prediction"]
            assert first["exit_layers"] == second["exit_layers"]
            assert first["log_likelihoods"] == pytest.approx(second["log_likelihoods"], abs=1e-3)

    def test_the_prefill_rule_has_no_part_in_it(self, lm: RiverLM, directory: Path) -> None:
        found = []
        for rule in ("backbone", "river"):
            lm.policy = ExitPolicy.similarity(0.65, prefill=rule)
            run = choice_run(lm, "arc_easy", directory)
            found.append((run.identity, run.answer(run.ids)))
        assert found[0] == found[1]

    def test_more_examples_than_there_are_is_refused(self, lm: RiverLM, directory: Path) -> None:
        with pytest.raises(ConfigError, match="there are 3 examples"):
            choice_run(lm, "arc_challenge", directory, shots=4)
        with pytest.raises(ConfigError, match="this task has no examples"):
            choice_run(lm, "blimp", directory, shots=1)
        run = choice_run(lm, "mmlu", directory, shots=3)  # four in all, two of each subject
        with pytest.raises(ConfigError, match="sums has 2 examples"):
            run.answer([0])

    def test_an_item_that_does_not_fit_is_named(self, directory: Path) -> None:
        lm = lm_on("torch")  # a context of 64
        run = choice_run(lm, "mmlu", directory, shots=0)
        with pytest.raises(ContextFullError, match=r"mmlu, items 0 to 1: .*lower --shots"):
            run.answer([0, 1])


class TestGeneration:
    def test_the_text_form_shows_solved_examples(self, directory: Path) -> None:
        run = generation_run_of(lm_on("torch", subject_with(1024)), "gsm8k", directory, shots=2)
        assert run._prompt(run._records[0]) == (
            "Question: 0 plus 1?\nAnswer: It is 1.\n#### 1\n\n"
            "Question: 1 plus 1?\nAnswer: It is 2.\n#### 2\n\n"
            "Question: Ann has 0 pens and buys 2. How many?\nAnswer:"
        )

    def test_the_chat_form_shows_them_as_turns(self, directory: Path) -> None:
        lm = lm_on("torch", subject_with(1024))
        run = generation_run_of(lm, "gsm8k", directory, shots=1, chat=True)
        messages = run._prompt(run._records[0])
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]  # type: ignore[index]
        assert messages[1]["content"] == "It is 1.\n#### 1"  # type: ignore[index,call-overload]
        assert run.identity["form"] == "chat"
        assert generation_run_of(lm, "gsm8k", directory, chat=True).identity["shots"] == 0

    @pytest.mark.parametrize("chat", [False, True])
    def test_a_batch_of_eight_answers_as_eight_single_runs(
        self, lm: RiverLM, directory: Path, tmp_path: Path, chat: bool
    ) -> None:
        one, eight = (
            evaluate(
                generation_run_of(lm, "gsm8k", directory, chat=chat, shots=2),
                tmp_path / f"{n}.jsonl",
                batch_size=n,
            )
            for n in (1, 8)
        )
        assert items_of(one) == items_of(eight)
        assert one.summary is not None
        assert one.summary["tokens"] == sum(record["tokens"] for record in one.items.values())

    def test_a_batch_whose_longest_prompt_fills_the_context_is_run_one_by_one(
        self, lm: RiverLM, directory: Path, tmp_path: Path
    ) -> None:
        small = lm_on(lm.engine.name, subject_with(64))
        run = generation_run_of(small, "gsm8k", directory, shots=0, new_tokens=20)
        run._records[0] = Record({**run._records[0].fields, "question": "x" * 38}, "long")
        alone = [run.answer([item])[0] for item in (0, 1)]
        together = run.answer([0, 1])
        assert [r["answer"] for r in together] == [r["answer"] for r in alone]
        assert alone[0]["finish_reason"] == "context"

    def test_code_is_run_only_where_it_is_allowed(self, directory: Path) -> None:
        with pytest.raises(ConfigError, match="--allow-code-execution"):
            generation_run_of(lm_on("torch"), "humaneval", directory)

    @pytest.mark.parametrize(
        ("answer", "is_right"),
        [("\n    return a + b\n", True), ("\n    return a - b\n", False), ("", False)],
    )
    def test_programs_are_run(
        self, directory: Path, answer: str, is_right: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_on("torch", subject_with(1024))
        run = generation_run_of(lm, "humaneval", directory, allow_code_execution=True)
        say(run, answer, monkeypatch)
        (record,) = run.answer([0])
        assert record["correct"] is is_right
        assert record["task_id"] == "T/0"
        assert record["outcome"] == ("passed" if is_right else "failed")
        assert set(run.identity["isolation"]) == {"files", "network", "processes"}

    @pytest.mark.parametrize(
        ("answer", "prediction", "is_right", "strict"),
        [
            ("So 2.\n#### 2", "2", True, True),
            ("It is 2.", "2", True, False),
            ("It is 3.", "3", False, False),
            ("", None, False, False),
        ],
    )
    def test_numbers_are_compared(
        self,
        directory: Path,
        answer: str,
        prediction: str | None,
        is_right: bool,
        strict: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = generation_run_of(lm_on("torch", subject_with(1024)), "gsm8k", directory)
        say(run, answer, monkeypatch)
        (record,) = run.answer([0])
        assert (record["prediction"], record["correct"]) == (prediction, is_right)
        assert record["metrics"] == {"strict": strict}

    def test_items_that_cannot_be_scored_are_left_out_and_told(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_on("torch", subject_with(1024))

        def cannot_score(scorer: object, record: Record) -> str | None:
            return "no ruler" if "has 2 pens" in record.text("question") else None

        monkeypatch.setattr(Scorer, "cannot_score", cannot_score)
        run = generation_run_of(lm, "gsm8k", directory, limit=3)
        assert run.ids == [0, 1, 3]
        assert run.identity["left_out"] == 1
        assert run.notes == ["gsm8k: 1 items are left out: no ruler"]
        monkeypatch.setattr(Scorer, "cannot_score", lambda *_: "no ruler")
        with pytest.raises(DataError, match="no item can be scored: no ruler"):
            generation_run_of(lm, "gsm8k", directory)

    def test_the_prefix_that_prompts_share_runs_once(
        self, lm: RiverLM, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = generation_run_of(lm, "gsm8k", directory, shots=4)
        first = run.answer([0])
        counts: list[int] = []
        prefill = lm.engine.prefill

        def spy(token_ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
            counts.append(token_ids.numel())
            return prefill(token_ids, mask)

        monkeypatch.setattr(lm.engine, "prefill", spy)
        run.answer([1])
        assert counts[0] < 60 < first[0]["prompt_tokens"]

    def test_a_prompt_that_leaves_as_a_whole_runs_as_a_whole(
        self, lm: RiverLM, directory: Path
    ) -> None:
        lm.policy = ExitPolicy.similarity(0.65, prefill="sequence")
        run = generation_run_of(lm, "gsm8k", directory, shots=4)
        run.answer([0])
        after = run.answer([1])
        lm.forget_cache()
        assert after[0]["answer"] == run.answer([1])[0]["answer"]
        assert after[0]["exit_layers"] == run.answer([1])[0]["exit_layers"]


def say(run: GenerationRun, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model answer so."""
    result = SimpleNamespace(
        text=answer,
        finish_reason="stop",
        prompt_tokens=1,
        tokens=[1],
        exit_layers=[4],
        time_to_first_token=0.1,
        decode_tokens_per_second=None,
    )
    monkeypatch.setattr(run, "_generate", lambda prompts: [result] * len(prompts))


class Interrupted:
    """A run that is interrupted after some batches, once."""

    def __init__(self, run: Run, batches: int) -> None:
        self.name, self.ids, self.identity = run.name, run.ids, run.identity
        self.notes = run.notes
        self.summarise = run.summarise
        self.answered: list[int] = []
        self._run, self._batches = run, batches

    def answer(self, ids: Any) -> list[dict[str, Any]]:
        if self._batches == 0:
            self._batches = -1
            raise KeyboardInterrupt
        self._batches -= 1
        self.answered += ids
        return self._run.answer(ids)


class TestResumption:
    def test_a_run_that_was_cut_goes_on_where_it_stopped(
        self, directory: Path, tmp_path: Path
    ) -> None:
        run = choice_run(lm_on("cpu", subject_with(1024)), "arc_easy", directory)
        expected = evaluate(run, tmp_path / "whole.jsonl")
        path = tmp_path / "cut.jsonl"
        cut = Interrupted(run, 2)
        with pytest.raises(RiverError, match="interrupted after 4 of 6 items of arc_easy"):
            evaluate(cut, path, batch_size=2)
        assert read_result(path).summary is None
        seen: list[tuple[int, int]] = []
        result = evaluate(cut, path, batch_size=2, progress=lambda *n: seen.append(n))
        assert cut.answered == run.ids
        assert seen == [(6, 6)]
        assert items_of(result) == items_of(expected)
        assert len(result.parts) == 2
        assert result.summary is not None
        assert result.summary["accuracy"] == expected.summary["accuracy"]  # type: ignore[index]

    def test_a_whole_one_is_not_run_again(self, directory: Path, tmp_path: Path) -> None:
        run = choice_run(lm_on("cpu", subject_with(1024)), "arc_easy", directory)
        path = tmp_path / "whole.jsonl"
        expected = evaluate(run, path)
        again = Interrupted(run, 0)
        assert evaluate(again, path).summary == expected.summary
        assert again.answered == []

    def test_a_larger_limit_goes_on_and_a_smaller_one_is_refused(
        self, directory: Path, tmp_path: Path
    ) -> None:
        lm = lm_on("cpu", subject_with(1024))
        path = tmp_path / "mmlu.jsonl"
        runs = {n: choice_run(lm, "mmlu", directory, shots=0, limit=n) for n in (2, 4)}
        evaluate(runs[2], path)
        result = evaluate(runs[4], path)
        assert sorted(result.items) == runs[4].ids == [0, 1, 3, 4]
        assert set(result.summary["groups"]) == {"sums", "more_sums"}  # type: ignore[index]
        with pytest.raises(ResultFileError, match="holds 4 items, this run has 2"):
            evaluate(runs[2], path)

    @pytest.mark.parametrize("change", ["policy", "data", "shots"])
    def test_another_run_is_refused(self, directory: Path, tmp_path: Path, change: str) -> None:
        lm = lm_on("cpu", subject_with(1024))
        path = tmp_path / "arc.jsonl"
        evaluate(choice_run(lm, "arc_challenge", directory), path)
        options: dict[str, Any] = {}
        if change == "policy":
            lm.policy = ExitPolicy.fixed(2)
        elif change == "data":
            changed = {**ITEMS, "arc_challenge_test.jsonl": ITEMS["arc_easy_test.jsonl"][:3:-1]}
            directory = write_items(tmp_path / "other", changed)
        else:
            options["shots"] = 1
        with pytest.raises(ResultFileError, match=rf"another run \(.*{change}"):
            evaluate(choice_run(lm, "arc_challenge", directory, **options), path)

    def test_a_batch_of_nothing_is_refused(self, directory: Path, tmp_path: Path) -> None:
        run = choice_run(lm_on("cpu", subject_with(1024)), "arc_easy", directory)
        with pytest.raises(ConfigError, match="--batch-size is 0"):
            evaluate(run, tmp_path / "x.jsonl", batch_size=0)


class TestSummary:
    def test_says_how_sure_it_is_and_how_deep_tokens_went(
        self, lm: RiverLM, directory: Path, tmp_path: Path
    ) -> None:
        result = evaluate(choice_run(lm, "arc_easy", directory), tmp_path / "a.jsonl")
        summary = result.summary
        assert summary is not None
        right = sum(record["correct"] for record in result.items.values())
        assert summary["items"] == 6
        assert summary["accuracy"] == pytest.approx(right / 6)
        share = right / 6
        assert summary["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        low, high = summary["interval_95"]
        assert 0 <= low <= share <= high <= 1
        counts = {int(layer): n for layer, n in summary["exit_layers"].items()}
        depth = sum(layer * n for layer, n in counts.items()) / sum(counts.values())
        assert summary["mean_exit_layer"] == pytest.approx(depth)
        assert sum(counts.values()) == 6 * (2 + 2 + 15)  # the characters of the choices
        assert len(counts) > 1
        assert set(summary["metrics"]) == {"acc", "acc_norm"}
        assert summary["tokens_per_second"] > 0
        assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["kind"] == "summary"

    @pytest.mark.parametrize(
        ("groups", "limit", "expected"),
        [
            ([None] * 4, 2, [0, 1]),
            (["a", "a", "a", "b", "b", "c"], 4, [0, 1, 3, 5]),
            (["a", "b"], 9, [0, 1]),
            (["a", "b"], None, [0, 1]),
        ],
    )
    def test_a_limit_takes_of_each_group_in_turn(
        self, groups: list[str | None], limit: int | None, expected: list[int]
    ) -> None:
        assert select(groups, limit) == expected


class TestComparison:
    def arm(
        self, policy: ExitPolicy, name: str, directory: Path, path: Path, **options: Any
    ) -> Result:
        lm = lm_on("cpu", subject_with(1024))
        lm.policy = policy
        return evaluate(choice_run(lm, name, directory, **options), path)

    def test_the_backbone_agrees_with_itself(self, directory: Path, tmp_path: Path) -> None:
        first, second = (
            self.arm(ExitPolicy.never(), "arc_easy", directory, tmp_path / f"{n}.jsonl")
            for n in (1, 2)
        )
        compared = compare_results(first, second)
        assert compared["agreement"] == 1
        assert compared["mcnemar_p"] == 1
        assert compared["items"] == 6

    def test_items_are_counted_where_arms_differ(self, directory: Path, tmp_path: Path) -> None:
        first = self.arm(ExitPolicy.always(), "arc_easy", directory, tmp_path / "1.jsonl")
        second = self.arm(ExitPolicy.never(), "arc_easy", directory, tmp_path / "2.jsonl")
        pairs = [(first.items[i], second.items[i]) for i in first.items]
        compared = compare_results(first, second)
        assert compared["only_first"] == sum(a["correct"] and not b["correct"] for a, b in pairs)
        same = [a["prediction"] == b["prediction"] for a, b in pairs]
        assert compared["agreement"] == pytest.approx(sum(same) / 6)
        assert compared["policy"]["kind"] == "never"

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("arc_challenge", {"shots": 0}, "its task is 'arc_challenge', not 'arc_easy'"),
            ("arc_easy", {"limit": 3}, "it has 3 items, not the 6"),
        ],
    )
    def test_other_items_are_refused(
        self,
        directory: Path,
        tmp_path: Path,
        name: str,
        options: dict[str, Any],
        message: str,
    ) -> None:
        first = self.arm(MIXED, "arc_easy", directory, tmp_path / "1.jsonl")
        second = self.arm(MIXED, name, directory, tmp_path / "2.jsonl", **options)
        with pytest.raises(ResultFileError, match=message):
            compare_results(first, second)

    def test_one_that_is_not_whole_is_refused(self, directory: Path, tmp_path: Path) -> None:
        first = self.arm(MIXED, "arc_easy", directory, tmp_path / "1.jsonl")
        lines = first.path.read_bytes().splitlines(keepends=True)
        cut = tmp_path / "2.jsonl"
        cut.write_bytes(b"".join(lines[:-1]))
        with pytest.raises(ResultFileError, match=r"2\.jsonl is not whole"):
            compare_results(first, read_result(cut))


def test_a_conversation_does_not_trust_a_cache_that_a_task_has_used(
    make_lm: Callable[..., RiverLM], directory: Path
) -> None:
    lm = make_lm()
    lm.policy = ExitPolicy.never()
    tokens = list(range(5, 15))
    sampling = generation_run.SamplingConfig(max_new_tokens=5)

    def continued() -> list[int]:
        return [r.token for r in lm.stream_tokens(tokens, sampling, reuse_cache=True)]

    expected = continued()
    run = choice_run(lm, "blimp", directory)
    run.answer(run.ids)
    assert continued() == expected
