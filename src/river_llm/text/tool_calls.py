"""Tool calls in an assistant's messages, in the forms that chat templates want them.

Some templates write their arguments as an object and some as JSON, some want an empty content
beside them and some none; what they aren't made for they write as Python does, or leave out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from river_llm.errors import ConfigError

_Message = dict[str, Any]
_EMPTY: tuple[Any, ...] = ("", [{"type": "text", "text": ""}])


def has_calls(message: Mapping[str, Any]) -> bool:
    """Whether it is an assistant's message that calls tools."""
    return message.get("role") == "assistant" and bool(message.get("tool_calls"))


def checked_calls(message: _Message) -> _Message:
    """A message with its tool calls, whose arguments are JSON.

    Raises:
        ConfigError: they are malformed.
    """
    calls = message["tool_calls"]
    for call in calls if isinstance(calls, list | tuple) else [None]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError(
                'tool_calls of a message must be a list of {"type": "function", "function": '
                '{"name": ..., "arguments": ...}}'
            )
    try:
        return _changed(message, "arguments", _as_json)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the arguments of a tool call are no JSON: {error}") from error


def forms_of_calls(messages: Sequence[_Message]) -> Iterator[list[_Message]]:
    """The messages, as checked, with their tool calls in one form after the other."""
    called = [_changed(one, "arguments", _as_object) if has_calls(one) else one for one in messages]
    for chat in (called, messages):
        yield list(chat)
        yield [
            {**one, "content": None} if has_calls(one) and one["content"] in _EMPTY else one
            for one in chat
        ]


def renamed_calls(messages: Sequence[_Message]) -> tuple[list[_Message], list[str]]:
    """The messages with other names of what they call, and these names, which no text has."""
    names: list[str] = []

    def other(name: str) -> str:
        names.append(f"{name}_river_llm_{len(names)}_")
        return names[-1]

    return [_changed(one, "name", other) if has_calls(one) else one for one in messages], names


def arguments_of_calls(messages: Sequence[_Message]) -> list[Any]:
    """The arguments of all of their tool calls."""
    found: list[Any] = []
    for message in filter(has_calls, messages):
        _changed(message, "arguments", found.append)
    return found


def _changed(message: _Message, key: str, change: Callable[[Any], Any]) -> _Message:
    """A message with what its calls have under a key changed."""
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        changed = {**function, key: change(function[key])} if key in function else function
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        read = json.loads(arguments)
    except ValueError:
        return arguments
    return read if isinstance(read, dict) else arguments


def _as_json(arguments: Any) -> Any:
    is_object = isinstance(arguments, Mapping)
    return json.dumps(arguments, ensure_ascii=False) if is_object else arguments
