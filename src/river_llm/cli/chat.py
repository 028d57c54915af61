"""`river-llm chat`: a conversation in the terminal."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from river_llm.cli import options
from river_llm.cli.loading import check_mode, load, saved_or_new
from river_llm.cli.prompt_cache import PromptCache, check_prompt_cache
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import check_stdin, stdin_lines
from river_llm.cli.usage import check_text, is_text
from river_llm.config import (
    DEFAULT_MODEL,
    ChatConfig,
    DraftConfig,
    EngineConfig,
    PolicyConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.errors import ConfigError, ContextFullError

if TYPE_CHECKING:
    from river_llm.conversation import Conversation
    from river_llm.lm import RiverLM

_HELP = "/clear starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_SAMPLING = SamplingConfig(max_new_tokens=512)
_COMMAND = re.compile(r"/[a-z]+", re.IGNORECASE)  # not /usr/bin, and not /tmp in a sentence


@with_settings
def chat(
    policy: PolicyConfig,
    drafts: DraftConfig,
    template: ChatConfig,
    config: RiverConfig,
    engine: EngineConfig,
    sampling: SamplingConfig = _SAMPLING,
    model: options.Model = DEFAULT_MODEL,
    river: options.RiverPath = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    prompt_cache: options.PromptCacheFile = None,
) -> None:
    """Talk with a model; its KV cache is kept from turn to turn."""
    if system is not None:
        check_text("--system", system)
    check_stdin()
    check_mode(policy, engine, drafts)
    check_prompt_cache(prompt_cache, policy)
    lm, _ = load(model, saved_or_new(river, config), policy.exit_policy(), engine, drafts)
    if not lm.tokenizer.chat_template:
        raise ConfigError(f"{model} has no chat template; use river-llm generate --raw")
    cache = None if prompt_cache is None else PromptCache(prompt_cache, lm)
    _converse(lm, cache, system, sampling, drafts, template)


def _converse(
    lm: RiverLM,
    cache: PromptCache | None,
    system: str | None,
    sampling: SamplingConfig,
    drafts: DraftConfig,
    template: ChatConfig,
) -> None:
    from river_llm.cli import render
    from river_llm.conversation import Conversation

    def begin() -> Conversation:
        return Conversation(
            lm,
            system,
            drafts=drafts if lm.policy is None else None,
            chat_template_kwargs=template.chat_template_kwargs,
            allow_control_tokens=template.allow_control_tokens,
            **asdict(sampling),
        )

    conversation = begin()  # says what the template can't take
    render.stderr.print(_HELP)
    for text in stdin_lines():
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            conversation = begin()
        elif _COMMAND.fullmatch(command):
            render.stderr.print(f"unknown command {command}; {_HELP}")
        elif not is_text(text) or "\0" in text:
            render.stderr.print("this line is no UTF-8 text; it is left out, type it again")
        elif command:
            _reply(lm, cache, conversation, text)


def _reply(lm: RiverLM, cache: PromptCache | None, conversation: Conversation, text: str) -> None:
    from river_llm.cli import render
    from river_llm.generate import GenerationResult

    responses = []
    try:
        for response in conversation.stream(text):
            responses.append(response)
            if cache is not None:
                cache.note_use(response)
            render.print_response(response, lm.engine.num_layers)
    except KeyboardInterrupt:
        pass
    except ContextFullError as error:
        render.stderr.print(f"{error}; /clear starts a new conversation")
        return
    render.stdout.print()
    if responses:
        result = GenerationResult.of(lm.engine, responses, responses[-1].prompt_tokens, lm.policy)
        render.print_statistics(result)
        if cache is not None:
            cache.keep(result.prompt_tokens)
