"""The real data sets, where `$RIVER_LLM_DATA` names a directory that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from river_llm.evaluation.data import ENVIRONMENT_VARIABLE, read_records
from river_llm.evaluation.final_number import final_number, marked_number
from river_llm.evaluation.instruction_check import InstructionChecker
from river_llm.evaluation.math_answer import MathVerifier
from river_llm.evaluation.program_text import STOP
from river_llm.evaluation.tasks.choice import CHOICE_TASKS
from river_llm.evaluation.tasks.generation import GENERATION_TASKS
from river_llm.evaluation.tasks.task import ChoiceTask

pytestmark = pytest.mark.skipif(
    not os.environ.get(ENVIRONMENT_VARIABLE), reason=f"{ENVIRONMENT_VARIABLE} names no directory"
)
TASKS = {task.name: task for task in GENERATION_TASKS}


@pytest.fixture(scope="module")
def directory() -> Path:
    return Path(os.environ[ENVIRONMENT_VARIABLE])


@pytest.mark.parametrize("task", CHOICE_TASKS, ids=lambda task: task.name)
def test_every_choice_item_is_a_question(task: ChoiceTask, directory: Path) -> None:
    questions = [task.question(record) for record in read_records(task.source, directory)]
    assert len(questions) >= 500
    for question in questions:
        assert len(question.contexts) == len(question.choices) >= 2
        assert 0 <= question.answer < len(question.choices)


def test_every_answer_of_gsm8k_scores_itself(directory: Path) -> None:
    task = TASKS["gsm8k"]
    for record in read_records(task.source, directory):
        verdict = task.make_scorer().score(record, record.text("answer"), False)
        assert verdict.correct
        assert verdict.metrics == {"strict": True}
        number = marked_number(record.text("answer"))
        assert final_number(f"So the answer is ${number}.") == number


@pytest.mark.slow
def test_every_answer_of_math500_equals_itself(directory: Path) -> None:
    pytest.importorskip("math_verify")
    verifier = MathVerifier()
    answers = [r.text("answer") for r in read_records(TASKS["math500"].source, directory)]
    wrong = [a for a in answers if not verifier.is_right(f"It is $\\boxed{{{a}}}$.", a)]
    assert wrong == []


@pytest.mark.slow
def test_every_solution_of_humaneval_passes_and_an_empty_one_fails(directory: Path) -> None:
    task = TASKS["humaneval"]
    scorer = task.make_scorer()
    records = read_records(task.source, directory)
    failed = []
    for record in records:
        solution = record.text("canonical_solution")
        # as the harness cuts a completion
        end = min((solution.find(s) for s in STOP if s in solution), default=len(solution))
        assert task.prompt(record) + "\n" == record.text("prompt").rstrip("\n") + "\n"
        verdict = scorer.score(record, "\n" + solution[:end], False)
        failed += [] if verdict.correct else [(record.text("task_id"), verdict.details)]
    assert failed == []
    assert not any(scorer.score(record, "", False).correct for record in records[:8])


@pytest.mark.slow
def test_every_item_of_ifeval_can_be_checked(directory: Path) -> None:
    pytest.importorskip("langdetect")
    checker = InstructionChecker()
    for record in read_records(TASKS["ifeval"].source, directory):
        if checker.cannot_check(record.fields) is None:
            score = checker.score(record.fields, "The river runs to the sea.")
            assert len(score.strict) == len(record.fields["instruction_id_list"])
