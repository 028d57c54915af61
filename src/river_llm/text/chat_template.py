"""Messages to the text that the model knows, by its chat template.

Templates differ in what they take: some know no system message, some want a content in parts, and
what they don't know they leave out without a word. So messages are rendered in one form after the
other (`_FORMS`) until one keeps the content of every message.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from transformers.utils.chat_template_utils import _compile_jinja_template

from river_llm.errors import ConfigError
from river_llm.text.control_tokens import MARKS, ControlTokens, unused_mark
from river_llm.text.tool_calls import (
    arguments_of_calls,
    checked_calls,
    forms_of_calls,
    has_calls,
    renamed_calls,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # {"role": "user", "content": "..."}

_WANTED = (
    'messages must be a list of {"role": ..., "content": ...}; a role is a string, a content too, '
    'or a list of {"type": "text", "text": ...}'
)
_OWN_VARIABLES = {"messages", "add_generation_prompt"}
_Rank = tuple[bool, bool, bool]
# (the system's text goes in front of the first user message, contents are lists of one part)
_FORMS = ((False, False), (False, True), (True, False), (True, True))

_log = logging.getLogger(__name__)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The tokens of messages, and of the beginning of the answer to them.

    Args:
        messages: their contents are strings, or lists of ``{"type": "text", "text": ...}``; an
            assistant's with ``tool_calls``, in OpenAI's form, needs none.
        chat_template_kwargs: further variables that the template reads.
        allow_control_tokens: what spells a control token in a message is one.

    Raises:
        ConfigError: see `render_messages`.
    """
    rendering, mark = render_messages(
        tokenizer, messages, chat_template_kwargs, allow_control_tokens
    )
    if mark is None:
        return list(tokenizer(rendering, add_special_tokens=False).input_ids)
    return ControlTokens.of(tokenizer).encode(tokenizer, rendering, mark)


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> tuple[str, str | None]:
    """Messages as the template writes them; arguments as of `encode_messages`.

    Args:
        add_generation_prompt: write the beginning of an answer behind the messages.
        continue_final_message: the last message is the beginning of the answer, and stays open.

    Returns:
        The text, and the mark in what spells a control token without being one (`ControlTokens`);
        None where nothing does.

    Raises:
        ConfigError: a message is malformed, the template can't take the messages, leaves one out or
            doesn't read an argument, or there is no template.
    """
    given = dict(chat_template_kwargs or {})
    template = _template(tokenizer, given)
    _check_arguments(tokenizer, template, given)
    chat = [_checked(message) for message in messages]
    mark = None
    if not allow_control_tokens:
        mark = unused_mark(chat, given)
        control = ControlTokens.of(tokenizer)
        marked = [_marked(control, one, mark) for one in chat]
        marked_arguments = {
            name: value if name in tokenizer.special_tokens_map else control.mark(value, mark)
            for name, value in given.items()
        }
        if (marked, marked_arguments) == (chat, given):
            mark = None
        chat, given = marked, marked_arguments
    given["add_generation_prompt"] = add_generation_prompt
    given["continue_final_message"] = continue_final_message
    return _Template(tokenizer, given).render(chat), mark


class _Template:
    """A tokenizer's chat template with its arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments

    def render(self, messages: Sequence[Message]) -> str:
        """The messages in the first of the forms that keeps all of them.

        Raises:
            ConfigError: there is none.
        """
        refusals: list[tuple[_Rank, ConfigError]] = []
        incomplete: list[tuple[list[int], list[Message], str]] = []
        for moves_system, in_parts in _FORMS:
            moved = _system_moved(messages) if moves_system else messages
            if moved is None:
                continue
            chat = [_with_text(one, _text(one), in_parts) for one in moved]
            try:
                chat, rendering = self._with_calls(chat)
                lost = self._without_trace(chat)
            except ConfigError as error:
                is_its_own = type(error.__cause__) is TemplateError  # of raise_exception
                refusals.append(((is_its_own, moves_system, not in_parts), error))
                continue
            if not lost:
                if moves_system:
                    _say_system_is_moved(str(self._tokenizer.chat_template))
                return rendering
            incomplete.append((lost, chat, rendering))
        if not incomplete:
            raise max(refusals, key=lambda refusal: refusal[0])[1]
        lost, chat, rendering = min(incomplete, key=lambda found: len(found[0]))
        for place in lost:  # a template may look at a content and write something else
            others = list(chat)
            others[place] = _with_text(chat[place], "something else")
            if self._render(others) == rendering:
                number = place + 1 + len(messages) - len(chat)
                raise ConfigError(
                    f"the chat template leaves out message {number} of {len(messages)} (role "
                    f"{chat[place]['role']!r}); put its text into a user message, or leave it out"
                )
        return rendering

    def _with_calls(self, messages: list[Message]) -> tuple[list[Message], str]:
        """The messages with their tool calls as the template wants them, and the text.

        Raises:
            ConfigError: the template takes them in no form, or leaves one out.
        """
        if not any(map(has_calls, messages)):
            return messages, self._render(messages)
        refusal = ConfigError(
            "the chat template leaves out the tool calls of a message (role 'assistant'); put them "
            "into its text, or leave them out"
        )
        for chat in forms_of_calls(messages):
            renamed, names = renamed_calls(chat)
            try:
                rendering = self._render(chat)
                renaming = self._render(renamed)
            except ConfigError as error:
                refusal = error
                continue
            arguments = [one for one in arguments_of_calls(chat) if one and isinstance(one, dict)]
            is_python = any(str(one) in rendering for one in arguments)
            if all(name in renaming for name in names) and not is_python:
                return chat, rendering
        raise refusal

    def _without_trace(self, messages: Sequence[Message]) -> list[int]:
        """The places of messages whose contents can't be found in the rendering."""
        texts = [_text(one) for one in messages]
        probes = [f"{MARKS[-2]}{place}{MARKS[-1]}" for place in range(len(messages))]
        probed = [
            _with_text(one, text + probe) if text else one
            for one, text, probe in zip(messages, texts, probes, strict=True)
        ]
        rendering = self._render(probed)
        return [i for i, p in enumerate(probes) if p not in rendering and texts[i].strip()]

    def _render(self, messages: Sequence[Message]) -> str:
        given = {"tokenize": False, **self._arguments}
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), **given))
        except Exception as error:  # a template is a program, and can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the chat template refuses the messages: {reason}") from error


def _template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """The template that serves, where a tokenizer has several.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the model has no chat template; give the prompt as one string")
    try:
        template: str = tokenizer.get_chat_template(None, arguments.get("tools"))
        _compile_jinja_template(template)
    except (TemplateError, ValueError) as error:  # it is broken, or none of several is the default
        raise ConfigError(
            f"the model's chat template can't be used ({' '.join(str(error).split())}); get the "
            "model's own chat_template.jinja, or give the prompt raw"
        ) from error
    return template


def _check_arguments(
    tokenizer: PreTrainedTokenizerBase, template: str, arguments: Mapping[str, Any]
) -> None:
    """Validate that the template reads them.

    Raises:
        ConfigError: it doesn't read one.
    """
    if not arguments:
        return
    environment = _compile_jinja_template(template).environment
    read = find_undeclared_variables(environment.parse(template))
    read -= {*environment.globals, *_OWN_VARIABLES}
    unknown = sorted(map(str, set(arguments) - read))
    if unknown:
        known = ", ".join(sorted(read - set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)))
        raise ConfigError(
            f"chat_template_kwargs: the chat template reads no {unknown[0]!r}; "
            + (f"it reads {known}" if known else "it reads no arguments at all")
        )


def _checked(message: object) -> Message:
    """A message as it was given, its content a string or a list of parts.

    Raises:
        ConfigError: it is no message, or has something else than text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(_WANTED)
    checked: Message = dict(message)
    if has_calls(checked):
        checked = checked_calls(checked)
        check_encodable("".join(map(str, arguments_of_calls([checked]))))
        checked["content"] = checked.get("content") or ""
    content = checked.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise ConfigError(_WANTED)
        checked["content"] = list(content)
    elif not isinstance(content, str):
        raise ConfigError(_WANTED)
    check_encodable(_text(checked))
    return checked


def _marked(control: ControlTokens, message: Message, mark: str) -> Message:
    is_answer = message["role"] == "assistant"
    marked: Message = control.mark(message, mark, is_answer)
    if has_calls(message):  # the template writes the markers around them
        marked["tool_calls"] = control.mark(message["tool_calls"], mark)
    return marked


def check_encodable(text: str) -> None:
    """Validate that a string is text.

    Raises:
        ConfigError: it has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is no text, character {error.start} is half of a surrogate pair; "
            "read it as UTF-8"
        ) from error


def _text(message: Message) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_text(message: Message, text: str, in_parts: bool | None = None) -> Message:
    """The message with another text, as one part or as a string; None: as its content is."""
    if in_parts is None:
        in_parts = isinstance(message["content"], list)
    return {**message, "content": [{"type": "text", "text": text}] if in_parts else text}


def _system_moved(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the text of those of the system, at their beginning, in front of the first
    user message; None where there is nothing to move, or nowhere to."""
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    rest = list(messages[len(system) :])
    if not system or not rest or rest[0]["role"] != "user":
        return None
    text = "\n\n".join(map(_text, [*system, rest[0]]))
    return [_with_text(rest[0], text, False), *rest[1:]]


@lru_cache
def _say_system_is_moved(template: str) -> None:
    """Once for each template: an evaluation or a server would say it for every prompt."""
    _log.warning(
        "the chat template takes no system message; its text goes in front of the first user "
        "message"
    )
