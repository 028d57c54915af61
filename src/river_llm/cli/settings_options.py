"""Options out of settings: a command's parameter of a class of `config` becomes one option for each
of its fields."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Container, Mapping
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from river_llm.cli.usage import usage_error
from river_llm.errors import ConfigError
from river_llm.settings import Settings

ADVANCED = "Advanced"


def with_settings(
    command: Callable[..., None], without: Container[str] = ()
) -> Callable[..., None]:
    """A command for typer, which gets objects where it has parameters of settings classes.

    What a class refuses is wrong usage: one line, exit code 2. A parameter's default is an object
    with other defaults than the class has.

    Args:
        without: fields that get no option.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    of_settings: dict[str, tuple[type[Settings], dict[str, str]]] = {}  # field -> parameter
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and issubclass(hint, Settings)):
            parameters.append(parameter.replace(annotation=hint))
            continue
        base = None if parameter.default is inspect.Parameter.empty else parameter.default
        options = {
            one.name: option_parameter(one, field_type, base)
            for one, field_type in _settable(hint)
            if one.name not in without
        }
        parameters += options.values()
        of_settings[parameter.name] = hint, {name: one.name for name, one in options.items()}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, (kind, options) in of_settings.items():
            values = {field: given.pop(option) for field, option in options.items()}
            for field, value in values.items():
                if isinstance(value, list):
                    values[field] = tuple(value)
            try:
                given[name] = kind.of(values)
            except ConfigError as error:
                raise usage_error(_as_options(str(error), options)) from error
        command(**given)

    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in keywords}
    del run.__wrapped__
    return run


def option_parameter(one: Field[Any], hint: Any, base: Settings | None) -> inspect.Parameter:
    """The option of a field; `base` has its default, if not the class."""
    names = one.metadata["option"] or (_option(one.name),)
    default = one.default if base is None else getattr(base, one.name)
    if hint is bool:
        names = (f"{names[0]}/--no-{names[0][2:]}" if default else names[0],)
    parse: Callable[[Any], Any] | None = None
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
        if any(get_origin(kind) is tuple for kind in kinds):
            hint, default = list[str], [*(default or ())]  # type: ignore[misc]
        elif int in kinds and any(get_origin(kind) is Literal for kind in kinds):
            hint, parse = str, _number_or_word
        elif any(kind is str for kind in kinds):
            hint = str | None
        elif any(get_origin(kind) is Mapping for kind in kinds):
            hint, parse = str | None, _json_object(names[0])
    details = {
        "help": one.metadata["help"].replace("[", "\\["),
        "rich_help_panel": ADVANCED if one.metadata["advanced"] else None,
        "show_default": default not in (None, False, [], ()),
    }
    option = typer.Option(*names, callback=parse, **details)
    return inspect.Parameter(
        names[0].split("/")[0].removeprefix("--").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, option],
    )


def _settable(kind: type[Settings]) -> list[tuple[Field[Any], Any]]:
    """The fields that have an option, with their types."""
    settable = [one for one in fields(kind) if one.metadata["option"] != ("",)]
    namespace = {"LogitsFunction": Callable}  # imports torch, and is no option
    hints = get_type_hints(kind, localns=namespace)
    return [(one, hints[one.name]) for one in settable]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_options(message: str, options: Mapping[str, str]) -> str:
    """An error's settings as options: "top_p is 0" to "--top-p is 0"."""
    words = message.split(" ")
    return " ".join(
        _option(options[word.rstrip(",;:")]) + word[len(word.rstrip(",;:")) :]
        if ("_" in word and word.rstrip(",;:") in options) or (i == 0 and word in options)
        else word
        for i, word in enumerate(words)
    )


def _number_or_word(given: str) -> int | str:
    return int(given) if given.isdecimal() else given


def _json_object(option: str) -> Callable[[str | None], Any]:
    def parse(given: str | None) -> Any:
        if given is None:
            return None
        try:
            value = json.loads(given)
        except ValueError as error:
            raise usage_error(f"{option} is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise usage_error(f"{option} is no JSON object; give {{...}}")
        return value

    return parse
