"""How likely an engine finds given text, every token leaving as decoding would take it.

Nothing is prefilled by the policy's prefill rule here: the whole text, questions too, leaves token
by token. An answer of one token (a letter, yes or no) comes from the pass over the question, so
with a question in full precision it would be the backbone's own whatever the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.engines import Engine, Step
from river_llm.engines.step import check_logits
from river_llm.errors import LogitsError
from river_llm.river.policy import ExitPolicy

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
        is_greedy: whether each of them is the argmax, so that greedy decoding gives them.
    """

    log_likelihood: float
    exit_layers: list[int]
    is_greedy: bool


class LikelihoodScorer:
    """Scores candidates that share a prefix, which runs once.

    Each of the items that run side by side has a sequence of the engine; a prefix that the item
    before had too, as examples in front of each question are, isn't run again. `close` drops them.

    Attributes:
        tokens_run: how many tokens the engine has run so far.
    """

    def __init__(self, engine: Engine, policy: ExitPolicy | None = None) -> None:
        """`policy` says when tokens leave the backbone; None: never."""
        self.tokens_run = 0
        self._engine = engine
        thresholds = (policy or ExitPolicy.never()).thresholds(engine.num_layers)
        self._thresholds = torch.tensor(thresholds)
        self._slots: list[_Slot] = []

    def close(self) -> None:
        """Let go of the engine's sequences."""
        for slot in self._slots:
            self._engine.drop_sequence(slot.sequence)
        self._slots = []

    def score(self, items: Sequence[Sequence[Candidate]]) -> list[list[CandidateScore]]:
        """The score of every candidate of every item, the items side by side.

        Raises:
            ContextFullError: a candidate doesn't fit the model's context.
            LogitsError: see `check_likelihoods`.
        """
        while len(self._slots) < len(items):
            self._slots.append(_Slot(self._engine.add_sequence(), []))
        slots = self._slots[: len(items)]
        prefixes = [candidates[0].token_ids[: _shared_tokens(candidates)] for candidates in items]
        self._run_prefixes(slots, prefixes)
        scores: list[list[CandidateScore]] = [[] for _ in items]
        for place in range(max(map(len, items))):
            going = [i for i, candidates in enumerate(items) if place < len(candidates)]
            found = self._score_rests([slots[i] for i in going], [items[i][place] for i in going])
            for i, score in zip(going, found, strict=True):
                scores[i].append(score)
        return scores

    def _run_prefixes(self, slots: Sequence[_Slot], prefixes: Sequence[tuple[int, ...]]) -> None:
        """Have these in the slots' sequences; what they hold of them stays."""
        rows: list[tuple[int, int]] = []
        for slot, prefix in zip(slots, prefixes, strict=True):
            common = _common_length(prefix, slot.tokens)
            self._truncate(slot, common)
            rows += [(slot.sequence, token) for token in prefix[common:]]
        width = self._engine.prefill_rows or len(rows)
        for first in range(0, len(rows), max(1, width)):
            sequences, tokens = zip(*rows[first : first + width], strict=True)
            self._engine.forward(Step(tokens, sequences, self._thresholds, ()))
            self.tokens_run += len(tokens)
        for slot, prefix in zip(slots, prefixes, strict=True):
            slot.tokens = list(prefix)

    def _score_rests(
        self, slots: Sequence[_Slot], candidates: Sequence[Candidate]
    ) -> list[CandidateScore]:
        """Score what follows the prefixes in the slots, and leave them with those."""
        tallies = [_Tally() for _ in slots]
        begins = [len(slot.tokens) for slot in slots]
        rests = [c.token_ids[n:-1] for c, n in zip(candidates, begins, strict=True)]
        width = max(1, _LOGIT_ROWS // len(slots))
        try:
            for first in range(0, max(map(len, rests)), width):
                parts = [rest[first : first + width] for rest in rests]  # each predicts the next
                tokens = [token for part in parts for token in part]
                sequences = [
                    slot.sequence for slot, part in zip(slots, parts, strict=True) for _ in part
                ]
                step = Step(tokens, sequences, self._thresholds, range(len(tokens)))
                result = self._engine.forward(step)
                self.tokens_run += len(tokens)
                row = 0
                for i, part in enumerate(parts):
                    predicted = begins[i] + first + 1  # by the first of these tokens
                    skipped = max(0, candidates[i].start - predicted)
                    targets = candidates[i].token_ids[predicted + skipped : predicted + len(part)]
                    rows = slice(row + skipped, row + len(part))
                    row += len(part)
                    if targets:
                        tallies[i].note(result.logits[rows], result.exit_layers[rows], targets)
        finally:
            for slot, begin in zip(slots, begins, strict=True):
                self._truncate(slot, begin)
        return [tally.score() for tally in tallies]

    def _truncate(self, slot: _Slot, length: int) -> None:
        self._engine.truncate(slot.sequence, length)
        del slot.tokens[length:]


@dataclass(slots=True)
class _Slot:
    """A sequence of the engine, and the tokens in it."""

    sequence: int
    tokens: list[int]


class _Tally:
    """What is counted of a candidate."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._layers: list[int] = []
        self._is_greedy = True

    def note(self, logits: Tensor, exit_layers: Tensor, targets: Sequence[int]) -> None:
        """Logits `[tokens, vocabulary]` predict these targets."""
        self._sum += float(log_likelihoods(logits, targets).double().sum())
        self._is_greedy &= logits.argmax(-1).tolist() == list(targets)
        self._layers += exit_layers.tolist()

    def score(self) -> CandidateScore:
        """Of all that was noted."""
        return CandidateScore(self._sum, self._layers, self._is_greedy)


def score_candidates(
    engine: Engine, policy: ExitPolicy | None, candidates: Sequence[Candidate], batch_size: int
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
    scorer = LikelihoodScorer(engine, policy)
    try:
        for first in range(0, len(groups), batch_size):
            batch = groups[first : first + batch_size]
            scores = scorer.score([[candidates[place] for place in group] for group in batch])
            for places, found in zip(batch, scores, strict=True):
                yield from zip(places, found, strict=True)
    finally:
        scorer.close()


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


def _shared_tokens(candidates: Sequence[Candidate]) -> int:
    """How many first tokens all candidates share that predict nothing which counts."""
    first = candidates[0].token_ids
    longest = min(candidate.start for candidate in candidates) - 1
    return min([longest, *(_common_length(first, c.token_ids) for c in candidates[1:])])


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
