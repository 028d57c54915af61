"""The choice tasks, in the forms that lm-eval made common.

Each function makes the question of one item out of its fields, which are those of the files in
`docs/evaluation.md`; `_from_...` turn the Hub's rows into the same fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from river_llm.errors import DataError
from river_llm.evaluation.data import DataSource, HubSource, Record
from river_llm.evaluation.tasks.task import ChoiceTask, Question

_LETTERS = "ABCDEFGHIJ"

_Row = Mapping[str, Any]


def _question(
    record: Record, context: str, choices: list[str], answer: int, **more: Any
) -> Question:
    if not all(choice.strip() for choice in choices):
        raise DataError(f"{record.place}: a choice is empty")
    texts = tuple(f" {choice}" for choice in choices)
    return Question((context,) * len(texts), texts, answer, **more)


def _hellaswag(record: Record) -> Question:
    endings = record.texts("endings")
    return _question(record, record.text("context"), endings, record.place_in("label", endings))


def _arc(record: Record) -> Question:
    choices = record.texts("choices")
    context = f"Question: {record.text('question')}\nAnswer:"
    return _question(record, context, choices, record.place_in("answer", choices))


def _openbookqa(record: Record) -> Question:
    choices = record.texts("choices")
    return _question(record, record.text("question"), choices, record.place_in("answer", choices))


def _piqa(record: Record) -> Question:
    choices = [record.text("sol1"), record.text("sol2")]
    context = f"Question: {record.text('goal')}\nAnswer:"
    return _question(record, context, choices, record.place_in("label", choices))


def _boolq(record: Record) -> Question:
    context = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    return _question(record, context, ["no", "yes"], int(record.truth("answer")))


def _winogrande(record: Record) -> Question:
    """Either name is put into the blank; what is scored is the text after it (Trinh, Le 2018)."""
    before, blank, after = record.text("question").partition("_")
    if not blank or not after.strip():
        raise DataError(f"{record.place}: the question has no blank (_) with text after it")
    names = record.texts("choices")
    rest = f" {after.strip()}"
    return Question(
        tuple(before + name for name in names),
        (rest,) * len(names),
        record.place_in("answer", names),
    )


def _mmlu(record: Record) -> Question:
    choices = record.texts("choices")
    if len(choices) > len(_LETTERS):
        raise DataError(f"{record.place}: there are {len(choices)} choices, more than letters")
    letters = list(_LETTERS[: len(choices)])
    lines = [record.text("question").strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    subject = record.text("subject")
    about = subject.replace("_", " ")
    return _question(
        record,
        "\n".join([*lines, "Answer:"]),
        letters,
        record.place_in("answer", choices),
        group=subject,
        heading=f"The following are multiple choice questions (with answers) about {about}.\n\n",
    )


def _blimp(record: Record) -> Question:
    sentences = [record.text("sentence_good"), record.text("sentence_bad")]
    return _question(record, "", sentences, 0, group=record.text("UID"))


def _from_hellaswag(row: _Row) -> _Row:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_brackets(ending) for ending in row["endings"]]
    return {
        "context": _without_brackets(context),
        "endings": endings,
        "label": int(row["label"]),
    }


def _without_brackets(text: str) -> str:
    """Without WikiHow's marks, as ``[title]``."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _from_lettered(row: _Row) -> _Row:
    """ARC, and OpenBookQA: choices with labels, of which one is the answer."""
    question = row["question"] if "question" in row else row["question_stem"]
    choices = row["choices"]
    answer = list(choices["label"]).index(row["answerKey"].strip())
    return {"question": question, "choices": list(choices["text"]), "answer": answer}


def _from_winogrande(row: _Row) -> _Row:
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "answer": int(row["answer"]) - 1}


def _source(pattern: str, *hub: Any, **more: Any) -> DataSource:
    return DataSource(pattern, HubSource(*hub), **more)


_ARC, _OPENBOOKQA = "allenai/ai2_arc", "allenai/openbookqa"

CHOICE_TASKS = (
    ChoiceTask(
        "hellaswag",
        _source("hellaswag_[!t]*.jsonl", "Rowan/hellaswag", None, "validation", _from_hellaswag),
        _hellaswag,
        by_length=True,
        examples=_source(
            "hellaswag_train*.jsonl", "Rowan/hellaswag", None, "train", _from_hellaswag
        ),
    ),
    ChoiceTask(
        "arc_easy",
        _source("arc_easy_test*.jsonl", _ARC, "ARC-Easy", "test", _from_lettered),
        _arc,
        examples=_source("arc_easy_train*.jsonl", _ARC, "ARC-Easy", "train", _from_lettered),
    ),
    ChoiceTask(
        "arc_challenge",
        _source("arc_challenge_test*.jsonl", _ARC, "ARC-Challenge", "test", _from_lettered),
        _arc,
        by_length=True,
        examples=_source(
            "arc_challenge_train*.jsonl", _ARC, "ARC-Challenge", "train", _from_lettered
        ),
    ),
    ChoiceTask(
        "piqa",
        _source("piqa_valid*.jsonl", "baber/piqa", None, "validation"),
        _piqa,
        examples=_source("piqa_train*.jsonl", "baber/piqa", None, "train"),
    ),
    ChoiceTask(
        "boolq",
        _source("boolq_dev*.jsonl", "google/boolq", None, "validation"),
        _boolq,
        examples=_source("boolq_train*.jsonl", "google/boolq", None, "train"),
    ),
    ChoiceTask(
        "openbookqa",
        _source("openbookqa_test*.jsonl", _OPENBOOKQA, "main", "test", _from_lettered),
        _openbookqa,
        by_length=True,
        examples=_source("openbookqa_train*.jsonl", _OPENBOOKQA, "main", "train", _from_lettered),
    ),
    ChoiceTask(
        "winogrande",
        _source(
            "winogrande_dev*.jsonl",
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            _from_winogrande,
        ),
        _winogrande,
    ),
    ChoiceTask(
        "mmlu",
        _source("mmlu_test*.jsonl", "cais/mmlu", "all", "test"),
        _mmlu,
        examples=_source("mmlu_dev*.jsonl", "cais/mmlu", "all", "dev"),
        shots=5,
    ),
    ChoiceTask(
        "blimp",
        _source("blimp_*.jsonl", "nyu-mll/blimp", "*", "train", is_several=True),
        _blimp,
    ),
)
