"""A second look: a token after which the river is unsure runs once more, through the backbone, and
its keys and values are overwritten.

It takes the tokens right before it along: they read the same weights, as drafts do that are
verified, and the look is no better than the keys and values that it reads.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from river_llm.engines.step import NO_TOKEN, Engine, Offloading, Step, StepResult
from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy

SPAN = 8  # tokens that run again, the unsure one among them
Again = dict[int, int]  # logit rows of a step that ran again -> the layer after which they had left


def check_second_look(engine: Engine, policy: ExitPolicy) -> None:
    """Validate that an engine can run the whole backbone, where a policy has it do so.

    Raises:
        ConfigError: a depth limit is in the way.
    """
    is_limited = isinstance(engine, Offloading) and engine.depth_limit is not None
    if policy.second_look is not None and is_limited:
        raise ConfigError("a second look runs the whole backbone; it can't go with no_miss")


def tokens_before(engine: Engine, text: Sequence[int], end: int, first: int = 0) -> list[int]:
    """What runs again with a text's token at `end - 1`: the tokens before it from `first` on, SPAN
    with it at most; none where rotary angles would be others in one pass."""
    start = max(first, end - SPAN)
    if engine.rope_boundary is not None:
        exact = engine.rope_boundary.rows_like_single_steps(start)
        if exact is not None and exact < end - start:
            return []
    return list(text[start : end - 1])


def run_step(
    engine: Engine,
    step: Step,
    second_looks: Sequence[float | None],
    before: Sequence[Sequence[int]] = (),
    *,
    keep_logits: bool = True,
) -> tuple[StepResult, Again]:
    """Run a step, and those of its logit rows again that left and have a small margin.

    Args:
        second_looks: of each logit row, the margin up to which it runs again; None: never. Such a
            row is the last one of its sequence in the step.
        before: of each logit row, the tokens that stand before it and run again with it; empty:
            none do.
        keep_logits: the result's logits may be looked at; without, rows of the native engine that
            ran once may have none any more, unless there is no token to be chosen; they are NaN
            where that is so of a row that ran again.

    Returns:
        What came of it, and which logit rows (0 to K - 1) ran again. Their exit layer is L.

    Raises:
        RiverError: see `Engine.forward`; the cache is as it was, but for what was running again:
            that is cut off.
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
        is_kept = keep_logits or NO_TOKEN in first.best_tokens
        if is_kept and len(again) < len(margins):
            _ = first.logits  # they are gone with the next pass
        rows = [step.logit_rows[place] for place in again]
        ahead = [before[place] if before else () for place in again]
        second = _run_again(engine, step, rows, ahead)
        return _joined(first, second, rows, list(again), is_kept), again
    except BaseException:
        for sequence, length in lengths.items():
            engine.truncate(sequence, length)
        raise


def run_text(
    engine: Engine,
    step: Step,
    second_look: float | None,
    texts: Mapping[int, Sequence[int]],
    firsts: Mapping[int, int] | None = None,
) -> StepResult:
    """Run rows of given text, each as decoding would take it. With a second look one token of each
    sequence at a time, since those behind it see the keys and values that it leaves.

    Args:
        step: without groups.
        second_look: of all its rows, see `ExitPolicy`.
        texts: of each sequence, what it holds and these rows.
        firsts: of each, how many tokens are a prompt, which don't run again with others.
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
        sequences = [step.sequences[row] for row in rows]
        thresholds = step.thresholds if step.thresholds.ndim == 1 else step.thresholds[rows]
        result, _ = run_step(
            engine,
            Step([step.tokens[row] for row in rows], sequences, thresholds, range(len(rows))),
            [second_look] * len(rows),
            [
                tokens_before(engine, texts[s], engine.length(s) + 1, (firsts or {}).get(s, 0))
                for s in sequences
            ],
            keep_logits=bool(step.logit_rows),
        )
        exits.append(result.exit_layers)
        if step.logit_rows:
            logits.append(result.logits)
    order = torch.tensor([row for rows in columns.values() for row in rows]).argsort()
    wanted = order[list(step.logit_rows)]
    return StepResult(torch.cat(logits[bool(step.logit_rows) :])[wanted], torch.cat(exits)[order])


def _run_again(
    engine: Engine, step: Step, rows: Sequence[int], before: Sequence[Sequence[int]]
) -> StepResult:
    """These rows, and the tokens before them, through the backbone; the logits are the rows'."""
    tokens: list[int] = []
    sequences: list[int] = []
    ends: list[int] = []
    for row, ahead in zip(rows, before, strict=True):
        sequence, count = step.sequences[row], len(ahead) + 1
        engine.truncate(sequence, engine.length(sequence) - count)
        tokens += [*ahead, step.tokens[row]]
        sequences += [sequence] * count
        ends.append(len(tokens) - 1)
    never = torch.full((engine.num_layers,), math.inf)
    return engine.forward(Step(tokens, sequences, never, ends))


def _joined(
    first: StepResult,
    second: StepResult,
    rows: Sequence[int],
    places: list[int],
    is_kept: bool,
) -> StepResult:
    """The first result, where some rows, at these places among the logits, are the second's.
    `is_kept`: the first's logits outlast the second pass."""

    def logits() -> Tensor:
        if len(places) == len(best_tokens):
            return second.logits
        if is_kept or NO_TOKEN not in second.best_tokens:
            joined = first.logits.clone()
        else:  # somebody asks why a row has no token
            size = len(best_tokens), second.logits.shape[1]
            joined = second.logits.new_full(size, math.nan)
        joined[places] = second.logits
        return joined

    exit_layers, best_tokens = first.exit_layers.clone(), first.best_tokens.clone()
    exit_layers[list(rows)] = second.exit_layers.max()  # all layers
    best_tokens[places] = second.best_tokens
    return StepResult(logits, exit_layers, best_tokens, first.similarities)
