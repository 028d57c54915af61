"""Lossless mode beside the backbone alone: the first token that differs, and the speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from river_llm.config import DraftConfig, PromptConfig, SamplingConfig
from river_llm.errors import ConfigError, ContextFullError, InterruptedRunError
from river_llm.generate import GenerationResult, check_prompt
from river_llm.generate.rows import new_sequence, prefill
from river_llm.lm import RiverLM
from river_llm.river.policy import ExitPolicy
from river_llm.settings import split_settings
from river_llm.text.prompt import Prompt


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


class InterruptedCheckError(InterruptedRunError):
    """Ctrl-C came before all prompts were answered.

    Attributes:
        found: of those that were.
    """

    def __init__(self, found: Exactness, prompts: int) -> None:
        super().__init__(f"interrupted after {found.prompts} of {prompts} prompts")
        self.found = found


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
        InterruptedCheckError: Ctrl-C came; it has what was found so far.
    """
    if not prompts or batch_size < 1:
        raise ConfigError("give one prompt or more, in batches of one or more")
    form, sampling = split_settings(settings, PromptConfig, SamplingConfig)
    if sampling.temperature > 0 and sampling.seed is None:
        raise ConfigError("sampled answers are comparable with a seed only; give one")
    encoded = [_encode(lm, number, prompt, form) for number, prompt in enumerate(prompts, 1)]
    pairs: list[_Pair] = []

    def answer(batch: Sequence[Prompt], policy: ExitPolicy | None) -> list[GenerationResult]:
        of_mode = drafts if policy is None else None
        return lm.generate_batch(batch, policy=policy, drafts=of_mode, **settings)

    try:
        for number, first in enumerate(range(0, len(prompts), batch_size)):
            batch = prompts[first : first + batch_size]
            if number % 2:  # neither always comes first
                backbone = answer(batch, ExitPolicy.never())
                lossless = answer(batch, None)
            else:
                lossless = answer(batch, None)
                backbone = answer(batch, ExitPolicy.never())
            pair = _Pair(backbone, lossless)
            for i, (exact, other) in enumerate(zip(backbone, lossless, strict=True)):
                if exact.tokens != other.tokens:
                    text = encoded[first + i]
                    pair.differences.append(
                        _difference(lm, first + i, text, exact.tokens, other.tokens)
                    )
            pairs.append(pair)
            if progress:
                progress(min(first + batch_size, len(prompts)), len(prompts))
    except KeyboardInterrupt:
        raise InterruptedCheckError(_exactness(pairs), len(prompts)) from None
    return _exactness(pairs)


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
    places = zip(backbone, lossless, strict=False)
    shorter = min(len(backbone), len(lossless))
    place = next((i for i, (a, b) in enumerate(places) if a != b), shorter)
    tokens: tuple[int, ...] = ()
    logits: tuple[float, ...] = ()
    if place < len(backbone):
        text = [*prompt, *backbone[:place]]
        with new_sequence(lm.engine, len(text)) as sequence:
            top = prefill(lm.engine, sequence, text, None).logits[0].float().topk(2)
        tokens, logits = tuple(top.indices.tolist()), tuple(top.values.tolist())
    return Difference(
        number,
        place,
        backbone[place] if place < len(backbone) else None,
        lossless[place] if place < len(lossless) else None,
        tokens,
        logits,
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """The answers of one batch, both ways, and where they differ."""

    backbone: list[GenerationResult]
    lossless: list[GenerationResult]
    differences: list[Difference] = field(default_factory=list)


def _exactness(pairs: Sequence[_Pair]) -> Exactness:
    """Of all batches."""
    backbone, lossless = _Speed(), _Speed()
    ratios = []
    for pair in pairs:
        speeds = backbone.add(pair.backbone), lossless.add(pair.lossless)
        if all(speeds):
            ratios.append(speeds[1] / speeds[0])
    found = [result.lossless for pair in pairs for result in pair.lossless if result.lossless]
    # times are of all that ran together
    longest = [
        max((r.lossless for r in pair.lossless if r.lossless), key=lambda one: one.verify_seconds)
        for pair in pairs
    ]
    draft_seconds = sum(one.draft_seconds for one in longest)
    seconds = draft_seconds + sum(one.verify_seconds for one in longest)
    decoded = max(1, lossless.tokens)
    quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios
    return Exactness(
        prompts=sum(len(pair.backbone) for pair in pairs),
        tokens=sum(len(result.tokens) for pair in pairs for result in pair.backbone),
        differences=[difference for pair in pairs for difference in pair.differences],
        backbone_tokens_per_second=backbone.tokens_per_second,
        lossless_tokens_per_second=lossless.tokens_per_second,
        speed_up=lossless.tokens_per_second / backbone.tokens_per_second
        if backbone.tokens_per_second
        else 0.0,
        speed_up_quartiles=tuple(quartiles),
        tokens_per_verification=lossless.tokens / max(1, sum(one.verifications for one in found)),
        draft_share=sum(one.accepted_tokens for one in found) / decoded,
        ngram_share=sum(one.ngram_tokens for one in found) / decoded,
        draft_time_share=draft_seconds / seconds if seconds else 0.0,
    )


@dataclass(slots=True)
class _Speed:
    """Decoded tokens, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, batch: Sequence[GenerationResult]) -> float:
        """Answers that ran together; their tokens per second."""
        tokens = sum(len(result.tokens) - 1 for result in batch)
        speeds = [(len(result.tokens) - 1, result.decode_tokens_per_second) for result in batch]
        seconds = max((count / speed for count, speed in speeds if speed), default=0.0)
        self.tokens += tokens
        self.seconds += seconds
        return tokens / seconds if seconds else 0.0
