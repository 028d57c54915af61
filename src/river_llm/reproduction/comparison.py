"""Our figures beside the paper's: what can be compared, and what differs beyond its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from river_llm.evaluation.harness import compare_results
from river_llm.exit_policy import PrefillRule
from river_llm.report.arms import BACKBONE, Arm, decided_depths, mean_depth
from river_llm.reproduction.paper import (
    BITS,
    MACHINE,
    MACHINE_BANDWIDTH,
    NEAR_LOSSLESS,
    Figures,
    PaperModel,
    PaperTask,
)
from river_llm.reproduction.run import Reproduction

Verdict = Literal["higher", "lower", "within"]
_ROUNDING = 0.0005  # of the paper's accuracies, which are shares here
_PROMPTS: dict[PrefillRule, str] = {
    "sequence": "the prompt leaving as a whole",
    "backbone": "the prompt through the whole backbone",
    "river": "the prompt through the river",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one task.

    Attributes:
        task, arm: which.
        summary: of our result.
        beside_backbone: see `compare_results`.
        interval: of the accuracy, 95 %.
        depth: mean backbone layers of the tokens whose exit the policy decided.
        speed: see `measure_speed`; None where it was not measured.
        paper: its figures, for the arm that stands in its tables.
        accuracy_verdict: ours against the paper's; None where there is nothing to compare.
    """

    task: PaperTask
    arm: Arm
    summary: dict[str, Any]
    beside_backbone: dict[str, Any]
    interval: tuple[float, float]
    depth: float
    speed: dict[str, Any] | None
    paper: Figures
    accuracy_verdict: Verdict | None

    @property
    def speed_up(self) -> dict[str, float] | None:
        """Ratio to the backbone over the rounds: median, lowest, highest."""
        return None if self.speed is None else self.speed["ratios"][BACKBONE.name]


def rows_of(reproduction: Reproduction) -> list[Row]:
    """Every arm on every task, in the order of tables."""
    return [
        _row(reproduction, task, arm)
        for task in reproduction.plan.tasks
        if task.name in reproduction.results
        for arm in reproduction.plan.arms
    ]


def paper_figures(reproduction: Reproduction, task: PaperTask, arm: Arm) -> Figures:
    """What the paper's table has for an arm; River's stand beside any threshold that they may be
    of."""
    reference = reproduction.plan.reference
    if reference is None or task.name not in reference.figures:
        return Figures()
    found = reference.figures[task.name]
    if arm.kind == "backbone":
        return found.backbone
    if arm.kind == "full":
        return found.full
    threshold = arm.policy.threshold
    assert threshold is not None
    return found.river if reference.may_be_of(threshold) else Figures()


def verdict(lowest: float, highest: float, paper: float | None, rounding: float) -> Verdict | None:
    """Where ours, which lies between `lowest` and `highest`, stands against the paper's."""
    if paper is None:
        return None
    if lowest > paper + rounding:
        return "higher"
    return "lower" if highest < paper - rounding else "within"


def statements(reproduction: Reproduction) -> list[str]:
    """What can be compared with the paper and what can't, a sentence or two each."""
    plan, reference = reproduction.plan, reproduction.plan.reference
    model = plan.settings.model
    lines = []
    if reference is None:
        lines.append(f"The model is {model}, and the paper has no figures of it.")
    elif plan.is_reference:
        lines.append(
            f"The model has the shape of {reference.title}: {reference.num_layers} layers of width "
            f"{reference.hidden_size}. Whether its weights are the paper's can't be told from here."
        )
    else:
        lines.append(
            f"The model is {model} and not {reference.title}, whose figures stand beside: none of "
            "them can be compared, and no difference is marked."
        )
    if reference is not None and plan.is_reference:
        lines += [
            _about_the_machine(reproduction, reference),
            "An accuracy is marked where the paper's lies outside our 95 % interval (Wilson). No "
            "speed-up is marked: our rounds are over one text, and tell of the machine's noise "
            "alone.",
        ]
    if reference is not None:
        lines += _about_the_figures(reproduction, reference)
    limit = plan.settings.limit
    lines.append(
        f"--limit {limit}: only the first {limit} items of each task ran (of mmlu in turn of each "
        "subject); the paper's figures are of all."
        if limit is not None
        else "All items that the data holds ran."
    )
    if plan.settings.max_new_tokens is not None:
        lines.append(
            f"--max-new-tokens {plan.settings.max_new_tokens}: longer answers are cut, and may be "
            "wrong for that alone."
        )
    if reproduction.speeds:
        lines.append(
            "Speed is decoding alone, along one text behind a prompt that the backbone wrote: in "
            "River's arms too, whose accuracy is with "
            f"{_PROMPTS[plan.prefill]}. Whether the paper's speed includes the prompt is not known."
        )
    return [*lines, *_about_the_tasks(reproduction), *_about_the_river(reproduction)]


def is_papers_machine(reproduction: Reproduction) -> bool:
    """Whether the paper's speeds are of the same card."""
    return MACHINE in reproduction.machine


def _row(reproduction: Reproduction, task: PaperTask, arm: Arm) -> Row:
    found = reproduction.results[task.name]
    summary = found.summary(arm.name)
    paper = paper_figures(reproduction, task, arm)
    speed = reproduction.speeds.get(task.name)
    own = None if speed is None else speed["arms"][arm.name]
    low, high = summary["interval_95"]
    accuracy_verdict = None
    if reproduction.plan.is_reference:
        share = None if paper.accuracy is None else paper.accuracy / 100
        accuracy_verdict = verdict(low, high, share, _ROUNDING)
    return Row(
        task,
        arm,
        summary,
        compare_results(found.results[arm.name], found.results[BACKBONE.name]),
        (low, high),
        mean_depth(decided_depths(found.results[arm.name])),
        own,
        paper,
        accuracy_verdict,
    )


def _about_the_machine(reproduction: Reproduction, reference: PaperModel) -> str:
    if is_papers_machine(reproduction):
        words = (
            f"The card is the paper's, {MACHINE}; its tokens/s are still of another program, and "
            "of prompts and lengths that are not known."
        )
    else:
        words = (
            f"Speeds are of {reproduction.machine}, the paper's of one {MACHINE}: tokens/s can't "
            "be compared, at most ratios to the backbone on the same machine."
        )
    words += " Ratios depend on how fast that backbone is."
    share = reference.bandwidth_share
    if share is not None:
        words += (
            f" The paper's reaches about {100 * share:.0f} % of its card's {MACHINE_BANDWIDTH} "
            f"GB/s: its tokens/s on GSM8K times the {reference.read_gb:g} GB that a token reads in "
            "16 bits."
        )
    return words


def _about_the_figures(reproduction: Reproduction, reference: PaperModel) -> list[str]:
    lowest, highest = reference.table_thresholds
    lines = []
    if lowest < highest:
        lines.append(
            f"The paper's River figures are of a threshold between {lowest:g} and {highest:g}; "
            "which one is not known, so they stand beside each."
        )
    else:
        lines.append(
            f"The paper's River figures are taken to be of its threshold for this model, {lowest:g}"
            f"; it calls {NEAR_LOSSLESS:g} near-lossless and its figures there are not known."
        )
    for name, figures in reference.figures.items():
        if name in reproduction.results and figures.awq != Figures():
            lines.append(
                f"With exit layers by AWQ the paper has {figures.awq.accuracy} % on {name} at "
                f"{figures.awq.tokens_per_second} tokens/s; that was not run."
            )
    return lines


def _about_the_tasks(reproduction: Reproduction) -> list[str]:
    ran = reproduction.results
    lines = []
    if "gsm8k" in ran or "humaneval" in ran or "math500" in ran:
        lines.append(
            "Prompts are texts to go on from, without a chat template, and answers are greedy; the "
            "paper's prompts are not known."
        )
    if "math500" in ran:
        lines.append(
            "math500 is a part of MATH, 500 of its 5,000 problems, and its four solved examples "
            "were written for this program; the paper's are not known."
        )
    if "arc_easy" in ran or "arc_challenge" in ran:
        lines.append("ARC has two sets, and which one the paper means is not known.")
    if any(name not in ("gsm8k", "humaneval", "math500") for name in ran):
        lines.append(
            "Choices are scored by likelihood, every token leaving by its own similarity; how the "
            "paper scores them is not known."
        )
    return lines


def _about_the_river(reproduction: Reproduction) -> list[str]:
    river = reproduction.model["river"]
    rule = {
        "sequence": "as a whole, by the mean similarity of its tokens: the paper says that prompts "
        "leave so, and not how similarities are joined",
        "backbone": "through the whole backbone; the paper's leave as a whole (--prefill sequence)",
        "river": "through the river; the paper's leave as a whole (--prefill sequence)",
    }[reproduction.plan.prefill]
    return [
        f"The river has {BITS} bits in groups of {river['group_size']} ({river['quantizer']}); the "
        "paper's group size is not known.",
        f"In River's arms the prompt of a generated answer leaves {rule}."
        if reproduction.plan.prefill == "sequence"
        else f"In River's arms the prompt of a generated answer runs {rule}.",
    ]
