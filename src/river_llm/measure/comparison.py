"""Backbone, lossless mode, River and full quantisation side by side, along the same answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from river_llm.config import DraftConfig, SamplingConfig
from river_llm.generate.rows import decode_part, new_sequence, prefill, run_parts
from river_llm.generate.second_look import tokens_before
from river_llm.lm import RiverLM
from river_llm.measure.rounds import Progress, Spread, interleaved
from river_llm.river.policy import ExitPolicy

COMPARED = ExitPolicy.similarity(0.98)  # River's policy, where the user asked for none


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant, as `compare_variants` measured it.

    Attributes:
        policy: its exit policy, in words.
        tokens_per_second: of decoding, over the rounds.
        mean_exit_layer: mean number of backbone layers per decoded token.
        agreement: share of the answer's tokens that are this variant's argmax too.
    """

    variant: str
    policy: str
    tokens_per_second: Spread
    mean_exit_layer: float
    agreement: float


def compared_variants(lm: RiverLM) -> dict[str, ExitPolicy | None]:
    """What is compared of a model; None is lossless mode."""
    river = lm.policy or COMPARED
    return {
        "backbone": ExitPolicy.never(),
        "lossless": None,
        f"River, {river.describe()}": river,
        f"full {lm.river_config.width}-bit": ExitPolicy.always(),
    }


def compare_variants(
    lm: RiverLM,
    prompt: Sequence[int],
    answer: Sequence[int],
    variants: Mapping[str, ExitPolicy | None],
    rounds: int = 5,
    drafts: DraftConfig | None = None,
    progress: Progress | None = None,
) -> list[Compared]:
    """Let every variant decode along `answer`, in interleaved rounds.

    Those with a policy are given the same tokens, so all of them do the same number of steps at the
    same positions, and one wrong token doesn't count again in those after it. Lossless mode (None)
    gives them itself.

    Args:
        answer: the backbone's greedy answer, at least two tokens.
        drafts: of lossless mode.
    """
    passes: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for order in interleaved(list(variants.items()), rounds):
        for name, policy in order:
            if policy is None:
                passes[name].append(_answer(lm, prompt, answer, drafts))
            else:
                passes[name].append(_follow(lm, prompt, answer, policy))
            if progress:
                progress(sum(map(len, passes.values())), rounds * len(variants))
    compared = []
    for name, policy in variants.items():
        speeds, depths, agreements = zip(*passes[name], strict=True)
        words = "lossless" if policy is None else policy.describe()
        figures = Spread.of(speeds), median(depths), median(agreements)
        compared.append(Compared(name, words, *figures))
    return compared


def _answer(
    lm: RiverLM, prompt: Sequence[int], answer: Sequence[int], drafts: DraftConfig | None
) -> tuple[float, float, float]:
    """(tokens per second, mean exit layer, agreement) of lossless mode, which gives the answer."""
    sampling = SamplingConfig(max_new_tokens=len(answer))
    responses = list(lm.stream_tokens(prompt, sampling, policy=None, drafts=drafts))
    agreed = sum(r.token == token for r, token in zip(responses, answer, strict=False))
    speed = responses[-1].decode_tokens_per_second or 0.0
    return speed, lm.engine.num_layers, agreed / len(answer)


def _follow(
    lm: RiverLM, prompt: Sequence[int], answer: Sequence[int], policy: ExitPolicy
) -> tuple[float, float, float]:
    """The same of a policy, which is given the answer."""
    engine = lm.engine
    with new_sequence(engine, len(prompt)) as sequence:
        step = prefill(engine, sequence, prompt, policy)
        agreed = int(int(step.best_tokens[0]) == answer[0])
        layers = 0
        text, first = [*prompt, *answer], len(prompt)
        start = time.perf_counter()
        for end, (token, next_token) in enumerate(pairwise(answer), start=len(prompt) + 1):
            before = tokens_before(engine, text, end, first)
            part = decode_part(sequence, [token], policy, engine.num_layers, before)
            step, again = run_parts(engine, [part])
            first = end if again else first
            agreed += int(step.best_tokens[0]) == next_token
            layers += int(step.exit_layers[0])
        seconds, steps = time.perf_counter() - start, len(answer) - 1
    return steps / seconds, layers / steps, agreed / len(answer)
