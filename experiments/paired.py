"""Is one variant better than another? Two sample logs of lm-eval, item by item.

    river-llm eval --tasks arc_easy --log_samples --model_args policy=never --output_path backbone
    river-llm eval --tasks arc_easy --log_samples --model_args threshold=0.97 --output_path river
    python experiments/paired.py backbone river

Each is a log (`samples_TASK_DATE.jsonl`) or a folder of them, of which a task's last one counts.
For every metric of the tasks in both: the means, the mean difference (second less first) with its
95 % interval (Student's t over items), and p of McNemar's exact test where items are right or
wrong, else of Wilcoxon's signed ranks. `same` is the share of items with the same answer: the same
text, or the same most likely choice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from output import describe, print_table, write_json
from scipy import stats

Items = dict[tuple[int, str], dict[str, Any]]  # by place and filter


def main() -> None:
    """Read both, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("first", "second", "--output"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    first, second = read_logs(given.first), read_logs(given.second)
    if not (tasks := sorted(first.keys() & second.keys())):
        raise SystemExit(f"{given.first} and {given.second} have no task in common")
    rows = [row for task in tasks for row in compare(task, first[task], second[task])]
    shown = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    print_table(list(rows[0]), shown)
    if given.output:
        write_json(given.output, {**describe(), "pairs": rows})


def read_logs(path: Path) -> dict[str, Items]:
    """The items of every task; at least one, else SystemExit."""
    logs = path.rglob("samples_*.jsonl") if path.is_dir() else [path]
    found: dict[str, Items] = {}
    for log in sorted(logs, key=lambda log: log.stem.rpartition("_")[2]):
        samples = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        task = log.stem.removeprefix("samples_").rpartition("_")[0]
        found[task] = {(one["doc_id"], one.get("filter", "none")): one for one in samples}
    if not found:
        raise SystemExit(f"{path} has no samples_*.jsonl; give river-llm eval --log_samples")
    return found


def compare(task: str, first: Items, second: Items) -> list[dict[str, Any]]:
    """A row for each filter and metric, over the items that both have. Raises SystemExit: items of
    the same place are not the same."""
    rows: list[dict[str, Any]] = []
    for name in sorted({filter_ for _, filter_ in first}):
        keys = sorted(key for key in first.keys() & second.keys() if key[1] == name)
        pairs = [(first[key], second[key]) for key in keys]
        if any(one["doc_hash"] != other["doc_hash"] for one, other in pairs):
            raise SystemExit(f"{task}: the logs are of different items")
        same = sum(_answer(one) == _answer(other) for one, other in pairs)
        for metric in pairs[0][0]["metrics"] if pairs else ():
            values = np.array([[np.mean(side[metric]) for side in pair] for pair in pairs])
            heading = {"task": task, "metric": f"{metric},{name}", "items": len(pairs)}
            rows.append({**heading, **paired_test(*values.T), "same": same / len(pairs)})
    return rows


def paired_test(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Means, mean difference, its 95 % interval and p; NaN where there is too little to say."""
    change = second - first
    interval = stats.ttest_1samp(change, 0).confidence_interval()
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    p = 1.0
    if won + lost and {*first, *second} <= {0, 1}:
        p = stats.binomtest(won, won + lost).pvalue  # McNemar's exact test
    elif won + lost:
        p = stats.wilcoxon(change).pvalue
    names = ("first", "second", "difference", "low", "high", "p")
    values = (first.mean(), second.mean(), change.mean(), interval.low, interval.high, p)
    return dict(zip(names, map(float, values), strict=True))


def _answer(sample: dict[str, Any]) -> Any:
    """What was answered: the place of the most likely choice, or the text."""
    found = sample["filtered_resps"]
    if all(
        isinstance(one, list) and len(one) == 2 and one[1] in ("True", "False") for one in found
    ):
        return max(range(len(found)), key=lambda place: float(found[place][0]))
    return found


if __name__ == "__main__":
    main()
