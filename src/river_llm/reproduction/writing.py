"""Writes a reproduction: report.md, report.json and report.html, in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from river_llm.report.arms import BACKBONE, full
from river_llm.report.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from river_llm.report.saved import make_folder, write_whole
from river_llm.reproduction.comparison import (
    Row,
    is_papers_machine,
    rows_of,
    statements,
)
from river_llm.reproduction.memory_table import memory_blocks, memory_values
from river_llm.reproduction.paper import BITS, LAYER_SPEED, MEAN_DEPTH, OVER_FULL, SOURCE, UNKNOWN
from river_llm.reproduction.run import Reproduction, task_mean_depth

_FULL = full(BITS).name


def write_report(reproduction: Reproduction, folder: Path) -> tuple[dict[str, Any], list[Block]]:
    """Write all files.

    Returns:
        what report.json holds, and the beginning of the report.

    Raises:
        ResultFileError: a file can't be written.
    """
    make_folder(folder)
    rows = rows_of(reproduction)
    summary = _summary(reproduction, rows)
    beginning = short_blocks(reproduction, rows)
    blocks = [Heading(_title(reproduction), 1), *beginning, *_blocks(reproduction, rows)]
    write_whole(folder / "report.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    write_whole(folder / "report.md", to_markdown(blocks))
    write_whole(folder / "report.html", to_html(blocks, folder))
    return summary, beginning


def short_blocks(reproduction: Reproduction, rows: Sequence[Row]) -> list[Block]:
    """One table, as the paper's: accuracy of every arm and River's speed-up, and what the run is
    worth."""
    river = [arm.name for arm in reproduction.plan.river_arms]
    arms = [arm.name for arm in reproduction.plan.arms]
    timed = river if reproduction.speeds else []
    headings = ["task", *arms, *(f"{name} speed-up" for name in timed)]
    cells = []
    for task in dict.fromkeys(row.task.name for row in rows):
        of_arm = {row.arm.name: row for row in rows if row.task.name == task}
        line = [task]
        for name in arms:
            row = of_arm[name]
            line.append(
                _percent(row.summary) + _beside(row.paper.accuracy, ".1f", row.accuracy_verdict)
            )
        for name in timed:
            row = of_arm[name]
            ratio = "" if row.speed_up is None else f"{row.speed_up['median']:.2f}"
            line.append(ratio + _beside(row.paper.speed_up, ".2f"))
        cells.append(line)
    words = "Accuracy in per cent ± its standard error"
    words += ", and River's speed over the backbone's." if reproduction.speeds else "."
    if reproduction.plan.reference is not None:
        words += " In brackets the paper's, where it is known"
        words += (
            ", with a mark where our accuracy differs." if reproduction.plan.is_reference else "."
        )
    return [Paragraph(words), Table(headings, cells), Paragraph(statements(reproduction)[0])]


def _beside(paper: float | None, form: str, verdict: str | None = None) -> str:
    if paper is None:
        return ""
    mark = _mark(verdict)
    return f" ({paper:{form}}{f', ours {mark}' if mark else ''})"


def _title(reproduction: Reproduction) -> str:
    plan = reproduction.plan
    model = plan.settings.model
    if plan.reference is None:
        return f"The paper's tables: {model}"
    if plan.is_reference:
        return f"The paper's tables: {plan.reference.title}"
    return f"The paper's tables: {model} beside {plan.reference.title}"


# ---- Markdown and HTML ----


def _blocks(reproduction: Reproduction, rows: Sequence[Row]) -> list[Block]:
    plan = reproduction.plan
    blocks: list[Block] = [
        Heading("What can be compared"),
        Bullets(statements(reproduction)),
    ]
    if reproduction.left_out:
        blocks += [Heading("Left out"), Bullets(_left_out(reproduction))]
    blocks += [
        Heading("Accuracy"),
        Paragraph(
            "backbone: the model itself. full-4bit: every layer quantised, no exit. river-T: a "
            "token leaves after the first layer whose similarity exceeds T. Accuracy ± its "
            "standard error, and its 95 % interval (Wilson), which holds near 0 too; agreement: "
            "items with the backbone's answer, right or wrong; p: McNemar's exact test against the "
            "backbone, not corrected for the number of rows; depth: mean backbone layers of a "
            "token."
        ),
        _accuracy_table(reproduction, rows),
    ]
    if reproduction.speeds:
        blocks += [Heading("Speed"), *_speed_blocks(reproduction, rows)]
    blocks += [Heading("Memory"), *memory_blocks(reproduction)]
    blocks += [Heading("The paper's other figures"), _other_table(reproduction)]
    blocks += [
        Heading("How it was run"),
        Code(reproduction.environment["command"]),
        Table(["what", "value"], _circumstances(reproduction)),
    ]
    if plan.reference is not None:
        blocks.append(Paragraph(f"The paper: {SOURCE}. What no summary gives is {UNKNOWN}."))
    return blocks


def _left_out(reproduction: Reproduction) -> list[str]:
    return [f"{name}: {reason}." for name, reason in reproduction.left_out.items()]


def _accuracy_table(reproduction: Reproduction, rows: Sequence[Row]) -> Table:
    plan = reproduction.plan
    headings = ["task", "arm", "shots", "items", "accuracy %", "95 %"]
    if plan.reference is not None:
        headings.append("paper's")
    if plan.is_reference:
        headings.append("ours is")
    headings += ["agreement", "p", "depth"]
    cells = []
    for row in rows:
        line = [
            row.task.name,
            row.arm.name,
            str(row.task.shots),
            str(row.summary["items"]),
            _percent(row.summary),
            f"{100 * row.interval[0]:.1f} to {100 * row.interval[1]:.1f}",
        ]
        if plan.reference is not None:
            line.append(_number(row.paper.accuracy, ".1f"))
        if plan.is_reference:
            line.append(_mark(row.accuracy_verdict))
        line += [
            f"{100 * row.beside_backbone['agreement']:.1f} %",
            f"{row.beside_backbone['mcnemar_p']:.2g}",
            f"{row.depth:.1f}",
        ]
        cells.append(line)
    return Table(headings, cells)


def _speed_blocks(reproduction: Reproduction, rows: Sequence[Row]) -> list[Block]:
    has_reference = reproduction.plan.reference is not None
    headings = ["task", "arm", "tokens/s"]
    if has_reference:
        headings.append("paper's" if is_papers_machine(reproduction) else "paper's, its machine")
    headings += ["times backbone", "lowest to highest"]
    if has_reference:
        headings.append("paper's times")
    headings += [f"times {_FULL}", "depth"]
    cells = []
    for row in rows:
        if row.speed is None or row.speed_up is None:
            continue
        line = [row.task.name, row.arm.name, f"{row.speed['tokens_per_second']['median']:.1f}"]
        if has_reference:
            line.append(_number(row.paper.tokens_per_second, ".1f"))
        line += [
            f"{row.speed_up['median']:.2f}",
            f"{row.speed_up['lowest']:.2f} to {row.speed_up['highest']:.2f}",
        ]
        if has_reference:
            line.append(_number(row.paper.speed_up, ".2f"))
        line += [
            f"{row.speed['ratios'][_FULL]['median']:.2f}",
            f"{row.speed['mean_exit_layer']:.1f}",
        ]
        cells.append(line)
    return [Paragraph(_how_speed_was_measured(reproduction)), Table(headings, cells)]


def _how_speed_was_measured(reproduction: Reproduction) -> str:
    lengths = "; ".join(
        f"{name} {speed['tokens']} after {speed['context']}"
        for name, speed in reproduction.speeds.items()
    )
    return (
        "One sequence: each arm decodes the same tokens, the backbone's own answers, after the "
        "first item's prompt, which the backbone wrote; in turn, "
        f"{reproduction.plan.rounds} rounds after one that warms up. Medians; ratios round by "
        f"round. Tokens: {lengths}."
    )


def _other_table(reproduction: Reproduction) -> Table:
    speeds = reproduction.speeds
    full_speed = [one["arms"][_FULL]["ratios"][BACKBONE.name]["median"] for one in speeds.values()]
    rows = [
        [
            f"{_FULL}, speed over the backbone",
            f"{LAYER_SPEED} (a layer over a layer)",
            _mean(full_speed, ".2f"),
        ]
    ]
    for arm in reproduction.plan.river_arms:
        over_full = [one["arms"][arm.name]["ratios"][_FULL]["median"] for one in speeds.values()]
        depth = task_mean_depth(arm, reproduction.results)
        layers = reproduction.model["num_layers"]
        rows += [
            [f"{arm.name}, mean exit depth", MEAN_DEPTH, f"{depth:.1f} of {layers}"],
            [f"{arm.name}, speed over {_FULL}", OVER_FULL, _mean(over_full, ".2f")],
        ]
    return Table(["what (ours: mean of the tasks)", "paper's, of its models", "ours"], rows)


def _circumstances(reproduction: Reproduction) -> list[list[str]]:
    model, environment = reproduction.model, reproduction.environment
    river = model["river"]
    plan = reproduction.plan
    rows = [
        ["model", f"{model['model']}, {model['num_layers']} layers"],
        ["weights", model["weights"]],
        ["river", f"{river['bits']} bits, groups of {river['group_size']}, {river['quantizer']}"],
        ["engine", reproduction.setting],
        ["processor", f"{environment['processor']}, {environment['cores']} cores"],
        ["versions", ", ".join(f"{k} {v}" for k, v in environment["versions"].items())],
        ["date", environment["date"]],
        ["items of a task", "all" if plan.settings.limit is None else f"{plan.settings.limit}"],
        ["items together", f"{plan.batch_size}"],
    ]
    if reproduction.machine != environment["processor"]:
        rows.append(["accelerator", reproduction.machine])
    return rows


def _percent(summary: dict[str, Any]) -> str:
    error = summary["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * summary['accuracy']:.1f}{spread}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def _mean(values: Sequence[float], form: str) -> str:
    return "not measured" if not values else f"{sum(values) / len(values):{form}}"


def _mark(verdict: str | None) -> str:
    return verdict if verdict in ("higher", "lower") else ""


# ---- JSON ----


def _summary(reproduction: Reproduction, rows: Sequence[Row]) -> dict[str, Any]:
    plan, reference = reproduction.plan, reproduction.plan.reference
    tasks: dict[str, Any] = {}
    for row in rows:
        compared = {k: v for k, v in row.beside_backbone.items() if k not in ("with", "policy")}
        result = reproduction.results[row.task.name].results[row.arm.name]
        task = tasks.setdefault(row.task.name, {"shots": row.task.shots, "arms": {}})
        task["speed"] = {
            key: value
            for key, value in reproduction.speeds.get(row.task.name, {}).items()
            if key != "arms"
        } or None
        task["notes"] = reproduction.results[row.task.name].notes
        task["arms"][row.arm.name] = {
            "file": f"results/{result.path.name}",
            "policy": dict(result.run["policy"]),
            "summary": row.summary,
            "beside_backbone": compared,
            "speed": row.speed,
            "paper": asdict(row.paper),
            "accuracy_against_paper": row.accuracy_verdict,
        }
    return {
        **reproduction.environment,
        "machine": reproduction.machine,
        "engine_setting": reproduction.setting,
        "model": reproduction.model,
        "paper": {
            "source": SOURCE,
            "model": None if reference is None else asdict(reference),
            "is_this_model": plan.is_reference,
            "is_its_machine": is_papers_machine(reproduction),
        },
        "limit": plan.settings.limit,
        "prefill": plan.prefill,
        "what_can_be_compared": statements(reproduction),
        "left_out": reproduction.left_out,
        "tasks": tasks,
        "memory": memory_values(reproduction),
    }
