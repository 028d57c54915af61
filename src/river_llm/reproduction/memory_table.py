"""Memory of the arms beside the paper's: as blocks of the report, and as JSON."""

from __future__ import annotations

from typing import Any

from river_llm.report.arms import BACKBONE, full
from river_llm.report.document import Block, Paragraph, Table
from river_llm.report.saved import Values
from river_llm.reproduction.paper import BITS, MEMORY_CONTEXT, UNKNOWN
from river_llm.reproduction.run import Reproduction, offloaded

_GIB = 1 << 30


def memory_blocks(reproduction: Reproduction) -> list[Block]:
    """The arithmetic, and what was measured."""
    memory, reference = reproduction.memory, reproduction.plan.reference
    words = (
        f"Weights, keys and values at {memory.context:,} tokens in GiB, by arithmetic: 16 bits, "
        "each tensor once, an exit layer with scales and zeros. Offloaded: as many backbone layers "
        "stay as tokens run on average, rounded up."
    )
    if memory.context < MEMORY_CONTEXT:
        words += f" The model takes no more tokens; the paper's figures are at {MEMORY_CONTEXT:,}."
    headings, rows = ["arm", "GiB"], []
    if reference is not None:
        headings.append("paper's")
    for name, size in memory.expected.items():
        row = [name, f"{size / _GIB:.2f}"]
        if reference is not None:
            row.append(_paper(reproduction, name))
        rows.append(row)
    blocks: list[Block] = [Paragraph(words), Table(headings, rows)]
    if reference is not None and reference.memory is not None and reference.memory.reading:
        blocks.append(Paragraph(f"The paper's figures: {reference.memory.reading}"))
    if memory.measured is not None:
        blocks += _measured(reproduction, memory.measured)
    return blocks


def _measured(reproduction: Reproduction, measured: Values) -> list[Block]:
    memory, plan = reproduction.memory, reproduction.plan
    first = plan.river_arms[0].name
    depth = memory.offload_depths[first]
    return [
        Paragraph(
            f"Measured at {memory.measured_context:,} tokens, each arm in a process of its own, "
            f"the largest of {plan.rounds} rounds in GiB: resident memory while decoding; the same "
            "without Python and its libraries; what the engine should hold; the most that the "
            "process ever held, loading included."
        ),
        Table(
            ["arm", "process", "model", "expected", "peak", "tokens/s"],
            [
                [
                    name,
                    *(
                        f"{found[key] / _GIB:.2f}"
                        for key in ("steady_bytes", "held_bytes", "expected_bytes", "peak_bytes")
                    ),
                    f"{found['tokens_per_second']:.1f}",
                ]
                for name, found in measured.items()
            ],
        ),
        Paragraph(
            f"Here every token leaves after {depth} backbone layers, the mean depth of {first} "
            f"rounded up, so that no evicted layer is ever missed. Tokens of {first} itself go "
            "deeper at times; offloaded, they would wait for layers to be read back, which is not "
            "in these tokens/s."
        ),
    ]


def memory_values(reproduction: Reproduction) -> dict[str, Any]:
    """Plain JSON values; sizes in bytes."""
    memory = reproduction.memory
    return {
        "context": memory.context,
        "expected_bytes": memory.expected,
        "offload_depths": memory.offload_depths,
        "measured_context": memory.measured_context,
        "measured": memory.measured,
    }


def _paper(reproduction: Reproduction, arm: str) -> str:
    reference = reproduction.plan.reference
    figures = None if reference is None else reference.memory
    if reference is None or figures is None:
        return UNKNOWN
    known = {BACKBONE.name: figures.backbone, full(BITS).name: figures.full}
    for river in reproduction.plan.river_arms:
        if river.policy.threshold is not None and reference.may_be_of(river.policy.threshold):
            known[offloaded(river.name)] = figures.offloaded
    return f"{known[arm]:.2f}" if arm in known else UNKNOWN
