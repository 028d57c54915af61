"""`river-llm chat`: a conversation in the terminal."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import LoadOptions, load
from river_llm.cli.prompt_cache import PromptCache, check_prompt_cache
from river_llm.cli.settings import (
    draft_config,
    exit_policy,
    offload_config,
    river_config,
    sampling_config,
    template_variables,
)
from river_llm.cli.streams import StdinLines, check_stdin
from river_llm.cli.usage import check_text, is_text
from river_llm.errors import ConfigError, ContextFullError, InterruptedRunError, PromptCacheError

if TYPE_CHECKING:
    from river_llm.conversation import Conversation
    from river_llm.lm import RiverLM

_HELP = "/clear starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[a-z]+", re.IGNORECASE)  # not /usr/bin, and not /tmp in a sentence


def chat(
    model: options.Model = "smollm2",
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    policy: options.Policy = None,
    threshold: options.Threshold = None,
    exit_layer: options.ExitLayer = None,
    first_layer: options.FirstLayer = 1,
    prefill: options.Prefill = None,
    draft_tokens: options.DraftTokens = None,
    draft_exit_layer: options.DraftExitLayer = None,
    draft_lm_head_bits: options.DraftHead = None,
    ngram: options.Ngram = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    allow_control_tokens: options.AllowControlTokens = False,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    engine: options.Engine = options.EngineName.auto,
    backbone_bits: options.BackboneBits = options.WeightBits.sixteen,
    lm_head_bits: options.HeadBits = options.WeightBits.sixteen,
    kv_bits: options.KvBits = options.WeightBits.sixteen,
    offload: options.Offload = None,
    no_miss: options.NoMiss = False,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_cache: options.PromptCacheFile = None,
) -> None:
    """Talk with a model; its KV cache is kept from turn to turn."""
    if system is not None:
        check_text("--system", system)
    check_stdin()
    chosen = exit_policy(policy, threshold, exit_layer, first_layer, prefill)
    drafts = draft_config(chosen, draft_tokens, draft_exit_layer, draft_lm_head_bits, ngram)
    built = river_config(river, bits, group_size, quantizer)
    loading = LoadOptions(
        model=model,
        river=built,
        policy=chosen,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        engine=engine,
        backbone_bits=backbone_bits,
        lm_head_bits=lm_head_bits,
        kv_bits=kv_bits,
        drafts=drafts,
        offload=offload_config(offload, no_miss, chosen),
    )
    check_prompt_cache(prompt_cache, chosen)
    sampling = sampling_config(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    variables = template_variables(chat_template_kwargs)
    lm = load(loading)
    if not lm.tokenizer.chat_template:
        raise ConfigError(f"{model} has no chat template; use river-llm generate --raw")
    settings: dict[str, Any] = {
        **asdict(sampling),
        "drafts": drafts,
        "chat_template_kwargs": variables,
        "allow_control_tokens": allow_control_tokens,
    }
    cache = None if prompt_cache is None else PromptCache(prompt_cache, lm)
    _converse(lm, cache, system, settings)


def _converse(
    lm: RiverLM, cache: PromptCache | None, system: str | None, settings: dict[str, Any]
) -> None:
    from river_llm.cli import render
    from river_llm.conversation import Conversation

    lines = StdinLines()
    conversation = Conversation(lm, system, **settings)  # says what the template can't take
    render.stderr.print(_HELP)
    while (text := _read_line(lines)) is not None:
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            conversation = Conversation(lm, system, **settings)
        elif _COMMAND.fullmatch(command):
            render.stderr.print(f"unknown command {command}; {_HELP}")
        elif not is_text(text):
            render.stderr.print("this line is no UTF-8 text; it is left out, type it again")
        elif command:
            _reply(lm, cache, conversation, text)


def _read_line(lines: StdinLines) -> str | None:
    """The next line the user types; None at the end of the input or on Ctrl-C.

    Raises:
        typer.Exit: stdin can't be read.
    """
    try:
        return lines.read()
    except (EOFError, KeyboardInterrupt):
        return None


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
        prompt_tokens = responses[-1].prompt_tokens
        result = GenerationResult.of(lm.engine, responses, prompt_tokens, lm.policy)
        if result.lossless is not None:
            render.stderr.print(render.lossless_line(result.lossless), style="dim")
        render.stderr.print(render.statistics_line(result), style="dim")
        if cache is not None:
            try:
                cache.keep(result.prompt_tokens)
            except (PromptCacheError, InterruptedRunError) as error:
                render.stderr.print(str(error))
