"""Runs a task to its end, or goes on where it was cut short; compares two results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from river_llm.benchmark.environment import describe_run
from river_llm.errors import ConfigError, InterruptedRunError, ResultFileError
from river_llm.evaluation.result_file import Result, ResultWriter, check_whole, read_result
from river_llm.evaluation.run import Run
from river_llm.evaluation.statistics import compare_pairs

_PACKAGES = ("river-llm", "torch", "transformers", "tokenizers", "numpy", "lm-eval", "math-verify")
# What two results have to share so that their items can be compared.
_COMPARABLE = (
    "task",
    "data",
    "left_out",
    "form",
    "shots",
    "examples",
    "max_new_tokens",
    "window",
)


def evaluate(
    run: Run,
    path: Path,
    *,
    batch_size: int = 1,
    restart: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Answer all items of a run and write them to its result file.

    Items that the file has already are not answered again; where it has all of them, nothing is.

    Args:
        batch_size: items answered together. Answers don't depend on it, up to the rounding of the
            torch engine.
        restart: begin anew.
        settings: told in the result file beside versions and machine, as threads.
        progress: called with (items done, items in all).

    Raises:
        ResultFileError: the file is of another run, holds more items than this one has, or can't
            be written.
        InterruptedRunError: Ctrl-C came; what was answered is in the file.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; give 1 or more")
    with ResultWriter(path, run.identity, restart=restart) as writer:
        records = dict(writer.result.items)
        strange = sorted(set(records) - set(run.ids))
        if strange:
            raise ResultFileError(
                f"{path} holds {len(records)} items, this run has {len(run.ids)} and not item "
                f"{strange[0]}; give a larger --limit, --output another folder, or --restart"
            )
        left = [item for item in run.ids if item not in records]
        if not left and writer.result.summary is not None:
            return writer.result
        writer.begin_part({**describe_run(_PACKAGES), "batch_size": batch_size, **(settings or {})})
        try:
            for first in range(0, len(left), batch_size):
                batch = left[first : first + batch_size]
                start = time.perf_counter()
                answers = run.answer(batch)
                seconds = (time.perf_counter() - start) / len(batch)
                new = {
                    item: {"id": item, **answer, "seconds": round(seconds, 6)}
                    for item, answer in zip(batch, answers, strict=True)
                }
                writer.add_items(new.values())
                records |= new
                if progress:
                    progress(len(records), len(run.ids))
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted after {len(records)} of {len(run.ids)} items of {run.name}; "
                "the same command goes on"
            ) from None
        writer.end(run.summarise([records[item] for item in run.ids]))
    return read_result(path)


def check_comparable(result: Result, run: Mapping[str, Any], ids: set[int]) -> None:
    """See that a result can be compared with a run of these items, which needn't have begun.

    Raises:
        ResultFileError: it is of another task, of other prompts or of other items.
    """
    for name in _COMPARABLE:
        if run.get(name) != result.run.get(name):
            raise ResultFileError(
                f"{result.path} can't be compared: its {name} is {result.run.get(name)!r}, "
                f"not {run.get(name)!r}"
            )
    if ids != set(result.items):
        raise ResultFileError(
            f"{result.path} can't be compared: it has {len(result.items)} items, not the "
            f"{len(ids)} of this run"
        )


def compare_results(first: Result, second: Result) -> dict[str, Any]:
    """How often two arms give the same answer to an item, and whether one solves more.

    Both have to be whole, of the same task, items and prompts.

    Raises:
        ResultFileError: they are not.
    """
    for result in (first, second):
        check_whole(result)
    check_comparable(second, first.run, set(first.items))
    pairs = [(first.items[item], second.items[item]) for item in first.items]
    if any("correct" not in record for pair in pairs for record in pair):
        raise ResultFileError(f"{second.run.get('task')} has no answers to compare")
    compared = compare_pairs(
        [a["prediction"] == b["prediction"] for a, b in pairs],
        [a["correct"] for a, _ in pairs],
        [b["correct"] for _, b in pairs],
    )
    return {
        "with": str(second.path),
        "policy": second.run.get("policy"),
        "accuracy": second.summary["accuracy"] if second.summary else None,
        **asdict(compared),
    }
