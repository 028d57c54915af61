"""Hand-made items in the format of the tasks' files, and a directory that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ADD = 'def add(a, b):\n    """ The sum of two numbers.\n    >>> add(1, 2)\n    3\n    """\n'
_CHECK = (
    "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
)


def _lettered(n: int) -> dict[str, Any]:
    return {
        "id": n,
        "question": f"What follows on {n}?",
        "choices": [str(n + 2), str(n + 1), "nothing at all"],
        "answer": 1,
    }


ITEMS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_test.jsonl": [
        {"question": f"Ann has {n} pens and buys 2. How many?", "answer": f"{n}+2\n#### {n + 2}"}
        for n in range(5)
    ],
    "gsm8k_train.jsonl": [
        {"question": f"{n} plus 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
        for n in range(9)
    ],
    "math500_test.jsonl": [{"problem": "What is $1+1$?", "answer": "2"}] * 2,
    "humaneval.jsonl": [
        {"task_id": f"T/{n}", "prompt": _ADD, "entry_point": "add", "test": _CHECK}
        for n in range(3)
    ],
    "ifeval.jsonl": [
        {
            "key": 1,
            "prompt": "Describe a river without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
    ],
    "hellaswag_4.jsonl": [
        {
            "context": f"Rivers {n}: The river",
            "endings": ["runs to the sea.", "is a hat.", "eats.", "sits on two chairs."],
            "label": n % 4,
        }
        for n in range(4)
    ],
    "arc_easy_test.jsonl": [_lettered(n) for n in range(6)],
    "arc_challenge_test.jsonl": [_lettered(n) for n in range(3)],
    "arc_challenge_train.jsonl": [_lettered(n) for n in range(10, 13)],
    "openbookqa_test.jsonl": [{**_lettered(n), "question": "A river is"} for n in range(3)],
    "piqa_valid.jsonl": [
        {"goal": "To drink", "sol1": "open the mouth.", "sol2": "shut the mouth.", "label": 0}
    ],
    "boolq_dev.jsonl": [
        {"passage": "Water is wet.", "question": "is water wet", "answer": True, "title": "Water"}
    ]
    * 2,
    "winogrande_dev.jsonl": [
        {
            "question": "The cup fell on the table and _ broke at once.",
            "choices": ["the cup", "the table"],
            "answer": 0,
        }
    ],
    "mmlu_test.jsonl": [
        {
            "subject": subject,
            "question": f"{n} + 1 = ?",
            "choices": [str(n), str(n + 1), str(n + 2), "none"],
            "answer": 1,
        }
        for subject in ("sums", "more_sums")
        for n in range(3)
    ],
    "mmlu_dev.jsonl": [
        {
            "subject": subject,
            "question": f"{n} + 2 = ?",
            "choices": [str(n + 2), "1000", "2000", "none"],
            "answer": 0,
        }
        for n in range(2)
        for subject in ("sums", "more_sums")
    ],
    "blimp_one.jsonl": [
        {"sentence_good": "The cats run.", "sentence_bad": "The cats runs.", "UID": "one"}
    ]
    * 3,
    "blimp_two.jsonl": [
        {"sentence_good": "She sees herself.", "sentence_bad": "She sees himself.", "UID": "two"}
    ]
    * 3,
}


def write_items(directory: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write files of items, one a line."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, items in files.items():
        lines = [json.dumps(item) for item in items]
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory
