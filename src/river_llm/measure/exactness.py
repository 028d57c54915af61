"""Lossless mode beside the backbone alone: the first token that differs, and the speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from river_llm.config import DraftConfig, PromptConfig, SamplingConfig
from river_llm.errors import ConfigError, ContextFullError
from river_llm.generate import GenerationResult, check_prompt
from river_llm.generate.rows import new_sequence, prefill
from river_llm.lm import RiverLM
from river_llm.river.policy import ExitPolicy
from river_llm.settings import split_settings
from river_llm.text.prompt import Prompt

_Both = tuple[list[GenerationResult], list[GenerationResult]]  # the backbone's, lossless mode's


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of an answer that isn't the backbone's.

    Attributes:
        prompt: number of the prompt, from 0.
        place: number of the token in the answer, from 0.
        backbone, lossless: the two tokens; None where that answer had ended.
        top_tokens, top_logits: the backbone's two most likely tokens there and their logits, before
            any sampling setting; empty where the backbone's answer had ended.
    """

    prompt: int
    place: int
    backbone: int | None
    lossless: int | None
    top_tokens: tuple[int, ...]
    top_logits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Exactness:
    """What a check found; speeds are of the tokens after each answer's first.

    Attributes:
        prompts: how many were answered, both ways in turn.
        tokens: of the backbone's answers.
        differences: one for each prompt whose tokens differ.
        backbone_tokens_per_second, lossless_tokens_per_second: all tokens over all time.
        speed_up: their ratio.
        speed_up_quartiles: of the ratios of single prompts or batches.
        tokens_per_verification, draft_share, ngram_share: over all answers; shares of the tokens.
        draft_time_share: of lossless mode's time, in drafting.
        interrupted: whether Ctrl-C came before all prompts were answered.
    """

    prompts: int
    tokens: int
    differences: list[Difference]
    backbone_tokens_per_second: float
    lossless_tokens_per_second: float
    speed_up: float
    speed_up_quartiles: tuple[float, ...]
    tokens_per_verification: float
    draft_share: float
    ngram_share: float
    draft_time_share: float
    interrupted: bool


def check_exactness(
    lm: RiverLM,
    prompts: Sequence[Prompt],
    *,
    drafts: DraftConfig | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Exactness:
    """Answer every prompt by the backbone alone and in lossless mode, alternating.

    Args:
        batch_size: prompts that are answered together.
        progress: called with (prompts done, prompts in all).
        **settings: as of `RiverLM.generate`; sampling needs a seed.

    Raises:
        ConfigError: there is no prompt, sampling has no seed, and what `generate` raises.
        ContextFullError: a prompt doesn't fit the model's context; the message has its number.
        KeyboardInterrupt: before the first answers.
    """
    if not prompts or batch_size < 1:
        raise ConfigError("give one prompt or more, in batches of one or more")
    form, sampling = split_settings(settings, PromptConfig, SamplingConfig)
    if sampling.temperature > 0 and sampling.seed is None:
        raise ConfigError("sampled answers are comparable with a seed only; give one")
    encoded = [_encode(lm, number, prompt, form) for number, prompt in enumerate(prompts, 1)]
    answers: list[_Both] = []
    differences: list[Difference] = []
    is_whole = False
    modes = (ExitPolicy.never(), None), (None, ExitPolicy.never())
    try:
        for first in range(0, len(prompts), batch_size):
            found = {
                policy: lm.generate_batch(
                    prompts[first : first + batch_size],
                    policy=policy,
                    drafts=drafts if policy is None else None,
                    **settings,
                )
                for policy in modes[len(answers) % 2]  # neither always comes first
            }
            both = found[ExitPolicy.never()], found[None]
            new = [  # whole before it counts: Ctrl-C may come
                _difference(lm, number, encoded[number], exact.tokens, other.tokens)
                for number, (exact, other) in enumerate(zip(*both, strict=True), first)
                if exact.tokens != other.tokens
            ]
            answers.append(both)
            differences += new
            if progress:
                progress(min(first + batch_size, len(prompts)), len(prompts))
        is_whole = True
    except KeyboardInterrupt:
        if not answers:
            raise
    return _summarise(answers, differences, not is_whole)


def _encode(lm: RiverLM, number: int, prompt: Prompt, form: PromptConfig) -> list[int]:
    try:
        token_ids = lm.encode(prompt, form)
        check_prompt(len(token_ids), lm.engine.context_length)
    except (ConfigError, ContextFullError) as error:
        raise type(error)(f"prompt {number}: {error}") from error
    return token_ids


def _difference(
    lm: RiverLM, number: int, prompt: list[int], backbone: list[int], lossless: list[int]
) -> Difference:
    pairs = zip_longest(backbone, lossless)
    place, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    if place == len(backbone):
        return Difference(number, place, *tokens, (), ())
    text = [*prompt, *backbone[:place]]
    with new_sequence(lm.engine, len(text)) as sequence:
        top = prefill(lm.engine, sequence, text, None).logits[0].float().topk(2)
    return Difference(
        number, place, *tokens, tuple(top.indices.tolist()), tuple(top.values.tolist())
    )


def _summarise(
    answers: Sequence[_Both], differences: list[Difference], interrupted: bool
) -> Exactness:
    times = [(_decoded(backbone), _decoded(lossless)) for backbone, lossless in answers]
    ratios = [_speed(*lossless) / _speed(*exact) for exact, lossless in times if exact[0]]
    backbone, lossless = (
        tuple(map(sum, zip(*one, strict=True))) for one in zip(*times, strict=True)
    )
    of_batches = [[r.lossless for r in batch if r.lossless] for _, batch in answers]
    found = [one for batch in of_batches for one in batch]
    # times are of all that ran together
    longest = [max(batch, key=lambda one: one.verify_seconds) for batch in of_batches]
    draft_seconds = sum(one.draft_seconds for one in longest)
    seconds = draft_seconds + sum(one.verify_seconds for one in longest)
    decoded = max(1, lossless[0])
    speeds = _speed(*backbone), _speed(*lossless)
    return Exactness(
        prompts=sum(len(exact) for exact, _ in answers),
        tokens=sum(len(result.tokens) for exact, _ in answers for result in exact),
        differences=differences,
        backbone_tokens_per_second=speeds[0],
        lossless_tokens_per_second=speeds[1],
        speed_up=speeds[1] / speeds[0] if speeds[0] else 0.0,
        speed_up_quartiles=tuple(
            statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios
        ),
        tokens_per_verification=lossless[0] / max(1, sum(one.verifications for one in found)),
        draft_share=sum(one.accepted_tokens for one in found) / decoded,
        ngram_share=sum(one.ngram_tokens for one in found) / decoded,
        draft_time_share=draft_seconds / seconds if seconds else 0.0,
        interrupted=interrupted,
    )


def _decoded(batch: Sequence[GenerationResult]) -> tuple[int, float]:
    """Tokens after the first of answers that ran together, and the seconds that they took."""
    counts = [(len(result.tokens) - 1, result.decode_tokens_per_second) for result in batch]
    seconds = max((count / speed for count, speed in counts if speed), default=0.0)
    return sum(count for count, _ in counts), seconds


def _speed(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0
