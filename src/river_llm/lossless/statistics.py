"""What drafting and verifying brought, for one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LosslessStatistics:
    """Of the tokens after the first, which the prompt's pass gives.

    Attributes:
        verifications: passes of the backbone.
        tokens_per_verification: new tokens that each gave, 1 at least; None before the first.
        drafted_tokens: tokens that were guessed.
        accepted_tokens: of these, those that were the backbone's own.
        ngram_tokens: accepted tokens that came from the text itself and not from the river.
        draft_share: accepted tokens among all; None before the first verification.
        acceptance_by_position: of the drafts that had a first, second, ... token, how many were
            accepted that far.
        draft_seconds, verify_seconds: time in drafting, with the look-up in the text, and in
            verifying and choosing, of the whole batch. What is learnt meanwhile is in neither.
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


class Counter:
    """Counts the rounds of one answer."""

    def __init__(self) -> None:
        self._verifications = 0
        self._tokens = 0
        self._ngram_tokens = 0
        self._drafted: list[int] = []  # drafts that had a token there
        self._accepted: list[int] = []
        self._last = (0, 0, 0, False)

    def note(self, drafted: int, accepted: int, tokens: int, is_ngram: bool) -> None:
        """A verification accepted so many of the drafted tokens, and gave so many tokens in all:
        one more, unless the answer ended before."""
        self._last = (drafted, accepted, tokens, is_ngram)
        self._verifications += 1
        self._count(1, *self._last)

    def drop(self, tokens: int) -> None:
        """The last so many tokens of the last verification stand behind the answer's end."""
        drafted, accepted, kept, is_ngram = self._last
        self._count(-1, *self._last)
        kept -= tokens
        self._last = (min(drafted, kept), min(accepted, kept), kept, is_ngram)
        self._count(1, *self._last)

    def _count(self, sign: int, drafted: int, accepted: int, tokens: int, is_ngram: bool) -> None:
        self._tokens += sign * tokens
        self._ngram_tokens += sign * accepted if is_ngram else 0
        while len(self._drafted) < drafted:
            self._drafted.append(0)
            self._accepted.append(0)
        for place in range(drafted):
            self._drafted[place] += sign
            self._accepted[place] += sign * (place < accepted)

    def statistics(self, draft_seconds: float, verify_seconds: float) -> LosslessStatistics:
        """So far."""
        accepted = sum(self._accepted)
        pairs = zip(self._accepted, self._drafted, strict=True)
        return LosslessStatistics(
            verifications=self._verifications,
            tokens_per_verification=self._tokens / self._verifications
            if self._verifications
            else None,
            drafted_tokens=sum(self._drafted),
            accepted_tokens=accepted,
            ngram_tokens=self._ngram_tokens,
            draft_share=accepted / self._tokens if self._tokens else None,
            acceptance_by_position=tuple(a / d for a, d in pairs if d),
            draft_seconds=draft_seconds,
            verify_seconds=verify_seconds,
        )
