"""Prompt to text: the loop over an engine's steps, stopping, streaming, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from river_llm.answer import Answer, FinishReason, ended_may_leave
from river_llm.config import Mode, SamplingConfig
from river_llm.engines import Engine, StepResult
from river_llm.engines.engine import NO_TOKEN
from river_llm.errors import ConfigError, ContextFullError, LogitsError
from river_llm.exit_policy import ExitPolicy
from river_llm.lossless import LosslessDecoder, LosslessStatistics, Origin
from river_llm.memory import peak_memory_bytes
from river_llm.residency import OffloadStatistics, ResidencyPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        origin: in lossless mode, what guessed this token before the backbone chose it: ``"river"``,
            ``"ngram"`` (the text itself), or ``"backbone"`` if nothing did.
        lossless: in lossless mode, what drafting has brought so far; else None.
        offload: where backbone layers are offloaded, what that has cost this answer so far, or the
            batch that it is one of; else None.
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
        mode: ``"river"`` or ``"lossless"``.
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
    mode: Mode = "river"
    lossless: LosslessStatistics | None = None
    offload: OffloadStatistics | None = None
    cached_prompt_tokens: int = 0

    @classmethod
    def of(
        cls,
        engine: Engine,
        responses: Sequence[GenerationResponse],
        prompt_tokens: int,
        mode: Mode = "river",
    ) -> GenerationResult:
        """Join a stream; one that was cut short is marked ``"interrupted"``."""
        last = responses[-1] if responses else None
        policy = ExitPolicy.never() if mode == "lossless" else engine.policy
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
            policy=policy.to_dict(),
            finish_reason=(last.finish_reason if last else None) or "interrupted",
            peak_memory_bytes=last.peak_memory_bytes if last else peak_memory_bytes(),
            mode=mode,
            lossless=last.lossless if last else None,
            offload=last.offload if last else None,
            cached_prompt_tokens=last.cached_prompt_tokens if last else 0,
        )


def check_prompt(length: int, context_length: int | None) -> None:
    """See that a prompt of so many tokens fits the model's context; None: there is no limit.

    Raises:
        ContextFullError: it doesn't.
    """
    if context_length is not None and length > context_length:
        raise ContextFullError(
            f"the prompt has {length} tokens, the model's context holds {context_length}; "
            "shorten the prompt"
        )


def generate_rows(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_tokens: frozenset[int],
    cached_tokens: int = 0,
    lossless: LosslessDecoder | None = None,
    residency: ResidencyPlan | None = None,
) -> Iterator[list[GenerationResponse | None]]:
    """Continue a batch of prompts, one token for each sequence at a time.

    Args:
        prompts: token ids, one list for each sequence.
        stop_tokens: ids that end a sequence.
        cached_tokens: so many tokens of a single prompt are in the engine's cache already.
        lossless: drafts and verifies; the engine's exit policy doesn't count then. None: tokens
            leave by the policy.
        residency: which backbone layers stay in memory, and learns from the tokens; None: all do.

    Yields:
        At every step one response for each sequence, None for those that have ended or that wait
        for the others' round.

    Raises:
        ContextFullError: a prompt doesn't fit the model's context.
        ConfigError: there is no prompt, or one without tokens.
        LogitsError: an answer's next token can't be chosen; the engine's cache is empty then.
    """
    rows = _generate_rows(
        engine, tokenizer, prompts, sampling, stop_tokens, cached_tokens, lossless, residency
    )
    try:
        yield from rows
    except LogitsError:
        engine.truncate(0)  # its keys and values may be no numbers either
        raise


def _generate_rows(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_tokens: frozenset[int],
    cached_tokens: int,
    lossless: LosslessDecoder | None,
    residency: ResidencyPlan | None,
) -> Iterator[list[GenerationResponse | None]]:
    if not prompts or not all(prompts):
        raise ConfigError("the prompt is empty; give some text")
    longest = max(map(len, prompts))
    check_prompt(longest, engine.context_length)
    # all end where the longest one fills the context
    room = None if engine.context_length is None else engine.context_length - longest + 1
    names = [f"prompt {i} of {len(prompts)}: " for i in range(1, len(prompts) + 1)]
    if len(prompts) == 1:
        names = [""]
    answers = [
        Answer(list(prompt), tokenizer, sampling, i, room, name)
        for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    start = time.perf_counter()
    offloaded_before = engine.offload_statistics
    step, prompt_tokens = _prefill(engine, answers, cached_tokens, lossless is not None)
    plain = _PlainSteps(engine, answers)
    new_tokens = plain.choose(step)
    measures = _Measures(start, time.perf_counter(), prompt_tokens, cached_tokens)
    if lossless is not None:
        lossless.begin(answers, stop_tokens)
    memory = peak_memory_bytes(engine.device)
    while True:
        now = time.perf_counter()
        drafting: Sequence[LosslessStatistics | None] = [None] * len(answers)
        if lossless is not None:
            drafting = lossless.statistics()
        offload = engine.offload_statistics.since(offloaded_before) if residency else None
        for place in range(max(map(len, new_tokens))):
            responses: list[GenerationResponse | None] = [None] * len(answers)
            for i, (answer, chosen) in enumerate(zip(answers, new_tokens, strict=True)):
                had_ended = answer.has_ended
                if had_ended or place >= len(chosen):
                    continue
                new = chosen[place]
                text = answer.take(new.token, new.exit_layer, stop_tokens)
                if answer.has_ended:
                    memory = peak_memory_bytes(engine.device)
                    if lossless is not None:
                        lossless.drop(i, len(chosen) - 1 - place)
                        drafting = lossless.statistics()
                responses[i] = measures.response(
                    answer, new, text, now, memory, drafting[i], offload
                )
            yield responses
            if all(answer.has_ended for answer in answers):
                return
        new_tokens = plain.round() if lossless is None else _verified(engine, lossless)
        if residency is not None and residency.note(
            new.exit_layer for chosen in new_tokens for new in chosen
        ):
            engine.keep_layers(residency.resident)


@dataclass(frozen=True, slots=True)
class _Chosen:
    token: int
    exit_layer: int
    origin: Origin = "backbone"


class _PlainSteps:
    """Rounds of one token for each answer, which leaves the backbone by the policy."""

    def __init__(self, engine: Engine, answers: Sequence[Answer]) -> None:
        self._engine = engine
        self._answers = answers
        self._rows = list(range(len(answers)))  # of the engine's batch: whose they are

    def round(self) -> list[list[_Chosen]]:
        """The next token of each answer; those that have ended leave the engine's batch if they
        may, else they run along."""
        answers, rows = self._answers, self._rows
        if any(answers[i].has_ended for i in rows) and ended_may_leave(self._engine, answers):
            going = [row for row, i in enumerate(rows) if not answers[i].has_ended]
            self._engine.keep_sequences(going)
            self._rows = rows = [rows[row] for row in going]
        last = torch.tensor([answers[i].token_ids[-1] for i in rows])
        return self.choose(self._engine.decode(last))

    def choose(self, step: StepResult) -> list[list[_Chosen]]:
        """The next token of those answers that go on, none of the others."""
        answers = self._answers
        chosen: list[list[_Chosen]] = [[] for _ in answers]
        layers = step.exit_layers.tolist()
        # the engine knows it without handing out the logits
        knows = any(answers[i].takes_best for i in self._rows)
        best = step.best_tokens.tolist() if knows else layers
        for row, i in enumerate(self._rows):
            if answers[i].has_ended:
                continue
            token = best[row] if answers[i].takes_best else NO_TOKEN
            if token == NO_TOKEN:  # not known, or there is none: this says why
                token = answers[i].choose(step.logits[row])
            chosen[i].append(_Chosen(token, layers[row]))
        return chosen


def _verified(engine: Engine, lossless: LosslessDecoder) -> list[list[_Chosen]]:
    """The tokens of each answer that a round of lossless mode brings."""
    return [
        [_Chosen(new.token, engine.num_layers, new.origin) for new in verified]
        for verified in lossless.round()
    ]


@dataclass(frozen=True, slots=True)
class _Measures:
    """Of a whole run: times in seconds of `time.perf_counter`, and tokens.

    Attributes:
        start: before the prompts.
        first_token_at: when the first token of each answer was chosen.
        prompt_tokens: that the prefill ran.
        cached_tokens: of a prompt, that were in the cache before.
    """

    start: float
    first_token_at: float
    prompt_tokens: int
    cached_tokens: int

    def response(
        self,
        answer: Answer,
        new: _Chosen,
        text: str,
        now: float,
        memory: int,
        lossless: LosslessStatistics | None,
        offload: OffloadStatistics | None,
    ) -> GenerationResponse:
        """What is said of an answer's last token, which was there at the time `now`."""
        prefill_seconds = self.first_token_at - self.start
        generated = len(answer.exit_layers)
        return GenerationResponse(
            text=text,
            token=new.token,
            exit_layer=new.exit_layer,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_length,
            generated_tokens=generated,
            time_to_first_token=prefill_seconds,
            prompt_tokens_per_second=self.prompt_tokens / prefill_seconds,
            decode_tokens_per_second=(generated - 1) / (now - self.first_token_at)
            if generated > 1
            else None,
            mean_exit_layer=sum(answer.exit_layers) / generated,
            peak_memory_bytes=memory,
            origin=new.origin,
            lossless=lossless,
            offload=offload,
            cached_prompt_tokens=self.cached_tokens,
        )


def _prefill(
    engine: Engine, answers: Sequence[Answer], cached_tokens: int, in_backbone: bool
) -> tuple[StepResult, int]:
    """Run the prompts, and say how many tokens that were."""
    engine.truncate(cached_tokens)
    prompts = [answer.token_ids[cached_tokens:] for answer in answers]
    width = max(map(len, prompts))
    token_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    padding_mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        token_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        padding_mask[i, width - len(prompt) :] = True
    policy = engine.policy
    if in_backbone:
        engine.policy = ExitPolicy.never()
    try:
        step = engine.prefill(token_ids, None if bool(padding_mask.all()) else padding_mask)
    finally:
        engine.policy = policy
    return step, int(padding_mask.sum())
