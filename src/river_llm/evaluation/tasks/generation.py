"""The tasks whose answers are generated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from river_llm.errors import DataError
from river_llm.evaluation.code_execution import Limits, run_program
from river_llm.evaluation.data import DataSource, HubSource, Record
from river_llm.evaluation.final_number import final_number, marked_number
from river_llm.evaluation.instruction_check import InstructionChecker
from river_llm.evaluation.math_answer import MathVerifier
from river_llm.evaluation.program_text import (
    STOP,
    completed_function,
    function_of_answer,
    with_test,
)
from river_llm.evaluation.tasks.math_examples import MATH_EXAMPLES
from river_llm.evaluation.tasks.task import GenerationTask, Scorer, Verdict

_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator


class _Gsm8kScorer(Scorer):
    """Exact match of the final number; ``strict`` asks for GSM8K's mark before it too."""

    def score(self, record: Record, answer: str, is_chat: bool) -> Verdict:
        expected = final_number(record.text("answer"))
        if expected is None:
            raise DataError(f"{record.place}: the answer has no number")
        found = final_number(answer)
        return Verdict(
            None if found is None else str(found),
            found == expected,
            {"strict": marked_number(answer) == expected},
        )


class _MathScorer(Scorer):
    """Equality as `math-verify` sees it."""

    def __init__(self) -> None:
        self._verifier = MathVerifier()

    def score(self, record: Record, answer: str, is_chat: bool) -> Verdict:
        expected = record.text("answer")
        return Verdict(self._verifier.extract(answer), self._verifier.is_right(answer, expected))


class _HumanEvalScorer(Scorer):
    """pass@1: whether the program passes the task's test, run confined."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits

    def score(self, record: Record, answer: str, is_chat: bool) -> Verdict:
        prompt, entry_point = record.text("prompt"), record.text("entry_point")
        if is_chat:
            program = function_of_answer(prompt, answer, entry_point)
        else:
            program = completed_function(prompt.rstrip("\n"), answer)
        result = run_program(with_test(program, record.text("test"), entry_point), self._limits)
        details = {
            "task_id": record.fields.get("task_id"),
            "outcome": result.outcome,
            "output": result.output[-500:],
            "isolation": result.isolation,
        }
        return Verdict(answer, result.passed, details=details)


class _IfevalScorer(Scorer):
    """All instructions of a prompt followed, strictly; the other three scores beside."""

    def __init__(self) -> None:
        self._checker = InstructionChecker()

    def score(self, record: Record, answer: str, is_chat: bool) -> Verdict:
        score = self._checker.score(record.fields, answer)
        return Verdict(
            answer,
            all(score.strict),
            {
                "loose": all(score.loose),
                "instruction_strict": score.strict,
                "instruction_loose": score.loose,
            },
        )

    def cannot_score(self, record: Record) -> str | None:
        return self._checker.cannot_check(record.fields)


def _gsm8k_solution(record: Record) -> str:
    return f" {_CALCULATION.sub('', record.text('answer'))}"


def _gsm8k_request(record: Record) -> str:
    return (
        f"{record.text('question')}\n\nSolve this step by step, and end with a line that has #### "
        "and the final number."
    )


def _math_request(record: Record) -> str:
    return (
        f"{record.text('problem')}\n\nSolve this step by step, and put the final answer into "
        "\\boxed{}."
    )


def _humaneval_request(record: Record) -> str:
    return (
        "Complete this Python function. Answer with one block of code that has the whole function."
        f"\n\n```python\n{record.text('prompt').rstrip()}\n```"
    )


def _from_ifeval(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The Hub's rows name every argument of every instruction, most of them null."""
    kwargs = [{k: v for k, v in each.items() if v is not None} for each in row["kwargs"]]
    return {**row, "kwargs": kwargs}


_GSM8K = "openai/gsm8k"

GENERATION_TASKS = (
    GenerationTask(
        "gsm8k",
        DataSource("gsm8k_test*.jsonl", HubSource(_GSM8K, "main", "test")),
        prompt=lambda record: f"Question: {record.text('question')}\nAnswer:",
        request=_gsm8k_request,
        make_scorer=_Gsm8kScorer,
        solution=_gsm8k_solution,
        examples=DataSource("gsm8k_train*.jsonl", HubSource(_GSM8K, "main", "train")),
        shots=8,
        stop=("Question:",),
    ),
    GenerationTask(
        "math500",
        DataSource("math500_test*.jsonl", HubSource("HuggingFaceH4/MATH-500", None, "test")),
        prompt=lambda record: f"Problem: {record.text('problem')}\nSolution:",
        request=_math_request,
        make_scorer=_MathScorer,
        solution=lambda record: f" {record.text('solution')}",
        examples=MATH_EXAMPLES,
        stop=("Problem:",),
        new_tokens=1024,
        is_chat=True,
    ),
    GenerationTask(
        "humaneval",
        DataSource("humaneval*.jsonl", HubSource("openai/openai_humaneval", None, "test")),
        prompt=lambda record: record.text("prompt").rstrip("\n"),
        request=_humaneval_request,
        make_scorer=_HumanEvalScorer,
        stop=STOP,
        runs_code=True,
    ),
    GenerationTask(
        "ifeval",
        DataSource("ifeval*.jsonl", HubSource("google/IFEval", None, "train", _from_ifeval)),
        prompt=lambda record: record.text("prompt"),
        request=lambda record: record.text("prompt"),
        make_scorer=_IfevalScorer,
        new_tokens=1280,
        is_chat=True,
    ),
)
