"""What comes of generating: a response for each token, a result for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One token of a stream, with the statistics so far; the last one's are the whole answer's.

    Attributes:
        text: the text that this token makes certain; empty while a character or a possible stop
            string is incomplete. The texts of a stream joined are the answer.
        token: the token's id.
        exit_layer: how many backbone layers ran to produce it. The first token comes from the
            prompt's step, so its exit layer is the prefill's.
        finish_reason: None until the last token, then ``"stop"`` (a stop token or stop string),
            ``"length"`` (max_new_tokens) or ``"context"`` (the model's context is full).
        prompt_tokens: tokens of the prompt, those that were in the cache already among them.
        generated_tokens: tokens so far, this one among them.
        time_to_first_token: seconds from the start to the first token.
        prompt_tokens_per_second: of the tokens of the prompt that ran, until the first token.
        decode_tokens_per_second: of the tokens after the first; None before the second.
        mean_exit_layer: mean of `exit_layer` over the tokens so far.
        peak_memory_bytes: the most memory that the process (on CUDA: the device) held so far.
        origin: in lossless mode, what guessed this token before the backbone chose it: ``"river"``,
            ``"ngram"`` (the text itself), or ``"backbone"`` if nothing did.
        lossless: in lossless mode, what drafting has brought so far; else None.
        offload: where backbone layers are offloaded, what that has cost since the answer began, of
            all that ran together; else None.
        cached_prompt_tokens: tokens of the prompt that were in the cache already.
    """

    text: str
    token: int
    exit_layer: int
    finish_reason: FinishReason | None
    prompt_tokens: int
    generated_tokens: int
    time_to_first_token: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float | None
    mean_exit_layer: float
    peak_memory_bytes: int
    origin: Origin = "backbone"
    lossless: LosslessStatistics | None = None
    offload: OffloadStatistics | None = None
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer.

    Attributes:
        text: the answer, without stop token and stop string.
        tokens: the ids of the generated tokens, the stop token among them.
        exit_layers: for each, how many backbone layers it ran.
        num_layers: how many there are.
        mode: ``"lossless"`` or ``"river"``.
        policy: when tokens left the backbone; in lossless mode they never do.
        The others are those of the stream's last `GenerationResponse`; ``finish_reason`` may also
        be ``"interrupted"``.
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    mean_exit_layer: float | None
    num_layers: int
    prompt_tokens: int
    prompt_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    time_to_first_token: float | None
    engine: str
    policy: dict[str, Any]
    finish_reason: FinishReason
    peak_memory_bytes: int
    mode: Literal["lossless", "river"]
    lossless: LosslessStatistics | None = None
    offload: OffloadStatistics | None = None
    cached_prompt_tokens: int = 0

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
        return cls(
            text="".join(response.text for response in responses),
            tokens=[response.token for response in responses],
            exit_layers=[response.exit_layer for response in responses],
            mean_exit_layer=last.mean_exit_layer if last else None,
            num_layers=engine.num_layers,
            prompt_tokens=prompt_tokens,
            prompt_tokens_per_second=last.prompt_tokens_per_second if last else None,
            decode_tokens_per_second=last.decode_tokens_per_second if last else None,
            time_to_first_token=last.time_to_first_token if last else None,
            engine=engine.name,
            policy=(policy or ExitPolicy.never()).to_dict(),
            finish_reason=(last.finish_reason if last else None) or "interrupted",
            peak_memory_bytes=last.peak_memory_bytes if last else peak_memory_bytes(),
            mode="lossless" if policy is None else "river",
            lossless=last.lossless if last else None,
            offload=last.offload if last else None,
            cached_prompt_tokens=last.cached_prompt_tokens if last else 0,
        )
