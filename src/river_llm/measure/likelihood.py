"""How likely an engine finds given text, every token leaving as decoding would take it.

Nothing is prefilled by the policy's prefill rule here: the whole text, questions too, leaves token
by token. An answer of one token (a letter, yes or no) comes from the pass over the question, so
with a question in full precision it would be the backbone's own whatever the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_llm.engines import Engine, Step
from river_llm.engines.step import StepResult, check_logits
from river_llm.errors import LogitsError
from river_llm.generate.cached_text import common_prefix
from river_llm.generate.second_look import run_text
from river_llm.river.policy import ExitPolicy

LOGIT_ROWS = 256  # whose logits a step gives at most


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text, and from which token on its likelihood counts.

    Attributes:
        token_ids: the whole text, question and answer.
        start: the first token that counts, 1 or more.
    """

    token_ids: tuple[int, ...]
    start: int


@dataclass(slots=True)
class CandidateScore:
    """What an engine says of a candidate.

    Attributes:
        log_likelihood: natural logarithm of the probability of the tokens that count.
        exit_layers: how many backbone layers each prediction of them ran.
        is_greedy: whether each of them is the argmax, so that greedy decoding gives them.
    """

    log_likelihood: float = 0.0
    exit_layers: list[int] = field(default_factory=list)
    is_greedy: bool = True


class LikelihoodScorer:
    """Scores candidates, of which those with the same question run it once.

    Each of the items that run side by side has a sequence of the engine; what its question begins
    with as the one before did, as examples in front of each question are, isn't run again; with
    second looks only where that is the whole question before. `close` drops the sequences.
    """

    def __init__(self, engine: Engine, policy: ExitPolicy | None = None) -> None:
        """`policy` says when tokens leave the backbone; None: never."""
        self._engine = engine
        policy = policy or ExitPolicy.never()
        self._thresholds = torch.tensor(policy.thresholds(engine.num_layers))
        self._second_look = policy.second_look
        self._held: dict[int, tuple[int, ...]] = {}  # sequence -> the first tokens in it

    def close(self) -> None:
        """Let go of the engine's sequences."""
        while self._held:
            self._engine.drop_sequence(self._held.popitem()[0])

    def score(self, items: Sequence[Sequence[Candidate]]) -> list[list[CandidateScore]]:
        """The score of every candidate of every item, the items side by side. The candidates of an
        item have the same question.

        Raises:
            ContextFullError: a candidate doesn't fit the model's context.
            LogitsError: see `check_likelihoods`.
        """
        while len(self._held) < len(items):
            self._held[self._engine.add_sequence()] = ()
        sequences = list(self._held)[: len(items)]
        # the last token of a question predicts the answer's first
        questions = [candidates[0].token_ids[: candidates[0].start - 1] for candidates in items]
        self._run_questions(dict(zip(sequences, questions, strict=True)))
        scores: list[list[CandidateScore]] = [[] for _ in items]
        for place in range(max(map(len, items))):
            going = [i for i, candidates in enumerate(items) if place < len(candidates)]
            found = self._score_answers({sequences[i]: items[i][place] for i in going})
            for i, score in zip(going, found, strict=True):
                scores[i].append(score)
        return scores

    def _run_questions(self, questions: dict[int, tuple[int, ...]]) -> None:
        """Have these in the sequences; what they hold of them stays."""
        rows: list[tuple[int, int]] = []
        for sequence, question in questions.items():
            held = self._held[sequence]
            common = common_prefix(question, held)
            if self._second_look is not None and common < len(held):
                common = 0  # looks at what is cut off may have overwritten what is before it
            self._engine.truncate(sequence, common)
            self._held[sequence] = ()  # until all have run
            rows += [(sequence, token) for token in question[common:]]
        width = self._engine.prefill_rows or len(rows)
        for first in range(0, len(rows), max(1, width)):
            owners, tokens = zip(*rows[first : first + width], strict=True)
            self._run(tokens, owners, (), questions, {})
        self._held |= questions

    def _score_answers(self, candidates: dict[int, Candidate]) -> list[CandidateScore]:
        """Score one candidate in each sequence, behind its question."""
        scores = [CandidateScore() for _ in candidates]
        for sequence in candidates:
            self._engine.truncate(sequence, len(self._held[sequence]))
        texts = {sequence: one.token_ids for sequence, one in candidates.items()}
        starts = {sequence: one.start for sequence, one in candidates.items()}
        width = max(1, LOGIT_ROWS // len(candidates))
        longest = max(len(one.token_ids) - one.start for one in candidates.values())
        for first in range(0, longest, width):
            parts = []  # each token predicts the next
            for candidate in candidates.values():
                begin = candidate.start - 1 + first
                parts.append(candidate.token_ids[begin : begin + width + 1])
            rows = [
                (sequence, token)
                for sequence, part in zip(candidates, parts, strict=True)
                for token in part[:-1]
            ]
            owners, tokens = zip(*rows, strict=True)
            result = self._run(tokens, owners, range(len(rows)), texts, starts)
            row = 0
            for score, part in zip(scores, parts, strict=True):
                if targets := part[1:]:
                    of_part = slice(row, row + len(targets))
                    row += len(targets)
                    logits = result.logits[of_part]
                    score.log_likelihood += float(log_likelihoods(logits, targets).double().sum())
                    score.is_greedy &= logits.argmax(-1).tolist() == list(targets)
                    score.exit_layers += result.exit_layers[of_part].tolist()
        return scores

    def _run(
        self,
        tokens: Sequence[int],
        sequences: Sequence[int],
        logit_rows: Sequence[int],
        texts: Mapping[int, Sequence[int]],
        firsts: Mapping[int, int],
    ) -> StepResult:
        step = Step(tokens, sequences, self._thresholds, logit_rows)
        return run_text(self._engine, step, self._second_look, texts, firsts)


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
