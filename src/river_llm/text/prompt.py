"""A prompt to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from river_llm.errors import ConfigError
from river_llm.text.chat_template import Message, check_encodable, encode_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Message", "Prompt", "encode_prompt", "encode_text"]

Prompt = str | Sequence[Message]


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
    if not isinstance(prompt, str | list | tuple):
        raise ConfigError(
            f"the prompt is of type {type(prompt).__name__}; give a string, or a list of messages "
            '{"role": ..., "content": ...}'
        )
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
    """The tokens of a text, behind those that the tokenizer puts in front of one, unless it begins
    with them already, as what a chat template has written does.

    Tokens that the tokenizer puts behind a text are left out: they say that it has ended, and here
    it goes on.
    """
    own = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not tokenizer.num_special_tokens_to_add():
        return own
    whole = list(tokenizer(text).input_ids)
    starts = range(len(whole) - len(own) + 1)
    start = next((i for i in starts if whole[i : i + len(own)] == own), 0)
    return own if own[:start] == whole[:start] else [*whole[:start], *own]
