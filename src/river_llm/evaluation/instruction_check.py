"""Whether an answer follows IFEval's instructions, by the checker that comes with `lm-eval`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from river_llm.errors import DataError
from river_llm.evaluation.extras import import_extra

# Instructions whose check splits a text into sentences.
_SENTENCES = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


@dataclass(frozen=True, slots=True)
class InstructionScore:
    """One answer's score (Zhou et al. 2023).

    Attributes:
        strict, loose: for each instruction, whether it is followed to the letter, and whether it
            is once markdown and the first or last line are left out.
    """

    strict: list[bool]
    loose: list[bool]


class InstructionChecker:
    """Checks answers to IFEval's prompts.

    Raises:
        MissingExtraError: `lm-eval`, or a package that its IFEval needs, is not installed.
    """

    def __init__(self) -> None:
        nowhere = io.StringIO()  # it tells of its download
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            self._checker = import_extra("lm_eval.tasks.ifeval.utils", "the score of ifeval")
        try:
            import_extra("nltk", "the score of ifeval").data.find("tokenizers/punkt_tab")
            self._has_sentences = True
        except LookupError:
            self._has_sentences = False

    def cannot_check(self, item: Mapping[str, Any]) -> str | None:
        """Why an item can't be checked: NLTK's rules of where sentences end are not there, which
        come by a download of their own; None where it can."""
        asked = item.get("instruction_id_list")
        if self._has_sentences or not isinstance(asked, list) or _SENTENCES.isdisjoint(asked):
            return None
        return "NLTK's punkt_tab is not there; python -m nltk.downloader punkt_tab gets it"

    def score(self, item: Mapping[str, Any], answer: str) -> InstructionScore:
        """Score the answer to one prompt.

        Args:
            item: IFEval's own record: key, prompt, instruction_id_list, kwargs.

        Raises:
            DataError: there is no such instruction, or its arguments are wrong.
        """
        try:
            result = self._checker.process_results(item, [answer])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            detail = " ".join(str(error).split())[:120]
            raise DataError(
                f"ifeval's item {item.get('key')} can't be checked: {detail}"
            ) from error
        return InstructionScore(
            strict=[bool(value) for value in result["inst_level_strict_acc"]],
            loose=[bool(value) for value in result["inst_level_loose_acc"]],
        )
