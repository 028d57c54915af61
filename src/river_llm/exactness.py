"""Lossless mode beside the backbone alone: the first token that differs, and the speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from river_llm.config import DraftConfig, Mode
from river_llm.errors import ConfigError, ContextFullError, InterruptedRunError
from river_llm.exit_policy import ExitPolicy
from river_llm.generation import GenerationResult, check_prompt
from river_llm.lossless.statistics import LosslessStatistics
from river_llm.river_lm import RiverLM
from river_llm.text.prompt import Prompt, encode_prompt


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of an answer that isn't the backbone's.

    Attributes:
        prompt: number of the prompt, from 0.
        place: number of the token in the answer, from 0.
        backbone, lossless: the two tokens; None where that answer had ended.
        top_tokens, top_logits: the backbone's two likeliest tokens there and their logits, before
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
    raw: bool = False,
    drafts: DraftConfig | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Exactness:
    """Answer every prompt by the backbone alone and in lossless mode, in turn.

    Args:
        batch_size: prompts that are answered together.
        progress: called with (prompts done, prompts in all).
        **sampling: fields of `SamplingConfig`; sampling needs a seed.

    Raises:
        ConfigError: there is no prompt, sampling has no seed, and what `generate` raises.
        ContextFullError: a prompt doesn't fit the model's context; the message has its number.
        InterruptedCheckError: Ctrl-C came; it has what was found so far.
    """
    if not prompts or batch_size < 1:
        raise ConfigError("give one prompt or more, in batches of one or more")
    if sampling.get("temperature", 0) > 0 and sampling.get("seed") is None:
        raise ConfigError("sampled answers are comparable with a seed only; give one")
    for number, prompt in enumerate(prompts, start=1):
        _check_prompt(lm, number, prompt, raw)
    policy = lm.policy
    lm.policy = ExitPolicy.never()
    tally = _Tally()
    try:
        for number, first in enumerate(range(0, len(prompts), batch_size)):
            batch = list(prompts[first : first + batch_size])
            modes: tuple[Mode, Mode] = ("river", "lossless")
            answers: dict[Mode, list[GenerationResult]] = {}
            for mode in modes if number % 2 else reversed(modes):  # neither always comes first
                of_mode = drafts if mode == "lossless" else None
                answers[mode] = lm.generate_batch(
                    batch, raw=raw, mode=mode, drafts=of_mode, **sampling
                )
            differences = []
            for i, prompt in enumerate(batch):
                pair = (answers["river"][i].tokens, answers["lossless"][i].tokens)
                if pair[0] != pair[1]:
                    differences.append(_difference(lm, first + i, prompt, raw, *pair))
            tally.note(answers["river"], answers["lossless"], differences)
            if progress:
                progress(tally.prompts, len(prompts))
    except KeyboardInterrupt:
        raise InterruptedCheckError(tally.exactness(), len(prompts)) from None
    finally:
        lm.policy = policy
    return tally.exactness()


def _check_prompt(lm: RiverLM, number: int, prompt: Prompt, raw: bool) -> None:
    try:
        check_prompt(len(encode_prompt(lm.tokenizer, prompt, raw)), lm.engine.context_length)
    except (ConfigError, ContextFullError) as error:
        raise type(error)(f"prompt {number}: {error}") from error


def _difference(
    lm: RiverLM, number: int, prompt: Prompt, raw: bool, backbone: list[int], lossless: list[int]
) -> Difference:
    pairs = zip(backbone, lossless, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(backbone), len(lossless)))
    tokens: tuple[int, ...] = ()
    logits: tuple[float, ...] = ()
    if place < len(backbone):
        text = [*encode_prompt(lm.tokenizer, prompt, raw), *backbone[:place]]
        lm.engine.truncate(0)
        top = lm.engine.prefill(torch.tensor([text])).logits[0].float().topk(2)
        tokens, logits = tuple(top.indices.tolist()), tuple(top.values.tolist())
    return Difference(
        number,
        place,
        backbone[place] if place < len(backbone) else None,
        lossless[place] if place < len(lossless) else None,
        tokens,
        logits,
    )


class _Tally:
    def __init__(self) -> None:
        self.prompts = 0
        self._differences: list[Difference] = []
        self._tokens = [0, 0]  # decoded, of the backbone and of lossless mode
        self._seconds = [0.0, 0.0]
        self._ratios: list[float] = []
        self._all_tokens = self._verifications = 0
        self._accepted = self._ngram = 0
        self._draft_seconds = self._verify_seconds = 0.0

    def note(
        self,
        backbone: Sequence[GenerationResult],
        lossless: Sequence[GenerationResult],
        differences: Sequence[Difference],
    ) -> None:
        """The answers of one batch, both ways, and where they differ."""
        self.prompts += len(backbone)
        self._differences += differences
        self._all_tokens += sum(len(result.tokens) for result in backbone)
        speeds = []
        for which, results in enumerate((backbone, lossless)):
            decoded = sum(len(result.tokens) - 1 for result in results)
            seconds = max(_decode_seconds(result) for result in results)
            self._tokens[which] += decoded
            self._seconds[which] += seconds
            speeds.append(decoded / seconds if seconds else 0.0)
        if all(speeds):
            self._ratios.append(speeds[1] / speeds[0])
        for found in _of_lossless(lossless):
            self._verifications += found.verifications
            self._accepted += found.accepted_tokens
            self._ngram += found.ngram_tokens
        last = max(_of_lossless(lossless), key=lambda found: found.verify_seconds)
        self._draft_seconds += last.draft_seconds
        self._verify_seconds += last.verify_seconds

    def exactness(self) -> Exactness:
        """Of all batches."""
        speeds = [t / s if s else 0.0 for t, s in zip(self._tokens, self._seconds, strict=True)]
        several = len(self._ratios) > 1
        decoded = max(1, self._tokens[1])
        seconds = self._draft_seconds + self._verify_seconds
        return Exactness(
            prompts=self.prompts,
            tokens=self._all_tokens,
            differences=self._differences,
            backbone_tokens_per_second=speeds[0],
            lossless_tokens_per_second=speeds[1],
            speed_up=speeds[1] / speeds[0] if speeds[0] else 0.0,
            speed_up_quartiles=tuple(
                statistics.quantiles(self._ratios, method="inclusive") if several else self._ratios
            ),
            tokens_per_verification=self._tokens[1] / max(1, self._verifications),
            draft_share=self._accepted / decoded,
            ngram_share=self._ngram / decoded,
            draft_time_share=self._draft_seconds / seconds if seconds else 0.0,
        )


def _decode_seconds(result: GenerationResult) -> float:
    speed = result.decode_tokens_per_second
    return (len(result.tokens) - 1) / speed if speed else 0.0


def _of_lossless(results: Sequence[GenerationResult]) -> Iterator[LosslessStatistics]:
    for result in results:
        if result.lossless is not None:
            yield result.lossless
