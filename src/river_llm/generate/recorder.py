"""Watches a request: its tokens as responses, with time, memory and what drafts have brought."""

from __future__ import annotations

import time
from collections import Counter, deque

from river_llm.engines.step import Engine, Offloading
from river_llm.generate.events import Outcome, StepEvent
from river_llm.generate.request import Request
from river_llm.generate.responses import GenerationResponse, LosslessStatistics
from river_llm.memory import peak_memory_bytes


class Recorder:
    """An observer of a `Generator`, for one of its requests.

    Attributes:
        responses: of the tokens that came, for others to take away.
    """

    def __init__(self, engine: Engine, request: Request, *, with_offload: bool = False) -> None:
        """Begins when the request is added. `with_offload`: layers may be evicted."""
        self.responses: deque[GenerationResponse] = deque()
        self._engine, self._request = engine, request
        self._start = time.perf_counter()
        self._first_token_at = 0.0
        self._prompt_tokens = 0  # that have run
        self._generated = self._layers = self._memory = self._second_looks = 0
        self._offloading = engine if with_offload and isinstance(engine, Offloading) else None
        self._offloaded_before = self._offloading.offload_statistics if self._offloading else None
        self._drafts = _DraftCounter() if request.is_lossless else None

    def __call__(self, event: StepEvent) -> None:
        """Note a step."""
        outcome = event.outcomes[self._request]
        self._prompt_tokens += outcome.prompt_tokens
        if self._drafts is not None and self._generated and outcome.tokens:
            self._drafts.note(event, outcome)
        lossless = None if self._drafts is None else self._drafts.statistics()
        offload = None
        if self._offloading is not None and self._offloaded_before is not None:
            offload = self._offloading.offload_statistics.since(self._offloaded_before)
        policy = self._request.policy
        looks_again = policy is not None and policy.second_look is not None
        for number, new in enumerate(outcome.tokens, start=1):
            self._generated += 1
            self._layers += new.exit_layer
            self._second_looks += new.looked_twice
            ends = self._request.has_ended and number == len(outcome.tokens)
            if self._generated == 1:
                self._first_token_at = event.end
            if self._generated == 1 or ends:
                self._memory = peak_memory_bytes(self._engine.device)
            prefill_seconds = self._first_token_at - self._start
            decoded, decode_seconds = self._generated - 1, event.end - self._first_token_at
            response = GenerationResponse(
                text=new.text,
                token=new.token,
                exit_layer=new.exit_layer,
                finish_reason=self._request.finish_reason if ends else None,
                prompt_tokens=self._request.prompt_length,
                cached_prompt_tokens=self._request.cached_tokens,
                generated_tokens=self._generated,
                time_to_first_token=prefill_seconds,
                prompt_tokens_per_second=self._prompt_tokens / prefill_seconds,
                decode_tokens_per_second=decoded / decode_seconds if decoded else None,
                mean_exit_layer=self._layers / self._generated,
                second_looks=self._second_looks if looks_again else None,
                peak_memory_bytes=self._memory,
                origin=new.origin,
                lossless=lossless,
                offload=offload,
            )
            self.responses.append(response)


class _DraftCounter:
    """Counts the verifications of one answer."""

    def __init__(self) -> None:
        self._verifications = self._tokens = self._ngram_tokens = 0
        # drafts that had a token at a position, and of these, those that were accepted so far
        self._drafted, self._accepted = Counter[int](), Counter[int]()
        self._draft_seconds = self._verify_seconds = 0.0

    def note(self, event: StepEvent, outcome: Outcome) -> None:
        """A verification, which gave a token or more."""
        self._verifications += 1
        self._tokens += len(outcome.tokens)
        self._ngram_tokens += sum(new.origin == "ngram" for new in outcome.tokens)
        self._drafted.update(range(outcome.drafted))
        self._accepted.update(range(outcome.accepted))
        self._draft_seconds += event.drafted_at - event.start
        self._verify_seconds += event.end - event.drafted_at

    def statistics(self) -> LosslessStatistics:
        """So far."""
        accepted, tokens = self._accepted.total(), self._tokens
        by_position = [self._accepted[place] / n for place, n in sorted(self._drafted.items())]
        return LosslessStatistics(
            verifications=self._verifications,
            tokens_per_verification=tokens / self._verifications if self._verifications else None,
            drafted_tokens=self._drafted.total(),
            accepted_tokens=accepted,
            ngram_tokens=self._ngram_tokens,
            draft_share=accepted / tokens if tokens else None,
            acceptance_by_position=tuple(by_position),
            draft_seconds=self._draft_seconds,
            verify_seconds=self._verify_seconds,
        )
