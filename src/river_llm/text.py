"""Text to tokens and, while they come, tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from river_llm.config import is_whole_number
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]

_WANTED_MESSAGES = 'messages must be a list of {"role": ..., "content": ...}, both of them strings'
_UNFINISHED = "\ufffd"  # what a tokeniser decodes the first bytes of a character to


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, raw: bool = False
) -> list[int]:
    """The prompt's tokens, as many as it takes.

    A string given to a model with a chat template is a user's message, unless `raw`; messages
    always go through the template.

    Raises:
        ConfigError: the prompt is neither a string nor messages, is empty or has lone surrogates,
            which are no text, or there are messages but no chat template.
    """
    _check_is_prompt(prompt)
    if not prompt or (isinstance(prompt, str) and not prompt.strip() and not raw):
        raise ConfigError("the prompt is empty; give some text")
    has_template = bool(tokenizer.chat_template)
    if isinstance(prompt, str) and (raw or not has_template):
        _check_encodable(prompt)
        token_ids = list(tokenizer(prompt).input_ids)
    else:
        if not has_template:
            raise ConfigError("the model has no chat template; give the prompt as one string")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for message in messages:
            _check_is_message(message)
        for message in messages:
            _check_encodable(message["content"])
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True
            )
        except (KeyError, TypeError, AttributeError, ValueError, TemplateError) as error:
            raise ConfigError(
                f"{_WANTED_MESSAGES} that the chat template takes ({error})"
            ) from error
        token_ids = list(encoded["input_ids"])
    if not token_ids:
        raise ConfigError("the prompt is empty; give some text")
    return token_ids


def _check_is_prompt(prompt: object) -> None:
    if not isinstance(prompt, str | list | tuple):
        raise ConfigError(
            f"the prompt is of type {type(prompt).__name__}; give a string, or a list of messages "
            '{"role": ..., "content": ...}'
        )
    if prompt and not isinstance(prompt, str) and all(map(is_whole_number, prompt)):
        raise ConfigError(
            "the prompt is a list of token ids; give its text, or give them to stream_tokens"
        )


def _check_is_message(message: object) -> None:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(message, dict) and isinstance(content, list | tuple):
        raise ConfigError(
            "the content of a message is a list of parts, and only text is taken; join their texts "
            "to one string"
        )
    if not isinstance(message, dict) or not all(
        isinstance(value, str) for value in (message.get("role"), content)
    ):
        raise ConfigError(_WANTED_MESSAGES)


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is no text, character {error.start} is half of a surrogate pair; "
            "read it as UTF-8"
        ) from error


class IncrementalDecoder:
    """Tokens to text, one at a time, holding back what isn't certain yet.

    Held back are the first bytes of a character that isn't whole, and whatever may turn out to be
    the beginning of a stop string. Once a stop string is whole, `stopped` is true and the text ends
    before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._context_start = 0  # tokens before are only there to be counted
        self._decoded_end = 0  # tokens before have given their text
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come; may be empty."""
        self._token_ids.append(token)
        # A token's text depends on its neighbours, so decode with the last ones before it.
        before = self._decode(self._token_ids[self._context_start : self._decoded_end])
        text = self._decode(self._token_ids[self._context_start :])
        if text.endswith(_UNFINISHED) or text == before:  # no whole character, or a special token
            return ""
        self._context_start, self._decoded_end = self._decoded_end, len(self._token_ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """The text that was still held back when the tokens ended."""
        if self.stopped:
            return ""
        before = self._decode(self._token_ids[self._context_start : self._decoded_end])
        rest = self._decode(self._token_ids[self._context_start :])[len(before) :]
        self._context_start = self._decoded_end = len(self._token_ids)
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(index + len(s), index) for s in self._stop if (index := text.find(s)) >= 0]
        if found:  # the one that is whole first, so that the borders of tokens don't matter
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
