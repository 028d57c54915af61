"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from river_llm.text.control_tokens import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokeniser decodes the first bytes of a character to
_FIRST_HIDDEN = 0xD800  # lone surrogates, which no decoded text has


class IncrementalDecoder:
    """Tokens to text, one at a time, holding back what isn't certain yet.

    Held back are the first bytes of a character that isn't whole, and whatever may turn out to be
    the beginning of a stop string. Once a stop string is whole, `stopped` is true and the text ends
    before it. Special tokens give no text, but stop strings that spell them are found; markers of
    reasoning and of tools (`ControlTokens.markers`) give their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._markers = ControlTokens.of(tokenizer).markers
        # any other special token that a stop string spells stands as one hidden character
        added = tokenizer.added_tokens_decoder.items() if stop else ()
        spelled = {
            str(token): token_id
            for token_id, token in added
            if token.special
            and token_id not in self._markers
            and any(str(token) in s for s in stop)
        }
        longest_first = sorted(spelled, key=len, reverse=True)
        self._hidden = {
            spelled[text]: chr(_FIRST_HIDDEN + i) for i, text in enumerate(longest_first)
        }
        hidden_stops = list(stop)
        for text in longest_first:
            hidden = self._hidden[spelled[text]]
            hidden_stops = [one.replace(text, hidden) for one in hidden_stops]
        self._stop = tuple(dict.fromkeys([*stop, *hidden_stops]))
        self._token_ids: list[int] = []
        self._context_start = 0  # tokens before are only there to be counted
        self._decoded_end = 0  # tokens before have given their text
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come; may be empty."""
        spelling = self._markers.get(token) or self._hidden.get(token)
        if spelling is not None:
            return self._release(self._undecoded() + spelling)
        self._token_ids.append(token)
        # A token's text depends on its neighbours, so decode with the last ones before it.
        before = self._decode(self._token_ids[self._context_start : self._decoded_end])
        text = self._decode(self._token_ids[self._context_start :])
        if text.endswith(_UNFINISHED) or text == before:  # no whole character, or a special token
            return ""
        self._context_start, self._decoded_end = self._decoded_end, len(self._token_ids)
        return self._release(text[len(before) :])

    def end_with(self, token: int) -> str:
        """The text that was still held back when a token came that ends the answer, and has no
        text itself."""
        return (self.add(token) if token in self._hidden else "") + self.finish()

    def finish(self) -> str:
        """The text that was still held back when the tokens ended."""
        if self.stopped:
            return ""
        text = self._release(self._undecoded())
        if not self.stopped:
            text += self._shown(self._held)
        self._held = ""
        return text

    def _undecoded(self) -> str:
        """The text of the last tokens, as far as they have given none yet."""
        before = self._decode(self._token_ids[self._context_start : self._decoded_end])
        rest = self._decode(self._token_ids[self._context_start :])[len(before) :]
        if rest:
            self._context_start, self._decoded_end = self._decoded_end, len(self._token_ids)
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(index + len(s), index) for s in self._stop if (index := text.find(s)) >= 0]
        if found:  # the one that is whole first, so that the borders of tokens don't matter
            self.stopped = True
            self._held = ""
            return self._shown(text[: min(found)[1]])
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return self._shown(text[: len(text) - held])

    def _shown(self, text: str) -> str:
        for character in self._hidden.values():
            text = text.replace(character, "")
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
