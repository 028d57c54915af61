"""Prompt to text: the loop over an engine's steps, stopping, streaming, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from river_llm.engines import Engine, StepResult
from river_llm.errors import ConfigError, ContextFullError
from river_llm.memory import peak_memory_bytes
from river_llm.sampling import Sampler, SamplingConfig
from river_llm.text import IncrementalDecoder

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One token of a stream, with the statistics so far; the last one's are the whole run's.

    Attributes:
        text: the text that this token makes certain; empty while a character or a possible stop
            string is incomplete. The texts of a stream joined are the answer.
        token: the token's id.
        exit_layer: how many backbone layers ran to produce it. The first token comes from the
            prompt's pass, so its exit layer is the prefill's.
        finish_reason: None until the last token, then ``"stop"`` (a stop token or stop string),
            ``"length"`` (max_new_tokens) or ``"context"`` (the model's context is full).
        prompt_tokens: tokens of the prompt, those that were in the cache already among them.
        generated_tokens: tokens so far, this one among them.
        time_to_first_token: seconds from the start to the first token.
        prompt_tokens_per_second: of the tokens that the prefill ran.
        decode_tokens_per_second: of the tokens after the first; None before the second.
        mean_exit_layer: mean of `exit_layer` over the tokens so far.
        peak_memory_bytes: the most memory that the process (on CUDA: the device) held so far.
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


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer.

    Attributes:
        text: the answer, without stop token and stop string.
        tokens: the ids of the generated tokens, the stop token among them.
        exit_layers: for each, how many backbone layers it ran.
        num_layers: how many there are.
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

    @classmethod
    def of(
        cls, engine: Engine, responses: Sequence[GenerationResponse], prompt_tokens: int
    ) -> GenerationResult:
        """Join a stream; one that was cut short is marked ``"interrupted"``."""
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
            policy=engine.policy.to_dict(),
            finish_reason=(last.finish_reason if last else None) or "interrupted",
            peak_memory_bytes=last.peak_memory_bytes if last else peak_memory_bytes(),
        )


def generate_rows(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_tokens: frozenset[int],
    cached_tokens: int = 0,
) -> Iterator[list[GenerationResponse | None]]:
    """Continue a batch of prompts, one token for each sequence at a time.

    Args:
        prompts: token ids, one list for each sequence.
        stop_tokens: ids that end a sequence.
        cached_tokens: so many tokens of a single prompt are in the engine's cache already.

    Yields:
        At every step one response for each sequence, None for those that have ended.

    Raises:
        ContextFullError: a prompt doesn't fit the model's context.
        ConfigError: there is no prompt, or one without tokens.
    """
    if not prompts or not all(prompts):
        raise ConfigError("the prompt is empty; give some text")
    longest = max(map(len, prompts))
    if engine.context_length is not None and longest > engine.context_length:
        raise ContextFullError(
            f"the prompt has {longest} tokens, the model's context holds {engine.context_length}; "
            "shorten the prompt"
        )
    rows = [_Row(list(prompt), tokenizer, sampling, i) for i, prompt in enumerate(prompts)]
    start = time.perf_counter()
    engine.truncate(cached_tokens)
    new_tokens = longest - cached_tokens
    token_ids = torch.zeros(len(rows), new_tokens, dtype=torch.long)
    padding_mask = torch.zeros(len(rows), new_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        new = row.token_ids[cached_tokens:]
        token_ids[i, new_tokens - len(new) :] = torch.tensor(new)
        padding_mask[i, new_tokens - len(new) :] = True
    step = engine.prefill(token_ids, None if bool(padding_mask.all()) else padding_mask)
    prefill_seconds = time.perf_counter() - start
    prefill_speed = float(padding_mask.sum()) / prefill_seconds

    first_token_at = 0.0
    while True:
        tokens = [row.choose(step, i) for i, row in enumerate(rows)]
        now = time.perf_counter()
        first_token_at = first_token_at or now
        is_full = engine.length == engine.context_length
        memory = peak_memory_bytes(engine.device)
        responses: list[GenerationResponse | None] = []
        for i, row in enumerate(rows):
            if row.finish_reason is not None:
                responses.append(None)
                continue
            exit_layer = int(step.exit_layers[i])
            text = row.accept(tokens[i], exit_layer, stop_tokens, is_full)
            decoded = len(row.exit_layers) - 1
            responses.append(
                GenerationResponse(
                    text=text,
                    token=tokens[i],
                    exit_layer=exit_layer,
                    finish_reason=row.finish_reason,
                    prompt_tokens=row.prompt_length,
                    generated_tokens=len(row.exit_layers),
                    time_to_first_token=first_token_at - start,
                    prompt_tokens_per_second=prefill_speed,
                    decode_tokens_per_second=decoded / (now - first_token_at) if decoded else None,
                    mean_exit_layer=sum(row.exit_layers) / len(row.exit_layers),
                    peak_memory_bytes=memory,
                )
            )
        yield responses
        if all(row.finish_reason is not None for row in rows):
            return
        step = engine.decode(torch.tensor(tokens))


class _Row:
    """One sequence of the batch while it grows."""

    def __init__(
        self,
        prompt: list[int],
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        index: int,
    ) -> None:
        self.token_ids = prompt
        self.prompt_length = len(prompt)
        self.exit_layers: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._max_new_tokens = sampling.max_new_tokens
        self._sampler = Sampler(sampling, index)
        self._takes_best = self._sampler.takes_best_token
        self._decoder = IncrementalDecoder(tokenizer, sampling.stop)

    def choose(self, step: StepResult, index: int) -> int:
        """The next token; of a sequence that has ended, any one, to keep its place."""
        if self.finish_reason is not None:
            return self.token_ids[-1]
        if self._takes_best:  # the engine knows it without handing out the logits
            return int(step.best_tokens[index])
        return self._sampler(self.token_ids, step.logits[index])

    def accept(
        self, token: int, exit_layer: int, stop_tokens: frozenset[int], is_full: bool
    ) -> str:
        """Append the token, see whether it ends the sequence, return the text that it makes."""
        self.token_ids.append(token)
        self.exit_layers.append(exit_layer)
        text = ""
        if token in stop_tokens:
            self.finish_reason = "stop"
        else:
            text = self._decoder.add(token)
            if self._decoder.stopped:
                self.finish_reason = "stop"
            elif len(self.exit_layers) >= self._max_new_tokens:
                self.finish_reason = "length"
            elif is_full:
                self.finish_reason = "context"
        if self.finish_reason is not None:
            text += self._decoder.finish()
            if self._decoder.stopped:
                self.finish_reason = "stop"
        return text
