"""Text to tokens and, while they come, tokens to text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from river_llm.errors import ConfigError
from river_llm.settings import is_whole_number
from river_llm.text.chat_template import Message, check_encodable, encode_messages
from river_llm.text.control_tokens import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IncrementalDecoder",
    "Message",
    "Prompt",
    "behind_front",
    "encode_prompt",
    "encode_text",
    "warn_of_unusable_tokens",
]

Prompt = str | Sequence[Message]

_OF_OTHER_INPUTS = re.compile(r"image|img|vision|video|audio|speech", re.IGNORECASE)
_UNFINISHED = "\ufffd"  # what a tokeniser decodes the first bytes of a character to
_FIRST_HIDDEN = 0xD800  # lone surrogates, which no decoded text has

_log = logging.getLogger(__name__)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    raw: bool = False,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The prompt's tokens, as many as it takes.

    A string given to a model with a chat template is a user's message, unless `raw`; messages
    always go through the template. There what spells a control token in a message is text, unless
    `allow_control_tokens`; in a raw prompt it is the control token.

    Args:
        chat_template_kwargs: further variables that the chat template reads, such as
            ``{"enable_thinking": False}``.

    Raises:
        ConfigError: the prompt is neither a string nor messages, is empty or has lone surrogates,
            which are no text; there are messages but no chat template, or it can't take them; it
            doesn't read an argument, or a raw prompt has some.
    """
    _check_is_prompt(prompt)
    if not prompt or (isinstance(prompt, str) and not prompt.strip() and not raw):
        raise ConfigError("the prompt is empty; give some text")
    if isinstance(prompt, str) and (raw or not tokenizer.chat_template):
        if chat_template_kwargs:
            raise ConfigError(
                "the prompt goes through no chat template, because it is raw or the model has "
                "none; leave chat_template_kwargs out"
            )
        check_encodable(prompt)
        token_ids = encode_text(tokenizer, prompt)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        token_ids = encode_messages(tokenizer, messages, chat_template_kwargs, allow_control_tokens)
    if not token_ids:
        raise ConfigError("the prompt is empty; give some text")
    return token_ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, behind those that the tokenizer puts in front of one."""
    own = tokenizer(text, add_special_tokens=False).input_ids
    return behind_front(tokenizer, text, list(own))


def behind_front(tokenizer: PreTrainedTokenizerBase, text: str, own: list[int]) -> list[int]:
    """A text's own tokens, behind those that the tokenizer puts in front of it, unless it begins
    with them already, as what a chat template has written does.

    Tokens that the tokenizer puts behind a text are left out: they say that it has ended, and here
    it goes on.
    """
    if not tokenizer.num_special_tokens_to_add():
        return own
    plain = list(tokenizer(text, add_special_tokens=False).input_ids)
    whole = list(tokenizer(text).input_ids)
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    front = whole[:start]
    return own if own[:start] == front else [*front, *own]


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


def warn_of_unusable_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Say in one line that a tokenizer has tokens which the model has no embedding for; those that
    stand for images and sounds are none of a text's."""
    if len(tokenizer) <= vocab_size:
        return
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda token: token[1])
    beyond = [token for token, index in added if index >= vocab_size]
    if beyond and all(map(_OF_OTHER_INPUTS.search, beyond)):
        return
    _log.warning(
        "the tokenizer has %d tokens and the model's embedding %d rows: a text with one of the "
        "others%s can't be read; take the model's own tokenizer, or resize the embedding "
        "(resize_token_embeddings)",
        len(tokenizer),
        vocab_size,
        f" ({beyond[0]})" if beyond else "",
    )


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
        # any other special token stands as one character that is taken out of the text again
        special = _special_tokens_in(tokenizer, stop)
        spelled = {text: token for text, token in special.items() if token not in self._markers}
        self._hidden = {token: chr(_FIRST_HIDDEN + i) for i, token in enumerate(spelled.values())}
        hidden_stops = [_replaced(text, spelled, self._hidden) for text in stop]
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


def _special_tokens_in(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> dict[str, int]:
    """Special tokens that stop strings spell, the longest first."""
    if not stop:
        return {}
    added = tokenizer.added_tokens_decoder.items()
    texts = {str(token): token_id for token_id, token in added if token.special}
    spelled = [text for text in texts if any(text in one for one in stop)]
    return {text: texts[text] for text in sorted(spelled, key=len, reverse=True)}


def _replaced(text: str, spelled: Mapping[str, int], hidden: Mapping[int, str]) -> str:
    """A stop string with each special token as one character."""
    for special, token in spelled.items():
        text = text.replace(special, hidden[token])
    return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
