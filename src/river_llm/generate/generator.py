"""The loop that generates text: requests join, step together, and leave."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from river_llm.engines.step import NO_TOKEN, Engine, Offloading, StepResult, check_tokens
from river_llm.errors import ConfigError, ContextFullError, LogitsError
from river_llm.generate.events import NewToken, Outcome, StepEvent
from river_llm.generate.lossless import Guess, Speculation, accept, check_drafts
from river_llm.generate.request import Request
from river_llm.generate.rows import Part, decode_part, prompt_part, run_parts, runs_whole
from river_llm.generate.second_look import Again, check_second_look, tokens_before

Observer = Callable[[StepEvent], None]
Keep = Callable[[Request], None]


class Generator:
    """Requests that share the steps of one engine, each with its own sampling, policy and end.

    Requests may be added and cancelled between steps. Prompts run in parts, and between two parts
    those that are further on decode a token. Not for more than one thread at a time.

    Attributes:
        engine: computes the steps. Sequences of others are left alone.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._running: dict[Request, tuple[Observer | None, Keep | None]] = {}
        self._cancelled: deque[Request] = deque()  # another thread may append
        self._speculation = Speculation(engine)
        self._prefilled_last = self._is_stepping = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running

    def add(
        self,
        request: Request,
        observer: Observer | None = None,
        sequence: int | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Let a request join.

        Args:
            observer: is called with the event of each of its steps.
            sequence: of the engine that holds the first tokens of the prompt, all but one or fewer;
                it is the request's from now on. None: a new one.
            keep: takes the sequence over when the request leaves, and has its last tokens; by
                default, and where it failed, the engine forgets it.

        Raises:
            RiverError: see `check_request`.
        """
        check_request(self.engine, request)
        if request.is_lossless:
            self._speculation.prepare(request.drafts)
        if sequence is None:
            sequence = self.engine.add_sequence(request.prompt_length)
        request.sequence = sequence
        request.cached_tokens = self.engine.length(sequence)
        request.fit(self.engine.context_length)
        self._running[request] = (observer, keep)

    def cancel(self, request: Request) -> None:
        """Let a request leave before its end. Any thread may ask for it; it has left by the next
        step."""
        self._cancelled.append(request)

    def step(self) -> StepEvent:
        """Run the next rows, and give each request the tokens that come of them; not while idle.

        Raises:
            RiverError: see `Engine.forward`; all requests are as they were before.
        """
        self.remove_cancelled()
        self._is_stepping = True
        try:
            start = time.perf_counter()
            prompts = self._prompt_parts()
            decoding = [] if prompts else [r for r in self._running if r.exit_layers]
            guesses = self._speculation.draft(decoding)
            drafted_at = time.perf_counter()
            parts = prompts or {r: self._decode_part(r, guesses.get(r)) for r in decoding}
            samples = any(not request.sampler.takes_argmax for request in parts)
            result, again = run_parts(self.engine, list(parts.values()), keep_logits=samples)
            self._prefilled_last = bool(prompts)
            outcomes = {
                request: self._outcome(request, part, guesses.get(request), result, again)
                for request, part in parts.items()
            }
            event = StepEvent(start, drafted_at, time.perf_counter(), outcomes)
            if decoding:
                self._speculation.learn(guesses, event)
            observers = [self._running[request][0] for request in outcomes]
            for request in outcomes:
                if request.has_ended:
                    self._remove(request)
            for observer in observers:
                if observer is not None:
                    observer(event)
        finally:
            self._is_stepping = False
        return event

    def remove_cancelled(self) -> None:
        """Let go of the requests that were cancelled; within a step, it is done after it."""
        while self._cancelled and not self._is_stepping:
            request = self._cancelled.popleft()
            if request in self._running:
                request.finish_reason = "interrupted"
                self._remove(request)

    def _remove(self, request: Request) -> None:
        _, keep = self._running.pop(request)
        if keep is None or request.error is not None:
            self.engine.drop_sequence(request.sequence)
        else:
            self.engine.truncate(request.sequence, len(request.tokens) - 1)  # not what was drafted
            keep(request)
        request.sequence = -1

    # ---- schedule ----

    def _prompt_parts(self) -> dict[Request, Part]:
        """The next parts of prompts; none where there are none, or where it is the others' turn."""
        waiting = [request for request in self._running if not request.exit_layers]
        if self._prefilled_last and len(waiting) < len(self._running):
            return {}
        engine = self.engine
        parts: dict[Request, Part] = {}
        left = engine.prefill_rows or sys.maxsize
        for request in waiting:
            sequence, length = request.sequence, request.prompt_length
            start = min(engine.length(sequence), length - 1)  # after Ctrl-C all may have run
            engine.truncate(sequence, start)
            count = length - start
            if not runs_whole(request.policy):
                count = min(count, left)
            if count > 0:
                parts[request] = prompt_part(
                    sequence, request.tokens, start, count, request.policy, engine.num_layers
                )
                left = max(0, left - count)
        return parts

    def _decode_part(self, request: Request, guess: Guess | None) -> Part:
        engine, sequence, text = self.engine, request.sequence, request.tokens
        engine.truncate(sequence, len(text) - 1)  # Ctrl-C left more
        length, policy = engine.length(sequence), request.policy
        if length < len(text) - 1:  # it cut a second look short
            part = decode_part(sequence, text[length:], None, engine.num_layers)
            part.logits = 1
            return part
        before: list[int] = []
        if policy is not None and policy.second_look is not None:
            first = max(request.prompt_length, request.looked_at)
            before = tokens_before(engine, text, len(text), first)
        tokens = [text[-1], *(guess.tokens if guess else [])]
        return decode_part(sequence, tokens, policy, engine.num_layers, before)

    # ---- postprocess ----

    def _outcome(
        self,
        request: Request,
        part: Part,
        guess: Guess | None,
        result: StepResult,
        again: Again,
    ) -> Outcome:
        """Give a request the tokens that its logits come to."""
        prompt_tokens = 0 if request.exit_layers else len(part.tokens)
        drafted = guess.tokens if guess else []
        chosen = self._chosen(request, part, drafted, result) if part.logits else []
        first_row = part.first_row + len(part.tokens) - part.logits
        exit_layers = result.exit_layers[first_row:][: len(chosen)].tolist()
        tokens: list[NewToken] = []
        for place, (token, exit_layer) in enumerate(zip(chosen, exit_layers, strict=True)):
            was_drafted = drafted[place : place + 1] == [token]
            origin = guess.source if guess and was_drafted else "backbone"
            if looked_twice := part.first_logit + place in again:
                request.looked_at = len(request.tokens)
            text = request.take(token, exit_layer)
            tokens.append(NewToken(token, text, exit_layer, origin, looked_twice))
            if request.has_ended:
                break
        if drafted and not request.has_ended:
            self.engine.truncate(part.sequence, len(request.tokens) - 1)
        accepted = sum(token.origin != "backbone" for token in tokens)
        ends_within = accepted == len(tokens)  # what was drafted behind the end doesn't count
        return Outcome(prompt_tokens, accepted if ends_within else len(drafted), accepted, tokens)

    def _chosen(
        self, request: Request, part: Part, drafted: Sequence[int], result: StepResult
    ) -> list[int]:
        """The request's own tokens, as many as are right; none where that has to be tried again
        without a draft, or failed."""
        best: list[int] = []
        if request.sampler.takes_argmax:
            best = result.best_tokens[part.first_logit :][: part.logits].tolist()

        def choose(place: int) -> int:
            if best and best[place] != NO_TOKEN:
                return best[place]
            text = [*request.tokens, *drafted[:place]]  # if there is no token, this says why
            return request.sampler.choose(text, result.logits[part.first_logit + place])

        try:
            tokens = accept(drafted, choose)
        except LogitsError as error:
            if not drafted:
                request.error = error
            # else a drafted token whose states are no numbers may have reached those before it
            request.may_draft = False
            return []
        request.may_draft = True
        return tokens


def check_prompt(length: int, context_length: int | None, whose: str = "") -> None:
    """Validate that a prompt of so many tokens fits the model's context; None: there is no limit.

    Args:
        whose: said in front of the error.

    Raises:
        ContextFullError: it doesn't.
    """
    if context_length is not None and length > context_length:
        raise ContextFullError(
            f"{whose}the prompt has {length} tokens, the model's context holds {context_length}; "
            "shorten the prompt"
        )


def check_request(engine: Engine, request: Request) -> None:
    """Validate that an engine can serve a request.

    Raises:
        ConfigError: the prompt is empty, the model has fewer layers than the policy names, or the
            engine can't verify, draft or look again as it should.
        ContextFullError: the prompt doesn't fit the model's context.
        RiverError: the embedding has no row for a token.
    """
    if not request.tokens:
        raise ConfigError(f"{request.name}the prompt is empty; give some text")
    check_prompt(request.prompt_length, engine.context_length, request.name)
    check_tokens(request.tokens, engine.vocab_size)
    if request.policy is not None:
        request.policy.thresholds(engine.num_layers)
        check_second_look(engine, request.policy)
        return
    check_drafts(engine, request.drafts)
    if isinstance(engine, Offloading) and engine.depth_limit is not None:
        raise ConfigError(
            "lossless mode verifies with the whole backbone; it can't go with no_miss"
        )
