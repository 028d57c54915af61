"""How likely an engine finds given text, every token leaving as decoding would take it.

Nothing is prefilled by the policy's prefill rule here: the whole text, questions too, leaves token
by token. An answer of one token (a letter, yes or no) comes from the pass over the question, so
with a question in full precision it would be the backbone's own whatever the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from river_llm.engines import Engine
from river_llm.engines.step import check_logits
from river_llm.errors import LogitsError

_LOGIT_ROWS = 256  # whose logits are held at a time


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text, and from which token on its likelihood counts.

    Attributes:
        token_ids: the whole text, question and answer.
        start: the first token that counts, 1 or more.
    """

    token_ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.token_ids):
            raise ValueError(
                f"a text of {len(self.token_ids)} tokens can't count from {self.start}"
            )


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """What an engine says of a candidate.

    Attributes:
        log_likelihood: natural logarithm of the probability of the tokens that count.
        exit_layers: how many backbone layers each prediction of them ran.
        is_greedy: whether each of them is the likeliest one, so that greedy decoding gives them.
    """

    log_likelihood: float
    exit_layers: list[int]
    is_greedy: bool


class LikelihoodScorer:
    """Scores candidates that share a beginning, which runs once.

    The engine's cache is used, and empty or not afterwards. A beginning that the item before had
    too, as examples in front of each question are, isn't run again as long as the scorer alone uses
    the engine.

    Attributes:
        tokens_run: how many tokens the engine has run so far.
    """

    def __init__(self, engine: Engine) -> None:
        self.tokens_run = 0
        self._engine = engine
        self._cached: list[int] = []  # what the cache holds, if one sequence

    def score(self, items: Sequence[Sequence[Candidate]]) -> list[list[CandidateScore]]:
        """The score of every candidate of every item, the items side by side.

        Raises:
            ContextFullError: a candidate doesn't fit the model's context.
            LogitsError: see `check_likelihoods`.
        """
        shared = [_shared_tokens(candidates) for candidates in items]
        with _token_by_token(self._engine):
            if len(items) > 1 and _mostly_common(items, shared):
                return [self._score([item], [n])[0] for item, n in zip(items, shared, strict=True)]
            return self._score(items, shared)

    def _score(
        self, items: Sequence[Sequence[Candidate]], shared: list[int]
    ) -> list[list[CandidateScore]]:
        if min(shared) == 0:
            shared = [0] * len(items)
        self._run_beginnings([list(c[0].token_ids[:n]) for c, n in zip(items, shared, strict=True)])
        scores: list[list[CandidateScore]] = [[] for _ in items]
        for place in range(max(map(len, items))):
            candidates = [item[place] if place < len(item) else None for item in items]
            for i, score in enumerate(self._score_rests(candidates, shared)):
                if score is not None:
                    scores[i].append(score)
        return scores

    def _run_beginnings(self, beginnings: list[list[int]]) -> None:
        """Fill the cache with these; empty ones leave it empty."""
        common = 0
        if len(beginnings) == 1:
            common = _common_length(beginnings[0], self._cached)
            beginnings = [beginnings[0][common:]]
        kept, self._cached = self._cached[:common], []  # nothing, should the pass be cut short
        self._engine.truncate(common)
        width = max(map(len, beginnings))
        if width > 0:
            token_ids = torch.zeros(len(beginnings), width, dtype=torch.long)
            mask = torch.zeros(len(beginnings), width, dtype=torch.bool)
            for row, beginning in enumerate(beginnings):
                token_ids[row, width - len(beginning) :] = torch.tensor(beginning)
                mask[row, width - len(beginning) :] = True
            self._engine.prefill(token_ids, None if bool(mask.all()) else mask)
            self.tokens_run += int(mask.sum())
        if len(beginnings) == 1:
            self._cached = kept + beginnings[0]

    def _score_rests(
        self, candidates: list[Candidate | None], shared: list[int]
    ) -> list[CandidateScore | None]:
        """Score what follows the shared beginnings in the cache, and leave the cache with those."""
        pairs = zip(candidates, shared, strict=True)
        rests = [c.token_ids[n:-1] if c else () for c, n in pairs]  # each predicts the next one
        lengths = [len(rest) for rest in rests]
        width = max(1, _LOGIT_ROWS // len(rests))
        sums = [0.0] * len(rests)
        layers: list[list[int]] = [[] for _ in rests]
        are_greedy = [True] * len(rests)
        cached, self._cached = self._cached, []
        for first in range(0, max(lengths), width):
            counts = [min(max(length - first, 0), width) for length in lengths]
            token_ids = torch.zeros(len(rests), max(counts), dtype=torch.long)
            for row, (rest, count) in enumerate(zip(rests, counts, strict=True)):
                token_ids[row, :count] = torch.tensor(rest[first : first + count])
            step = self._engine.score(token_ids, None if len(set(counts)) == 1 else counts)
            self.tokens_run += sum(counts)
            for row, (candidate, count) in enumerate(zip(candidates, counts, strict=True)):
                if candidate is None or count == 0:
                    continue
                predicted = shared[row] + first + 1  # by the first of these tokens
                skipped = max(0, candidate.start - predicted)
                targets = candidate.token_ids[predicted + skipped : predicted + count]
                if targets:
                    logits = step.logits[row, skipped:count]
                    sums[row] += float(log_likelihoods(logits, targets).double().sum())
                    are_greedy[row] &= logits.argmax(-1).tolist() == list(targets)
                    layers[row] += step.exit_layers[row, skipped:count].tolist()
        if max(shared) == 0:
            self._engine.truncate(0)
        else:
            self._engine.rewind(lengths)
            self._cached = cached
        return [
            None if candidate is None else CandidateScore(total, exit_layers, is_greedy)
            for candidate, total, exit_layers, is_greedy in zip(
                candidates, sums, layers, are_greedy, strict=True
            )
        ]


def score_candidates(
    engine: Engine, candidates: Sequence[Candidate], batch_size: int
) -> Iterator[tuple[int, CandidateScore]]:
    """The place and the score of every candidate, as they are found. Those of the same question
    run one after the other, `batch_size` questions side by side.

    Raises:
        ContextFullError: a candidate doesn't fit the model's context.
        LogitsError: see `check_likelihoods`.
    """
    questions: dict[tuple[int, ...], list[int]] = {}
    for place, candidate in enumerate(candidates):
        question = candidate.token_ids[: candidate.start]
        # one token, as before windows of a text, is nothing to share
        questions.setdefault(question if len(question) > 1 else (-place,), []).append(place)
    groups = list(questions.values())
    scorer = LikelihoodScorer(engine)
    for first in range(0, len(groups), batch_size):
        batch = groups[first : first + batch_size]
        scores = scorer.score([[candidates[place] for place in group] for group in batch])
        for places, found in zip(batch, scores, strict=True):
            yield from zip(places, found, strict=True)


def log_likelihoods(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """float32 `[tokens]`: of each target by the logits `[tokens, vocabulary]` that predict it.

    Raises:
        LogitsError: see `check_likelihoods`.
    """
    chosen = torch.tensor(targets, device=logits.device).unsqueeze(1)
    found = logits.float().log_softmax(-1).gather(1, chosen).squeeze(1).cpu()
    check_likelihoods(found, logits)
    return found


def check_likelihoods(values: Tensor, *logits: Tensor) -> None:
    """Validate what was computed from logits `[tokens, vocabulary]` of given text.

    Raises:
        LogitsError: the logits are no numbers, or a token has no probability at all.
    """
    if not bool(values.isfinite().all()):
        for each in logits:
            check_logits(each)
        raise LogitsError("the model gives a token of the text no probability at all")


@contextmanager
def _token_by_token(engine: Engine) -> Iterator[None]:
    """Let prefill take each token's exit as decoding would."""
    policy = engine.policy
    engine.policy = replace(policy, prefill="token")
    try:
        yield
    finally:
        engine.policy = policy


def _shared_tokens(candidates: Sequence[Candidate]) -> int:
    """How many first tokens all candidates share that predict nothing which counts."""
    first = candidates[0].token_ids
    longest = min(candidate.start for candidate in candidates) - 1
    return min([longest, *(_common_length(first, c.token_ids) for c in candidates[1:])])


def _mostly_common(items: Sequence[Sequence[Candidate]], shared: Sequence[int]) -> bool:
    """Whether most of the beginnings is the same in all items, so that running them one after the
    other, each from where they part, is less work than side by side."""
    first = items[0][0].token_ids[: shared[0]]
    common = min(
        _common_length(first, item[0].token_ids[:n]) for item, n in zip(items, shared, strict=True)
    )
    return 2 * common * len(items) > sum(shared) and common > 0


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
