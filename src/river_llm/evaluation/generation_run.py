"""A task with generated answers and one model, batch by batch, greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from river_llm.errors import ConfigError, DataError
from river_llm.evaluation.code_execution import check_confinement
from river_llm.evaluation.data import Record, digest, read_records
from river_llm.evaluation.run import (
    count_layers,
    describe_model,
    read_examples,
    select,
    summarise_verdicts,
)
from river_llm.evaluation.tasks.task import GenerationTask
from river_llm.generation import GenerationResult
from river_llm.river_lm import RiverLM
from river_llm.sampling import SamplingConfig
from river_llm.text.prompt import Prompt, encode_prompt


class GenerationRun:
    """See `Run`. The prompt runs by the policy's prefill rule, the answer is decoded. Where items
    are answered one at a time, what a prompt shares with the one before, as examples, runs once."""

    def __init__(
        self,
        lm: RiverLM,
        task: GenerationTask,
        *,
        model_name: str,
        directory: Path | None = None,
        shots: int | None = None,
        limit: int | None = None,
        chat: bool | None = None,
        new_tokens: int | None = None,
        allow_code_execution: bool = False,
    ) -> None:
        """Read the items, and see that their answers can be scored.

        Raises:
            ConfigError: the task runs programs that the model wrote and that isn't allowed; the
                model has no chat template; and see `read_examples`.
            DataError, MissingExtraError: see `read_records`, and the task's scorer.
            RiverError: programs can't be confined here.

        Items that can't be scored are left out; `notes` and `identity` say so.
        """
        if task.runs_code and not allow_code_execution:
            raise ConfigError(
                f"{task.name} runs programs that the model wrote; --allow-code-execution lets it, "
                "confined (docs/evaluation.md says how)"
            )
        self.name = task.name
        self._lm, self._task = lm, task
        self._is_chat = task.is_chat and bool(lm.tokenizer.chat_template) if chat is None else chat
        if self._is_chat and not lm.tokenizer.chat_template:
            raise ConfigError("the model has no chat template; leave out --chat")
        if shots is None:
            shots = 0 if self._is_chat else task.shots
        self._new_tokens = task.new_tokens if new_tokens is None else new_tokens
        if self._new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self._new_tokens}; give 1 or more")
        self._records = read_records(task.source, directory)
        self._examples = read_examples(task.examples, directory, shots)[:shots]
        self._scorer = task.make_scorer()
        reasons = [self._scorer.cannot_score(record) for record in self._records]
        can = [item for item, reason in enumerate(reasons) if reason is None]
        if not can:
            raise DataError(f"{task.name}: no item can be scored: {reasons[0]}")
        self.ids = [can[place] for place in select([None] * len(can), limit)]
        lm.forget_cache()  # it may have been filled by another rule
        self.identity = {
            **describe_model(lm, model_name),
            "task": task.name,
            "data": digest(self._records),
            "form": "chat" if self._is_chat else "text",
            "shots": shots,
            "examples": digest(self._examples),
            "max_new_tokens": self._new_tokens,
            "sampling": "greedy",
        }
        self.notes = []
        if len(can) < len(reasons):
            self.identity["left_out"] = len(reasons) - len(can)
            reason = next(reason for reason in reasons if reason is not None)
            self.notes.append(
                f"{task.name}: {len(reasons) - len(can)} items are left out: {reason}"
            )
        if task.runs_code:
            self.identity["isolation"] = check_confinement()

    def answer(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        records = [self._records[item] for item in ids]
        results = self._generate([self._prompt(record) for record in records])
        return [self._record(*pair) for pair in zip(records, results, strict=True)]

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        summary = summarise_verdicts(records, self._lm.engine.num_layers)
        for name in ("time_to_first_token", "decode_tokens_per_second"):
            values = [record[name] for record in records if record[name] is not None]
            summary[f"median_{name}"] = median(values) if values else None
        summary["prompt_tokens"] = sum(record["prompt_tokens"] for record in records)
        summary["cut_short"] = sum(r["finish_reason"] in ("length", "context") for r in records)
        return summary

    def prompt_tokens(self, item: int) -> list[int]:
        """The token ids that an item is asked by."""
        prompt = self._prompt(self._records[item])
        return list(encode_prompt(self._lm.tokenizer, prompt, not self._is_chat))

    def _generate(self, prompts: list[Prompt]) -> list[GenerationResult]:
        lm, is_raw = self._lm, not self._is_chat
        encoded = [encode_prompt(lm.tokenizer, prompt, is_raw) for prompt in prompts]
        stop = () if self._is_chat else self._task.stop
        room = lm.engine.context_length
        fits = room is None or max(map(len, encoded)) + self._new_tokens <= room
        if len(prompts) > 1 and fits:  # else the longest would cut the others short
            return lm.generate_batch(
                prompts, raw=is_raw, max_new_tokens=self._new_tokens, stop=stop
            )
        sampling = SamplingConfig(max_new_tokens=self._new_tokens, stop=stop)
        # the prompt that leaves as a whole has to run as a whole
        reuse = lm.policy.prefill != "sequence"
        results = []
        for token_ids in encoded:
            responses = list(lm.stream_tokens(token_ids, sampling, reuse_cache=reuse))
            results.append(GenerationResult.of(lm.engine, responses, len(token_ids)))
        return results

    def _record(self, record: Record, result: GenerationResult) -> dict[str, Any]:
        verdict = self._scorer.score(record, result.text, self._is_chat)
        return {
            "prediction": verdict.prediction,
            "correct": verdict.correct,
            "metrics": verdict.metrics,
            "answer": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "time_to_first_token": result.time_to_first_token,
            "decode_tokens_per_second": result.decode_tokens_per_second,
            "tokens": len(result.tokens),
            "exit_layers": count_layers(result.exit_layers),
            **verdict.details,
        }

    def _prompt(self, record: Record) -> Prompt:
        task = self._task
        solved = [(example, self._solution(example)) for example in self._examples]
        if not self._is_chat:
            examples = "".join(f"{task.prompt(one)}{answer}\n\n" for one, answer in solved)
            return examples + task.prompt(record)
        messages = []
        for example, answer in solved:
            messages.append({"role": "user", "content": task.request(example)})
            messages.append({"role": "assistant", "content": answer.strip()})
        return [*messages, {"role": "user", "content": task.request(record)}]

    def _solution(self, example: Record) -> str:
        assert self._task.solution is not None
        return self._task.solution(example)
