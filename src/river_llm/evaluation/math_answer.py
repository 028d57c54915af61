"""Whether two mathematical answers are equal, by `math-verify`."""

from __future__ import annotations

import logging
import threading

from river_llm.evaluation.extras import import_extra

_SECONDS = 5  # for one answer; some expressions take for ever to simplify


class MathVerifier:
    """Compares answers in LaTeX or plain text with the right one.

    Raises:
        MissingExtraError: `math-verify` is not installed.
    """

    def __init__(self) -> None:
        self._library = import_extra("math_verify", "the score of math500")
        for name in ("math_verify.parser", "math_verify.grader"):  # they log what they can't parse
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def extract(self, text: str) -> str | None:
        """The answer that a text comes to, the last boxed one first; None where there is none."""
        parsed = self._parse(_last_boxed(text))
        return str(parsed[-1]) if parsed else None

    def is_right(self, text: str, answer: str) -> bool:
        """Whether a text comes to `answer`, which is LaTeX without dollar signs."""
        expected = self._parse(f"${answer}$") or [answer]
        found = self._parse(_last_boxed(text))
        return bool(found) and bool(
            self._library.verify(expected, found, timeout_seconds=_time_limit())
        )

    def _parse(self, text: str) -> list[object]:
        parsed: list[object] = self._library.parse(text, parsing_timeout=_time_limit())
        return parsed


def _last_boxed(text: str) -> str:
    """The last ``\\boxed{...}`` of a text; all of it where there is none that is whole."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return f"${text[start : place + 1]}$"
    return text


def _time_limit() -> int | None:
    """The library's clock is a signal, which only the main thread takes."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
