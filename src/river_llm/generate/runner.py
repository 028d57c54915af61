"""One engine for the answers of several threads, and the text that it keeps of the last one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from river_llm.engines.step import Engine, Offloading
from river_llm.errors import PromptCacheError
from river_llm.generate.cached_text import CachedText, prompt_thresholds, text_of_answer
from river_llm.generate.generator import Generator
from river_llm.generate.prompt_cache import read_prompt_cache, write_prompt_cache
from river_llm.generate.recorder import Recorder
from river_llm.generate.request import Request
from river_llm.generate.responses import GenerationResponse
from river_llm.ownership import ProcessLock
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import ResidencyPlan


class Runner:
    """Answers requests by a `Generator`. Each of its steps is for all threads that wait for one.

    Attributes:
        kept: of the last streamed answer, or of a file, what other prompts may take over.
    """

    def __init__(self, engine: Engine, residency: ResidencyPlan | None = None) -> None:
        """`residency` says which backbone layers stay in memory, and learns from the tokens."""
        self.kept: CachedText | None = None
        self._engine = engine
        self._residency = residency
        self._generator = Generator(engine)
        self._lock = ProcessLock()  # of the thread that uses the engine

    def stream(self, request: Request, reuse_cache: bool) -> Iterator[GenerationResponse]:
        """Its tokens as they come; its text is kept. `reuse_cache`: take over what the prompt has
        in common with the text that was kept before.

        Raises:
            LogitsError: the next token can't be chosen.
            RiverError: see `Engine.forward`.
        """
        recorder: Recorder | None = None
        try:
            while True:
                with self._lock:
                    if recorder is None:
                        recorder = self._recorder(request)
                        self._join(request, recorder, reuse_cache)
                    while not recorder.responses and not request.has_ended:
                        self._step()
                if not recorder.responses:
                    break
                while recorder.responses:
                    yield recorder.responses.popleft()
            if request.error is not None:
                raise request.error
        finally:
            self._leave(request)

    def run(self, requests: Sequence[Request]) -> list[list[GenerationResponse]]:
        """All tokens of each; errors as of `stream`."""
        with self._lock:
            recorders = [self._recorder(request) for request in requests]
            try:
                for request, recorder in zip(requests, recorders, strict=True):
                    self._generator.add(request, recorder)
                for request in requests:
                    while not request.has_ended:
                        self._step()
                    if request.error is not None:
                        raise request.error
            finally:
                for request in requests:
                    self._leave(request)
        return [list(recorder.responses) for recorder in recorders]

    def forget(self) -> None:
        """Let go of the text that is kept."""
        with self._lock:
            text, self.kept = self.kept, None
            if text is not None:
                self._engine.drop_sequence(text.sequence)

    def save(self, path: Path, length: int | None = None) -> int:
        """Write the text that is kept to a file; how many tokens that are, at most `length`.

        Raises:
            PromptCacheError: there is nothing to write, or it can't be written.
        """
        with self._lock:
            if self.kept is None:
                raise PromptCacheError(
                    "the KV cache holds no text that could be written to a file; answer one prompt "
                    'first, by another prefill rule than "sequence"'
                )
            text = replace(self.kept, tokens=self.kept.tokens[:length])
            write_prompt_cache(path, self._engine, text)
        return len(text.tokens)

    def load(self, path: Path, policy: ExitPolicy | None) -> int:
        """Keep the text of a file, for answers by this policy; how many tokens it has.

        Raises:
            PromptCacheError: it can't be read, or is of other prompts.
        """
        thresholds = prompt_thresholds(policy, self._engine.num_layers)
        with self._lock:
            text = read_prompt_cache(path, self._engine, thresholds)
            self.forget()
            self.kept = text
        return len(text.tokens)

    def _recorder(self, request: Request) -> Recorder:
        return Recorder(self._engine, request, with_offload=self._residency is not None)

    def _join(self, request: Request, recorder: Recorder, reuse_cache: bool) -> None:
        """Let a request into the loop, with what it takes over of the text that is kept."""
        engine, text = self._engine, self.kept
        usable = 0
        if text is not None and reuse_cache:
            usable = text.usable(
                request.tokens, request.policy, engine.num_layers, engine.rope_boundary
            )
        if text is None or usable == 0:
            self.forget()
            self._generator.add(request, recorder, keep=self._keep)
            return
        engine.truncate(text.sequence, usable)
        self.kept = None
        self._generator.add(request, recorder, text.sequence, self._keep)

    def _keep(self, request: Request) -> None:
        """Keep the text of an answer that has ended, in place of the last one's."""
        engine, sequence = self._engine, request.sequence
        self.forget()
        self.kept = text_of_answer(
            sequence,
            request.tokens[: engine.length(sequence)],
            request.prompt_length,
            request.policy,
            engine.num_layers,
            engine.rope_boundary,
        )
        if self.kept is None:
            engine.drop_sequence(sequence)

    def _leave(self, request: Request) -> None:
        """Where a stream is closed late, another thread may be stepping, and sees to it."""
        self._generator.cancel(request)
        if self._lock.acquire_at_once():
            try:
                self._generator.remove_cancelled()
            finally:
                self._lock.release()

    def _step(self) -> None:
        """One step of all requests, which says how deep decoded tokens go."""
        event = self._generator.step()
        if self._residency is not None:
            assert isinstance(self._engine, Offloading)
            decoded = [outcome for outcome in event.outcomes.values() if not outcome.prompt_tokens]
            if self._residency.note(new.exit_layer for one in decoded for new in one.tokens):
                self._engine.keep_layers(self._residency.resident)
