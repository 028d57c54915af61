"""Backbone, lossless mode, River and full quantisation side by side, along the same answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from river_llm.config import SamplingConfig
from river_llm.exit_policy import ExitPolicy
from river_llm.generate.rows import decode, new_sequence, prefill
from river_llm.lm import RiverLM

COMPARED = ExitPolicy.similarity(0.98)  # where the user asked for no policy


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One way to run the model, as `compare_variants` measured it.

    Attributes:
        name: what the table calls it.
        policy: its exit policy, in words.
        decode_tokens_per_second: median over the rounds.
        slowest, fastest: the least and the most tokens per second of any round.
        mean_exit_layer: mean number of backbone layers per decoded token.
        agreement: share of the answer's tokens that are this variant's argmax too.
    """

    name: str
    policy: str
    decode_tokens_per_second: float
    slowest: float
    fastest: float
    mean_exit_layer: float
    agreement: float


def compare_variants(
    lm: RiverLM,
    prompt: Sequence[int],
    answer: Sequence[int],
    variants: Mapping[str, ExitPolicy | None],
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[VariantResult]:
    """Let every variant decode along `answer`, in interleaved rounds.

    Those with a policy are given the same tokens, so all of them do the same number of steps at the
    same positions, and one wrong token doesn't count again in those after it. Lossless mode (None)
    gives them itself.

    Args:
        answer: the backbone's greedy answer, at least two tokens.
        progress: called with (passes done, passes in all).
    """
    passes: dict[str, list[_Pass]] = {name: [] for name in variants}
    items = list(variants.items())
    for number in range(rounds):
        for place, (name, policy) in enumerate(items[:: -1 if number % 2 else 1], 1):
            run = _answer(lm, prompt, answer) if policy is None else None
            passes[name].append(run or _follow(lm, prompt, answer, policy))
            if progress:
                progress(number * len(variants) + place, rounds * len(variants))
    return [
        VariantResult(
            name=name,
            policy=(variants[name] or ExitPolicy.never()).describe(),
            decode_tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
            slowest=min(run.tokens_per_second for run in runs),
            fastest=max(run.tokens_per_second for run in runs),
            mean_exit_layer=runs[-1].mean_exit_layer,
            agreement=runs[-1].agreement,
        )
        for name, runs in passes.items()
    ]


@dataclass(frozen=True, slots=True)
class _Pass:
    tokens_per_second: float
    mean_exit_layer: float
    agreement: float


def _answer(lm: RiverLM, prompt: Sequence[int], answer: Sequence[int]) -> _Pass:
    """Lossless mode gives the answer."""
    sampling = SamplingConfig(max_new_tokens=len(answer))
    responses = list(lm.stream_tokens(prompt, sampling, policy=None))
    agreed = sum(r.token == token for r, token in zip(responses, answer, strict=False))
    speed = responses[-1].decode_tokens_per_second or 0.0
    return _Pass(speed, lm.engine.num_layers, agreed / len(answer))


def _follow(
    lm: RiverLM, prompt: Sequence[int], answer: Sequence[int], policy: ExitPolicy | None
) -> _Pass:
    """A policy is given the answer."""
    engine = lm.engine
    with new_sequence(engine, len(prompt)) as sequence:
        step = prefill(engine, sequence, prompt, policy)
        agreed = int(int(step.best_tokens[0]) == answer[0])
        layers = 0
        start = time.perf_counter()
        for token, next_token in pairwise(answer):
            step = decode(engine, sequence, token, policy)
            agreed += int(step.best_tokens[0]) == next_token
            layers += int(step.exit_layers[0])
        seconds = time.perf_counter() - start
    steps = len(answer) - 1
    return _Pass(steps / seconds, layers / steps, agreed / len(answer))
