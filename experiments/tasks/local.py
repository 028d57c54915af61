"""lm-eval's own tasks over JSON lines in the folder $RIVER_LLM_DATA, without the Hub.

A YAML file beside this one is a group of one task of lm-eval, `NAME_local`, whose `custom_dataset`
is a function from here: it gives the splits in the fields that the task reads. `humaneval` and
`mbpp` stand as a whole in theirs, since lm-eval's load their scorer from the Hub.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk
from datasets import Dataset

Record = dict[str, Any]
Splits = dict[str, Dataset]

_SECONDS = 10  # of a program
_OF_SENTENCES = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
_log = logging.getLogger("lm_eval.tasks.local")


def lines(name: str) -> list[Record]:
    """The objects of a file in the data folder, which may be gzipped.

    Raises:
        FileNotFoundError: there is no such file, or $RIVER_LLM_DATA is not set.
    """
    folder = os.environ.get("RIVER_LLM_DATA")
    if not folder:
        raise FileNotFoundError("RIVER_LLM_DATA names no folder; set it to the tasks' data")
    path = Path(folder, name)
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _splits(files: dict[str, str], convert: Callable[[Record], Record]) -> Splits:
    return {
        split: Dataset.from_list([convert(record) for record in lines(name)])
        for split, name in files.items()
    }


def records(files: dict[str, str], **_: Any) -> Splits:
    """Files whose fields are those of the Hub's data set: a file's name by split."""
    return _splits(files, dict)


def arc(files: dict[str, str], **_: Any) -> Splits:
    """question, choices, answer (a place, from 0)."""
    return _splits(files, lambda one: {**one, **_lettered(one)})


def openbookqa(files: dict[str, str], **_: Any) -> Splits:
    """As `arc`."""
    return _splits(files, lambda one: {"question_stem": one["question"], **_lettered(one)})


def _lettered(record: Record) -> Record:
    letters = [chr(ord("A") + place) for place in range(len(record["choices"]))]
    choices = {"text": record["choices"], "label": letters}
    return {"choices": choices, "answerKey": letters[record["answer"]]}


def boolq(files: dict[str, str], **_: Any) -> Splits:
    """passage, question, answer (true or false)."""
    return _splits(files, lambda one: {**one, "label": int(one["answer"])})


def hellaswag(files: dict[str, str], **_: Any) -> Splits:
    """context and endings as lm-eval's preprocessing leaves them, label."""
    return _splits(files, lambda one: {**one, "query": one["context"], "choices": one["endings"]})


def winogrande(files: dict[str, str], **_: Any) -> Splits:
    """question (with `_`), choices, answer (a place, from 0)."""

    def convert(one: Record) -> Record:
        first, second = one["choices"]
        options = {"option1": first, "option2": second}
        return {"sentence": one["question"], **options, "answer": str(one["answer"] + 1)}

    return _splits(files, convert)


def mmlu(files: dict[str, str], config_source: str, **_: Any) -> Splits:
    """subject, question, choices, answer; the subject is in the name of the task's own file."""
    subject = Path(config_source).stem.removeprefix("mmlu_")
    return {
        split: Dataset.from_list([one for one in lines(name) if one["subject"] == subject])
        for split, name in files.items()
    }


def mbpp(file: str, **_: Any) -> Splits:
    """Tasks 2, 3 and 4 are the examples, all others are asked."""
    found = [{**one, "is_example": one["task_id"] in (2, 3, 4)} for one in lines(file)]
    return {
        "prompt": Dataset.from_list([one for one in found if one["is_example"]]),
        "test": Dataset.from_list([one for one in found if not one["is_example"]]),
    }


def ifeval(files: dict[str, str], **_: Any) -> Splits:
    """IFEval's own records, without those whose check needs NLTK's punkt_tab where it is not."""
    try:
        nltk.data.find("tokenizers/punkt_tab")
        return records(files)
    except LookupError:
        whole = {split: lines(name) for split, name in files.items()}
        kept = {
            split: [one for one in found if _OF_SENTENCES.isdisjoint(one["instruction_id_list"])]
            for split, found in whole.items()
        }
        count = sum(map(len, whole.values())) - sum(map(len, kept.values()))
        get = "python -m nltk.downloader punkt_tab"
        _log.warning("ifeval: %d prompts are left out; they need punkt_tab: %s", count, get)
        return {split: Dataset.from_list(found) for split, found in kept.items()}


# ---- programs of the model: run them in a container only ----


def completions(resps: list[list[str]], docs: list[Record]) -> list[list[str]]:
    """Each prompt of HumanEval with its completions."""
    return [
        [doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)
    ]


def pass_at_1(references: list[str], predictions: list[Any]) -> float:
    """1 if the first program passes its test within `_SECONDS`, as a process of its own, else 0."""
    program = predictions[0] if isinstance(predictions[0], str) else predictions[0][0]
    command = [sys.executable, "-I", "-c", f"{program}\n{references[0]}\n"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 0.0
    return float(done.returncode == 0)
