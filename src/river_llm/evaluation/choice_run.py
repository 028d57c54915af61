"""A choice task with one model: the likelihood of every choice, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.errors import ConfigError, ContextFullError
from river_llm.evaluation.data import digest, read_records
from river_llm.evaluation.run import (
    count_layers,
    describe_model,
    read_examples,
    select,
    summarise_verdicts,
)
from river_llm.evaluation.tasks.task import ChoiceTask, Question
from river_llm.measure.likelihood import Candidate, CandidateScore, LikelihoodScorer
from river_llm.river_lm import RiverLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChoiceRun:
    """See `Run`. Every token leaves by its own similarity, as decoding would take it; the policy's
    prefill rule has no part in it (see `likelihood`)."""

    def __init__(
        self,
        lm: RiverLM,
        task: ChoiceTask,
        *,
        model_name: str,
        directory: Path | None = None,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Read the items.

        Raises:
            ConfigError, DataError, MissingExtraError: see `read_examples` and `read_records`.
        """
        self.name = task.name
        self._lm, self._task = lm, task
        self._shots = task.shots if shots is None else shots
        records = read_records(task.source, directory)
        examples = read_examples(task.examples, directory, self._shots)
        self._questions = [task.question(record) for record in records]
        self._examples = [task.question(record) for record in examples]
        self.ids = select([question.group for question in self._questions], limit)
        self._scorer = LikelihoodScorer(lm.engine)
        self.notes: list[str] = []
        self.identity = {
            **describe_model(lm, model_name),
            "task": task.name,
            "data": digest(records),
            "shots": self._shots,
            "examples": digest(examples[: self._shots] if examples else []),
        }
        del self.identity["policy"]["prefill"]  # not used

    def answer(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        questions = [self._questions[item] for item in ids]
        candidates = [self._candidates(question) for question in questions]
        tokens_before = self._scorer.tokens_run
        self._lm.forget_cache()
        try:
            scores = self._scorer.score(candidates)
        except ContextFullError as error:
            raise ContextFullError(
                f"{self.name}, items {ids[0]} to {ids[-1]}: {error} (or lower --shots)"
            ) from error
        tokens = self._scorer.tokens_run - tokens_before
        records = [self._record(q, s) for q, s in zip(questions, scores, strict=True)]
        for record in records:  # the work of the batch is shared out
            record["tokens"] = tokens / len(records)
        return records

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return summarise_verdicts(records, self._lm.engine.num_layers)

    def _record(self, question: Question, scores: Sequence[CandidateScore]) -> dict[str, Any]:
        likelihoods = [score.log_likelihood for score in scores]
        lengths = [len(choice.removeprefix(" ")) for choice in question.choices]
        per_character = [a / max(1, n) for a, n in zip(likelihoods, lengths, strict=True)]
        chosen = {"acc": _best(likelihoods), "acc_norm": _best(per_character)}
        prediction = chosen["acc_norm" if self._task.by_length else "acc"]
        return {
            "prediction": prediction,
            "correct": prediction == question.answer,
            "metrics": {name: place == question.answer for name, place in chosen.items()},
            "group": question.group,
            "log_likelihoods": [round(value, 5) for value in likelihoods],
            "exit_layers": count_layers(layer for score in scores for layer in score.exit_layers),
        }

    def _candidates(self, question: Question) -> list[Candidate]:
        before = question.heading + "".join(
            f"{example.contexts[example.answer]}{example.choices[example.answer]}\n\n"
            for example in self._examples_for(question)
        )
        pairs = zip(question.contexts, question.choices, strict=True)
        return [_candidate(self._lm.tokenizer, before + c, choice) for c, choice in pairs]

    def _examples_for(self, question: Question) -> list[Question]:
        own = [example for example in self._examples if example.group == question.group]
        if len(own) < self._shots:
            raise ConfigError(
                f"--shots is {self._shots}, but {question.group or self.name} has {len(own)} "
                "examples"
            )
        return own[: self._shots]


def _candidate(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> Candidate:
    """The tokens of context and choice, encoded as one text, so that a token at the border is what
    it would be in running text; those of the choice count. An empty context is the token that
    begins or ends a text."""
    stripped = context.rstrip(" ")
    choice = context[len(stripped) :] + choice  # a blank belongs to the word after it
    whole = list(tokenizer(stripped + choice).input_ids)
    start = len(tokenizer(stripped).input_ids) if stripped else 0
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    if start == 0 and begin is not None and whole[:1] != [begin]:
        whole.insert(0, begin)
    return Candidate(tuple(whole), min(max(start, 1), len(whole) - 1))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
