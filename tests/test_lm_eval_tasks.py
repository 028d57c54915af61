"""lm-eval's tasks over local data (experiments/tasks), and two of its logs beside each other."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")
scipy_stats = pytest.importorskip("scipy.stats")

from lm_eval.tasks import TaskManager  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import paired  # noqa: E402

CHOICES = {"question": "Which?", "choices": ["this", "that"], "answer": 1}
MMLU = {**CHOICES, "choices": ["a", "b", "c", "d"]}
SUBJECTS = [
    path.stem.removeprefix("mmlu_")
    for path in Path(lm_eval.__file__).parent.glob("tasks/mmlu/default/mmlu_*.yaml")
]
MATH = {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "answer": "2"}
SUM = {"question": "1+1?", "answer": "1+1=2\n#### 2"}
PROGRAM = {
    "prompt": "def one():\n",
    "entry_point": "one",
    "test": "def check(f):\n    assert f() == 1\n",
}
EXERCISE = {"text": "Write one.", "code": "def one(): return 1", "test_list": ["assert one()"] * 3}
INSTRUCTION = {
    "key": 1,
    "prompt": "No commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
SENTENCES = {**INSTRUCTION, "instruction_id_list": ["length_constraints:number_sentences"]}
DATA: dict[str, list[dict[str, Any]]] = {
    "arc_easy_test.jsonl": [CHOICES],
    "arc_challenge_test.jsonl": [CHOICES],
    "openbookqa_test.jsonl": [CHOICES],
    "hellaswag_2000.jsonl": [{"context": "It", "endings": [" is", " was"], "label": 0}],
    "winogrande_dev.jsonl": [{**CHOICES, "question": "It is _ one."}],
    "piqa_valid.jsonl": [{"goal": "Go", "sol1": "so", "sol2": "or so", "label": 1}],
    "boolq_dev_1000.jsonl": [{"passage": "It is.", "question": "is it", "answer": True}],
    "gsm8k_train_1000.jsonl": [SUM] * 6,
    "gsm8k_test.jsonl": [SUM],
    "math500_test.jsonl": [MATH],
    "humaneval.jsonl": [PROGRAM],
    "mbpp_nontest_465.jsonl": [{**EXERCISE, "task_id": place} for place in range(1, 6)],
    "ifeval.jsonl": [INSTRUCTION, SENTENCES],
    "mmlu_dev.jsonl": [{**MMLU, "subject": subject} for subject in SUBJECTS],
    "mmlu_test.jsonl.gz": [{**MMLU, "subject": s, "question": s} for s in SUBJECTS],
}
TASKS = {  # with the metric, and what the first choice or an empty answer gives
    "arc_easy": "acc,none",
    "arc_challenge": "acc_norm,none",
    "openbookqa": "acc,none",
    "hellaswag": "acc,none",
    "winogrande": "acc,none",
    "piqa": "acc,none",
    "boolq": "acc,none",
    "gsm8k": "exact_match,strict-match",
    "minerva_math500": "math_verify,none",
    "ifeval": "prompt_level_strict_acc,none",
    "humaneval_local": "pass_at_1,create_test",
    "mbpp_local": "pass_at_1,none",
}


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Of the tasks, which read small files."""
    for name, records in DATA.items():
        content = "".join(json.dumps(one) + "\n" for one in records).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    monkeypatch.setenv("RIVER_LLM_DATA", str(tmp_path))
    return TaskManager(include_path=str(EXPERIMENTS / "tasks"))


def test_every_task_reads_the_local_files(manager: TaskManager) -> None:
    names = [name.removesuffix("_local").replace("minerva_", "") + "_local" for name in TASKS]
    found = lm_eval.simple_evaluate(
        "dummy", tasks=names, task_manager=manager, confirm_run_unsafe_code=True, bootstrap_iters=0
    )
    for task, metric in TASKS.items():
        assert found["results"][task][metric] in (0, 1)
        count = 2 if task == "mbpp_local" else 1
        assert len({sample["doc_id"] for sample in found["samples"][task]}) == count
    (sample,) = found["samples"]["arc_easy"]
    assert sample["arguments"][1] == ("Question: Which?\nAnswer:", " that")
    assert sample["target"] == 1
    subjects = manager.load(["mmlu_local"])["tasks"]
    assert len(subjects) == 57
    anatomy = subjects["mmlu_anatomy"]
    assert list(anatomy.test_docs()) == [{**MMLU, "subject": "anatomy", "question": "anatomy"}]
    assert list(anatomy.fewshot_docs()) == [{**MMLU, "subject": "anatomy"}]


def test_a_program_is_judged_by_its_test() -> None:
    sys.path.insert(0, str(EXPERIMENTS / "tasks"))
    import local

    test = f"{PROGRAM['test']}check(one)"
    (programs,) = local.completions([["    return 1\n", "    return 2\n"]], [PROGRAM])
    assert [local.pass_at_1([test], [program]) for program in programs] == [1, 0]


# ---- two logs ----


def sample(place: int, score: float, answer: str, name: str = "acc") -> dict[str, Any]:
    return {
        "doc_id": place,
        "doc_hash": str(place),
        "filter": "none",
        "filtered_resps": [answer],
        "metrics": [name],
        name: score,
    }


def items(scores: list[float], answers: str) -> paired.Items:
    pairs = enumerate(zip(scores, answers, strict=True))
    return {(place, "none"): sample(place, *one) for place, one in pairs}


def test_items_are_compared_in_pairs() -> None:
    first, second = items([0, 0, 0, 0, 1, 1], "aaaaab"), items([1, 1, 1, 0, 0, 1], "bbbaab")
    (row,) = paired.compare("task", first, second)
    assert row["p"] == pytest.approx(2 * (1 + 4) / 16)  # McNemar: one lost, three won
    assert row["difference"] == pytest.approx(2 / 6)
    assert row["low"] < row["difference"] < row["high"]
    assert row["same"] == 3 / 6
    first, second = items([0.1, 0.2, 0.3, 0.4], "aaaa"), items([0.2, 0.4, 0.6, 0.8], "aaaa")
    (row,) = paired.compare("task", first, second)  # other scores by signed ranks
    assert row["p"] == pytest.approx(scipy_stats.wilcoxon([0.1, 0.2, 0.3, 0.4]).pvalue)
    first, second = items([1], "a"), items([1], "a")
    first[0, "none"]["filtered_resps"] = [["-3.5", "False"], ["-2.0", "True"]]
    second[0, "none"]["filtered_resps"] = [["-9.0", "False"], ["-8.5", "False"]]
    (row,) = paired.compare("task", first, second)
    assert row["same"] == 1  # a choice is the most likely one


def test_logs_of_different_items_are_refused(tmp_path: Path) -> None:
    first, second = items([1, 0], "ab"), items([1, 0], "ab")
    second[0, "none"]["doc_hash"] = "other"
    with pytest.raises(SystemExit, match="of different items"):
        paired.compare("task", first, second)
    with pytest.raises(SystemExit, match="give river-llm eval --log_samples"):
        paired.read_logs(tmp_path)


def test_the_last_log_of_a_task_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for date, score in (("2026-01-02T03-04-05", 0.0), ("2026-01-03T03-04-05", 1.0)):
        lines = [json.dumps(sample(place, score, "a")) for place in range(3)]
        (tmp_path / f"samples_arc_easy_{date}.jsonl").write_text("\n".join(lines))
    output = tmp_path / "pairs.json"
    monkeypatch.setattr(
        sys, "argv", ["paired.py", str(tmp_path), str(tmp_path), "--output", str(output)]
    )
    paired.main()
    (row,) = json.loads(output.read_text())["pairs"]
    assert (row["task"], row["first"], row["items"], row["p"]) == ("arc_easy", 1, 3, 1)
