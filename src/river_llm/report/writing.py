"""Writes a comparison: report.md, report.json, report.html and the figures, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from river_llm.report import figures
from river_llm.report.arms import BACKBONE, similarity, strategy_name
from river_llm.report.compare import Comparison
from river_llm.report.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from river_llm.report.findings import (
    Contest,
    Measure,
    correlation_sentence,
    format_difference,
    frontier,
    frontier_sentence,
    rule_sentence,
    same_speed_sentence,
)
from river_llm.report.points import ON_TORCH, panels, quality_points, speed_names
from river_llm.report.quality import TaskResults
from river_llm.report.saved import make_folder, write_whole

_FIGURES = Path("figures")
_FULL_8 = "full-8bit"


def write_report(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write all files.

    Returns:
        what report.json holds.

    Raises:
        RiverError: a file can't be written.
    """
    pictures = _draw(comparison, folder)
    sentences = find(comparison)
    summary = _summary(comparison, sentences, pictures)
    blocks = _blocks(comparison, sentences, pictures)
    write_whole(folder / "report.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    write_whole(folder / "report.md", to_markdown(blocks))
    write_whole(folder / "report.html", to_html(blocks, folder))
    return summary


def find(comparison: Comparison) -> list[str]:
    """The findings, a sentence each."""
    sentences = []
    speed = comparison.speed
    if speed is not None:
        for measure, points in quality_points(comparison):
            sentences.append(frontier_sentence(points, measure))
        for measure, points in quality_points(comparison, with_strategies=True):
            sentences.append(frontier_sentence(points, measure, ON_TORCH))
    by_question: dict[tuple[str, Measure], list[Contest]] = {}
    for contest in comparison.contests:
        by_question.setdefault((contest.question, contest.measure), []).append(contest)
    for (question, _), rows in by_question.items():
        if question == _FULL_8 and speed is not None:
            ratios = {row.arm: speed["arms"][row.arm]["ratios"][_FULL_8]["median"] for row in rows}
            sentences.append(same_speed_sentence(rows, ratios, question))
        else:
            sentences.append(rule_sentence(rows))
    return [*sentences, correlation_sentence(comparison.reading)]


# ---- figures ----


def _draw(comparison: Comparison, folder: Path) -> dict[str, Picture]:
    """Draw every figure; by name."""
    make_folder(folder / _FIGURES)
    command, own = comparison.environment["command"], comparison.parts
    of_layers = own["layers"]["command"]
    num_layers = comparison.model["num_layers"]
    reading, plan = comparison.reading, comparison.plan
    shown = similarity(plan.shown_threshold).name
    pictures: dict[str, Picture] = {}

    def place(name: str, caption: str) -> Path:
        pictures[name] = Picture(_FIGURES / f"{name}.png", caption)
        return folder / pictures[name].path

    without_speed = "" if comparison.speed else (" No speed was measured: the backbone layers that "
                     "are spared take its place, as if quantised ones cost nothing.")  # fmt: skip
    path = place("frontier", "Quality against speed. The dotted line joins the arms that no other "
                 f"arm beats in both.{without_speed}")  # fmt: skip
    figures.draw_frontier(*panels(comparison), command, path)
    if plan.strategies and comparison.speed is not None:
        path = place("strategies", _strategies_caption(comparison))
        figures.draw_frontier(*panels(comparison, with_strategies=True), command, path)
    path = place("exit_depths", f"Exit depth of the tokens of {comparison.text}.")
    figures.draw_exit_depths(reading["exits"], num_layers, of_layers, path)
    path = place("exit_positions", f"Exit depth by position in a window of {comparison.text}.")
    figures.draw_exit_positions(reading["exits"][shown], shown, num_layers, of_layers, path)
    path = place("similarity", "State transition similarity of each layer, all tokens in the "
                 "backbone.")  # fmt: skip
    figures.draw_similarity(reading, plan.thresholds, of_layers, path)
    path = place("cosines", "Keys and values that the river alone writes against the backbone's.")
    figures.draw_cosines(reading, of_layers, path)
    path = place("correlation", "Early similarity of a token against how near the river's values "
                 "in the last layer come to the backbone's.")  # fmt: skip
    figures.draw_correlation(reading, of_layers, path)
    if comparison.speed is not None:
        path = place("token_times", "Time of a token as the sequence grows: the median of each "
                     "stretch.")  # fmt: skip
        figures.draw_token_times(
            _token_times(comparison, False), "seconds_per_token", own["speed"]["command"], path
        )
    if comparison.speed is not None and plan.strategies:
        path = place("strategy_times", "Time of a token by strategy as the sequence grows, all on "
                     "the torch engine: the mean of each stretch, so that a token which computes "
                     "the missing entries of others counts in full.")  # fmt: skip
        figures.draw_token_times(
            _token_times(comparison, True),
            "mean_seconds_per_token",
            own["speed"]["command"],
            path,
        )
    return pictures


def _strategies_caption(comparison: Comparison) -> str:
    caption = "The other strategies beside backbone and river."
    engine = comparison.model["engine"]
    if engine == "torch":
        return f"{caption} All were timed on the torch engine."
    return (
        f"{caption} All were timed on the torch engine; the quality of backbone and river is that "
        f"of the {engine} engine, which differs by rounding."
    )


def _token_times(comparison: Comparison, with_strategies: bool) -> dict[str, Any]:
    """The arms whose time by position is drawn: one for each way to run."""
    assert comparison.speed is not None
    threshold = comparison.plan.shown_threshold
    shown = {similarity(threshold).name}
    shown |= {strategy_name(strategy, threshold) for strategy in comparison.plan.strategies}
    return {
        timed: comparison.speed["arms"][timed]
        for name, timed in speed_names(comparison, with_strategies).items()
        if comparison.arms[name].kind in ("backbone", "full") or name in shown
    }


# ---- JSON ----


def _summary(
    comparison: Comparison, sentences: Sequence[str], pictures: dict[str, Picture]
) -> dict[str, Any]:
    plan = comparison.plan
    frontiers = {}
    if comparison.speed is not None:
        frontiers = {
            measure: [point.arm for point in frontier(points)]
            for measure, points in quality_points(comparison)
        }
    return {
        **comparison.environment,
        "seed": plan.seed,
        "model": comparison.model,
        "text": comparison.text,
        "findings": list(sentences),
        "arms": {
            name: {
                "kind": arm.kind,
                "policy": arm.policy.to_dict(),
                "bits": arm.variant.bits,
                "strategy": arm.variant.strategy,
            }
            for name, arm in comparison.arms.items()
        },
        "tasks": {task.task: _task_summary(comparison, task) for task in comparison.tasks},
        "frontier": frontiers,
        "arms_on_torch": comparison.torch_names,
        "contests": [contest.to_dict() for contest in comparison.contests],
        "speed": comparison.speed,
        "layers": comparison.reading,
        "measured_by": comparison.parts,
        "figures": {name: picture.path.as_posix() for name, picture in pictures.items()},
    }


def _task_summary(comparison: Comparison, task: TaskResults) -> dict[str, Any]:
    arms = {}
    for name, result in task.results.items():
        compared = comparison.agreement(task, name)
        if compared is not None:
            compared = {k: v for k, v in compared.items() if k not in ("with", "policy")}
        arms[name] = {
            "file": f"results/{result.path.name}",
            "policy": dict(result.run["policy"]),
            "summary": task.summary(name),
            "beside_backbone": compared,
        }
    return {
        "arms": arms,
        "fixed_arm_of_the_same_depth": task.same_depth,
        "random_arm_of_the_same_mean": task.same_mean,
        "notes": task.notes,
    }


# ---- Markdown and HTML ----


def _blocks(
    comparison: Comparison, sentences: Sequence[str], pictures: dict[str, Picture]
) -> list[Block]:
    model = comparison.model["model"]
    blocks: list[Block] = [
        Heading(f"River-LLM: the arms on {model}", 1),
        Heading("Findings"),
        Bullets(sentences),
        Paragraph(
            "Better and worse are told where p, corrected for the number of thresholds (Holm), is "
            "0.05 or less; accuracies by McNemar's exact test over the items of all tasks, "
            "divergences by a sign-flip test over the windows of the text."
        ),
        pictures["frontier"],
        Heading("How it was measured"),
        Code(comparison.environment["command"]),
        Table(["what", "value"], _circumstances(comparison)),
        Heading("Arms"),
        Bullets(_arm_lines(comparison)),
    ]
    if comparison.speed is not None:
        blocks += [Heading("Speed"), *_speed_blocks(comparison), pictures["token_times"]]
    if "strategies" in pictures:
        blocks += [Heading("The other strategies"), *_strategy_blocks(comparison, pictures)]
    for task in comparison.tasks:
        blocks += [Heading(_task_title(comparison, task)), _task_table(comparison, task)]
        blocks += [Paragraph(note) for note in task.notes]
    blocks += [
        Heading("The rule against the others"),
        Paragraph(
            "The difference is positive where the similarity arm is better: points of accuracy "
            "over all tasks, or nats of divergence from the backbone."
        ),
        _contest_table(comparison.contests),
        Heading("Where tokens leave"),
        pictures["exit_depths"],
        pictures["exit_positions"],
        Heading("What the layers do"),
        pictures["similarity"],
        pictures["cosines"],
        pictures["correlation"],
    ]
    return blocks


def _circumstances(comparison: Comparison) -> list[list[str]]:
    model, environment = comparison.model, comparison.environment
    river = model["river"]
    engines = sorted(
        {str(one["setting"]) for one in (comparison.speed or {"arms": {}})["arms"].values()}
    )
    return [
        ["model", f"{model['model']}, {model['num_layers']} layers"],
        ["weights", model["weights"]],
        ["river", f"{river['bits']} bits, groups of {river['group_size']}, {river['quantizer']}"],
        ["engine", "; ".join(engines) or model["engine"]],
        ["processor", f"{environment['processor']}, {environment['cores']} cores"],
        ["versions", ", ".join(f"{k} {v}" for k, v in environment["versions"].items())],
        ["date", environment["date"]],
        *(
            [f"{name} measured", _told(comparison.parts[name])]
            for name in ("speed", "layers")
            if name in comparison.parts
        ),
        ["seed", str(comparison.plan.seed)],
        ["text", comparison.text],
    ]


def _told(part: Mapping[str, Any]) -> str:
    """When and where something was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return (
        f"{part['date']} by {part['command']}; {part['processor']}, {part['cores']} cores; "
        f"{versions}"
    )


def _arm_lines(comparison: Comparison) -> list[str]:
    lines = {
        "backbone": "backbone: the model itself, no exit.",
        "full": "full-Nbit: every layer quantised to N bits, no exit.",
        "fixed": "exit-N: every token leaves after N backbone layers. For each similarity arm and "
        "task the nearest whole number to its mean depth is among them.",
        "similarity": "similarity-T: a token leaves after the first layer whose similarity exceeds "
        "T.",
        "random": "random-T: each token leaves at a depth drawn from those of similarity-T on the "
        "same task, for speed on all tasks. Tokens of a question draw too, though only those that "
        "count are in the histogram.",
        "strategy": "STRATEGY-T, STRATEGY-exit-N: the same exits with another strategy for the "
        "skipped layers' keys and values, on the torch engine.",
    }
    kinds = dict.fromkeys(arm.kind for arm in comparison.arms.values())
    return [lines[kind] for kind in kinds]


def _speed_blocks(comparison: Comparison) -> list[Block]:
    assert comparison.speed is not None
    speed = comparison.speed
    names = speed_names(comparison, with_strategies=False).values()
    return [
        Paragraph(
            f"Each arm decodes the same {speed['tokens']} tokens of {comparison.text} after "
            f"{speed['context']} that the backbone wrote, in turn, {speed['rounds']} rounds after "
            "one that warms up: medians, and the ratios round by round. The bandwidth is the "
            "memory's beside the rounds."
        ),
        _speed_table(comparison, list(names), [BACKBONE.name, *comparison.full_arms]),
    ]


def _strategy_blocks(comparison: Comparison, pictures: dict[str, Picture]) -> list[Block]:
    """The strategies and what they are held against, in speed on one engine."""
    names = list(speed_names(comparison, with_strategies=True).values())
    on_torch = comparison.torch_names
    measures = [on_torch[name] for name in (BACKBONE.name, *comparison.full_arms)
                if name in on_torch]  # fmt: skip
    return [
        Paragraph(
            "They run on the torch engine alone, so backbone and river were timed there too, in "
            "the same rounds."
        ),
        _speed_table(comparison, names, measures),
        pictures["strategies"],
        pictures["strategy_times"],
    ]


def _speed_table(comparison: Comparison, names: Sequence[str], measures: Sequence[str]) -> Table:
    """Arms by the names under which they were timed.

    Args:
        measures: the arms that they are held against.
    """
    assert comparison.speed is not None
    rows = []
    for name in names:
        found = comparison.speed["arms"][name]
        spread = found["tokens_per_second"]
        rows.append(
            [
                name,
                found["engine"],
                f"{spread['median']:.1f}",
                f"{spread['lowest']:.1f} to {spread['highest']:.1f}",
                *(f"{found['ratios'][other]['median']:.2f}" for other in measures),
                f"{found['mean_exit_layer']:.1f}",
                f"{found['bandwidth']['median'] / 1e9:.1f}",
            ]
        )
    times = [f"times {other}" for other in measures]
    headings = ["arm", "engine", "tokens/s", "lowest to highest", *times, "depth", "GB/s"]
    return Table(headings, rows)


def _task_title(comparison: Comparison, task: TaskResults) -> str:
    found = task.summary(BACKBONE.name)
    if task.task == "kld":
        return f"Divergence from the backbone on {comparison.text}"
    return f"{task.task}: {found['items']} items"


def _task_table(comparison: Comparison, task: TaskResults) -> Table:
    rows = []
    order = [name for name in comparison.arms if name in task.results]
    if "mean_kld" in task.summary(BACKBONE.name):
        for name in order:
            found = task.summary(name)
            rows.append(
                [
                    name,
                    f"{found['perplexity']:.2f}",
                    _with_error(found["mean_kld"], found["mean_kld_error"], 4),
                    f"{100 * found['same_top']:.1f} %",
                    f"{found['mean_exit_layer']:.1f}",
                ]
            )
        return Table(["arm", "perplexity", "mean KLD", "same top token", "depth"], rows)
    for name in order:
        found, compared = task.summary(name), comparison.agreement(task, name)
        assert compared is not None
        error = found["standard_error"]
        rows.append(
            [
                name,
                f"{_with_error(100 * found['accuracy'], error and 100 * error, 1)} %",
                f"{100 * compared['agreement']:.1f} %",
                f"{compared['mcnemar_p']:.2g}",
                f"{found['mean_exit_layer']:.2f}",
            ]
        )
    headings = ["arm", "accuracy", "agrees with the backbone", "p against the backbone", "depth"]
    return Table(headings, rows)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _contest_table(contests: Sequence[Contest]) -> Table:
    rows = [
        [
            contest.arm,
            f"{contest.question} ({contest.against})"
            if contest.question == "fixed depth"
            else contest.question,
            f"{contest.depth:.2f}",
            f"{contest.other_depth:.2f}",
            format_difference(contest),
            f"{contest.p:.2g}",
            f"{contest.p_adjusted:.2g}",
            contest.verdict,
        ]
        for contest in contests
    ]
    headings = ["arm", "against", "depth", "its depth", "difference", "p", "p (Holm)", "verdict"]
    return Table(headings, rows)
