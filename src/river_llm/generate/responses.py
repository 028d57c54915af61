"""What comes of generating: a response for each token, a result for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from river_llm.engines.step import Engine
from river_llm.generate.events import Origin
from river_llm.generate.request import FinishReason
from river_llm.memory import peak_memory_bytes
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import OffloadStatistics


@dataclass(frozen=True, slots=True)
class LosslessStatistics:
    """What drafting and verifying have brought an answer, for its tokens after the first, which the
    prompt's step gives.

    Attributes:
        verifications: steps of the backbone.
        tokens_per_verification: new tokens that each gave, 1 at least; None before the first.
        drafted_tokens: tokens that were guessed.
        accepted_tokens: of these, those that were the backbone's own.
        ngram_tokens: accepted tokens that came from the text itself and not from the river.
        draft_share: accepted tokens among all; None before the first verification.
        acceptance_by_position: of the drafts that had a first, second, ... token, how many were
            accepted that far.
        draft_seconds, verify_seconds: time in drafting, and in verifying and choosing; of all
            requests that were in these steps.
    """

    verifications: int
    tokens_per_verification: float | None
    drafted_tokens: int
    accepted_tokens: int
    ngram_tokens: int
    draft_share: float | None
    acceptance_by_position: tuple[float, ...]
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStatistics:
    """What an answer has taken so far; None: it isn't known yet.

    Attributes:
        prompt_tokens: tokens of the prompt, those that were in the cache already among them.
        cached_prompt_tokens: of these, those that were.
        time_to_first_token: seconds from the start to the first token.
        prompt_tokens_per_second: of the tokens of the prompt that ran, until the first token.
        decode_tokens_per_second: of the tokens after the first.
        mean_exit_layer: how many backbone layers ran for a token, on the mean; all of them where
            there was a second look.
        second_looks: how many tokens came of a second look; None where the policy has none.
        peak_memory_bytes: the most memory that the process (on CUDA: the device) held so far.
        lossless: in lossless mode, what drafting has brought; else None.
        offload: where backbone layers are offloaded, what that has cost since the answer began, of
            all that ran together; else None.
    """

    prompt_tokens: int
    cached_prompt_tokens: int = 0
    time_to_first_token: float | None = None
    prompt_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    mean_exit_layer: float | None = None
    second_looks: int | None = None
    peak_memory_bytes: int
    lossless: LosslessStatistics | None = None
    offload: OffloadStatistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResponse(AnswerStatistics):
    """One token of a stream, with the statistics so far; the last one's are the whole answer's.

    Attributes:
        text: the text that this token makes certain; empty while a character or a possible stop
            string is incomplete. The texts of a stream joined are the answer.
        token: the token's id.
        exit_layer: how many backbone layers ran to produce it. The first token comes from the
            prompt's step, so its exit layer is the prefill's.
        finish_reason: None until the last token, then ``"stop"`` (a stop token or stop string),
            ``"length"`` (max_new_tokens) or ``"context"`` (the model's context is full).
        generated_tokens: tokens so far, this one among them.
        origin: in lossless mode, what guessed this token before the backbone chose it: ``"river"``,
            ``"ngram"`` (the text itself), or ``"backbone"`` if nothing did.
    """

    text: str
    token: int
    exit_layer: int
    finish_reason: FinishReason | None
    generated_tokens: int
    origin: Origin = "backbone"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult(AnswerStatistics):
    """A whole answer.

    Attributes:
        text: the answer, without stop token and stop string.
        tokens: the ids of the generated tokens, the stop token among them.
        exit_layers: for each, how many backbone layers it ran.
        num_layers: how many there are.
        engine: its name.
        mode: ``"lossless"`` or ``"river"``.
        policy: when tokens left the backbone; in lossless mode they never do.
        finish_reason: as of the last `GenerationResponse`, or ``"interrupted"``.
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    num_layers: int
    engine: str
    mode: Literal["lossless", "river"]
    policy: dict[str, Any]
    finish_reason: FinishReason

    @classmethod
    def of(
        cls,
        engine: Engine,
        responses: Sequence[GenerationResponse],
        prompt_tokens: int,
        policy: ExitPolicy | None,
    ) -> GenerationResult:
        """Join a stream; one that was cut short is marked ``"interrupted"``.

        Args:
            policy: by which its tokens left the backbone; None: lossless mode.
        """
        last = responses[-1] if responses else None
        statistics: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if last is not None:
            statistics = {one.name: getattr(last, one.name) for one in fields(AnswerStatistics)}
        return cls(
            text="".join(response.text for response in responses),
            tokens=[response.token for response in responses],
            exit_layers=[response.exit_layer for response in responses],
            num_layers=engine.num_layers,
            engine=engine.name,
            mode="lossless" if policy is None else "river",
            policy=(policy or ExitPolicy.never()).to_dict(),
            finish_reason=(last and last.finish_reason) or "interrupted",
            **statistics,
        )
