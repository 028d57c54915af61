"""A second look: a token after which the river is unsure runs once more, through the backbone.

The layers before its exit were the backbone's already. So to cut the token off its sequence and to
run it again gives what going on from its hidden state at the exit would, on any engine, and its
keys and values in the later layers are overwritten by exact ones.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from river_llm.engines.step import NO_TOKEN, Engine, Offloading, Step, StepResult
from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy

Again = dict[int, int]  # logit rows of a step that ran again -> the layer after which they had left


def check_second_look(engine: Engine, policy: ExitPolicy) -> None:
    """Validate that an engine can run the whole backbone, where a policy has it do so.

    Raises:
        ConfigError: a depth limit is in the way.
    """
    is_limited = isinstance(engine, Offloading) and engine.depth_limit is not None
    if policy.second_look is not None and is_limited:
        raise ConfigError("a second look runs the whole backbone; it can't go with no_miss")


def run_step(
    engine: Engine, step: Step, second_looks: Sequence[float | None], *, keep_logits: bool = True
) -> tuple[StepResult, Again]:
    """Run a step, and those of its logit rows again that left and have a small margin.

    Args:
        second_looks: of each logit row, the margin up to which it runs again; None: never. Such a
            row is the last one of its sequence in the step.
        keep_logits: the result's logits may be looked at; without, rows of the native engine that
            ran once may have none any more, unless there is no token to be chosen.

    Returns:
        What came of it, and which logit rows (0 to K - 1) ran again. Their exit layer is L.

    Raises:
        RiverError: see `Engine.forward`; the cache is as it was.
    """
    if not any(second_looks):
        return engine.forward(step), {}
    lengths = {sequence: engine.length(sequence) for sequence in step.sequences}
    first = engine.forward(replace(step, record_margins=True))
    exits, margins = first.exit_layers.tolist(), first.margins.tolist()
    again: Again = {
        place: exits[row]
        for place, row in enumerate(step.logit_rows)
        if (look := second_looks[place]) is not None
        and exits[row] < engine.num_layers
        and not margins[place] > look
    }
    if not again:
        return first, again
    try:
        if len(again) < len(margins) and (keep_logits or NO_TOKEN in first.best_tokens):
            _ = first.logits  # they are gone with the next pass
        rows = [step.logit_rows[place] for place in again]
        return _joined(first, _run_again(engine, step, rows), rows, list(again)), again
    except BaseException:
        for sequence, length in lengths.items():
            engine.truncate(sequence, length)
        raise


def run_text(engine: Engine, step: Step, second_look: float | None) -> StepResult:
    """Run rows of given text, each as decoding would take it. With a second look one token of each
    sequence at a time, since those behind it see the keys and values that it leaves.

    Args:
        step: without groups.
        second_look: of all its rows, see `ExitPolicy`.
    """
    if second_look is None:
        return engine.forward(step)
    columns: dict[int, list[int]] = defaultdict(list)
    seen = Counter[int]()
    for row, sequence in enumerate(step.sequences):
        columns[seen[sequence]].append(row)
        seen[sequence] += 1
    logits, exits = [torch.empty(0, engine.vocab_size)], []
    for rows in columns.values():
        result, _ = run_step(
            engine,
            Step(*_rows_of(step, rows), range(len(rows))),
            [second_look] * len(rows),
            keep_logits=bool(step.logit_rows),
        )
        exits.append(result.exit_layers)
        if step.logit_rows:
            logits.append(result.logits)
    order = torch.tensor([row for rows in columns.values() for row in rows]).argsort()
    wanted = order[list(step.logit_rows)]
    return StepResult(torch.cat(logits[bool(step.logit_rows) :])[wanted], torch.cat(exits)[order])


def _run_again(engine: Engine, step: Step, rows: Sequence[int]) -> StepResult:
    tokens, sequences, _ = _rows_of(step, rows)
    for sequence in sequences:
        engine.truncate(sequence, engine.length(sequence) - 1)
    never = torch.full((engine.num_layers,), math.inf)
    return engine.forward(Step(tokens, sequences, never, range(len(rows))))


def _rows_of(step: Step, rows: Sequence[int]) -> tuple[list[int], list[int], Tensor]:
    """Tokens, sequences and thresholds of some rows."""
    thresholds = step.thresholds if step.thresholds.ndim == 1 else step.thresholds[list(rows)]
    return [step.tokens[i] for i in rows], [step.sequences[i] for i in rows], thresholds


def _joined(
    first: StepResult, second: StepResult, rows: Sequence[int], places: list[int]
) -> StepResult:
    """The first result, where some rows, at these places among the logits, are the second's."""

    def logits() -> Tensor:
        if len(places) == len(best_tokens):
            return second.logits
        joined = first.logits.clone()
        joined[places] = second.logits
        return joined

    exit_layers, best_tokens = first.exit_layers.clone(), first.best_tokens.clone()
    exit_layers[list(rows)] = second.exit_layers
    best_tokens[places] = second.best_tokens
    return StepResult(logits, exit_layers, best_tokens, first.similarities)
