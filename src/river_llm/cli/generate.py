"""`river-llm generate`: answer one prompt."""

from __future__ import annotations

import secrets
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import LoadOptions, describe_loaded, load
from river_llm.cli.prompt_cache import PromptCache, check_prompt_cache
from river_llm.cli.settings import (
    draft_config,
    exit_policy,
    offload_config,
    river_config,
    sampling_config,
    template_variables,
)
from river_llm.cli.streams import print_json, read_stdin
from river_llm.cli.usage import check_text, usage_error
from river_llm.errors import InterruptedRunError, PromptCacheError, RiverError

if TYPE_CHECKING:
    from river_llm.comparison import VariantResult
    from river_llm.config import DraftConfig, SamplingConfig
    from river_llm.lm import RiverLM


def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help="The prompt, or - to read it from stdin; -- goes before one that begins with -."
        ),
    ],
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
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt to the model without chat template.")
    ] = False,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    allow_control_tokens: options.AllowControlTokens = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Then run backbone, lossless mode, River and full quantisation in turn along the "
            "backbone's own greedy answer: speed, exit depth, agreement.",
        ),
    ] = False,
    prompt_cache: options.PromptCacheFile = None,
    json_output: options.Json = False,
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
) -> None:
    """Answer a prompt; every token in the colour of the layer at which it left the backbone, or in
    lossless mode of what guessed it: green the river, blue the text itself, red nothing."""
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
    if compare and no_miss:
        raise usage_error("--compare runs the whole backbone: leave out --no-miss")
    check_prompt_cache(prompt_cache, chosen)
    if prompt == "-":
        prompt = read_stdin()
    check_text("the prompt", prompt)
    if not prompt.strip():
        raise usage_error("the prompt is empty; give some text, or - to read it from stdin")
    sampling = sampling_config(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    if seed is None and temperature > 0:  # one that can be told
        sampling = replace(sampling, seed=secrets.randbits(32))
    variables = template_variables(chat_template_kwargs)
    if raw and (variables or allow_control_tokens):
        raise usage_error(
            "a raw prompt goes through no chat template, and its control tokens are what they are; "
            "leave --chat-template-kwargs and --allow-control-tokens out"
        )
    lm = load(loading)
    from river_llm.text import encode_prompt

    token_ids = encode_prompt(
        lm.tokenizer,
        prompt,
        raw,
        chat_template_kwargs=variables,
        allow_control_tokens=allow_control_tokens,
    )
    cache = None if prompt_cache is None else PromptCache(prompt_cache, lm)
    settings = {
        **describe_loaded(loading, lm),
        "no_miss": no_miss,
        "raw": raw,
        "chat_template_kwargs": variables,
        "allow_control_tokens": allow_control_tokens,
        "sampling": {key: value for key, value in asdict(sampling).items() if key != "processors"},
    }
    _answer(lm, cache, token_ids, sampling, drafts, compare, json_output, settings)


def _answer(
    lm: RiverLM,
    cache: PromptCache | None,
    token_ids: list[int],
    sampling: SamplingConfig,
    drafts: DraftConfig | None,
    compare: bool,
    json_output: bool,
    settings: dict[str, Any],
) -> None:
    from river_llm.cli import render
    from river_llm.cli.progress import ProgressLines
    from river_llm.generate import GenerationResult

    responses = []
    is_interrupted = False
    lines = ProgressLines("answering")
    if json_output:
        lines.start()
    try:
        for response in lm.stream_tokens(
            token_ids, sampling, reuse_cache=cache is not None, drafts=drafts
        ):
            responses.append(response)
            lines.done, lines.total = len(responses), sampling.max_new_tokens
            if cache is not None:
                cache.note_use(response)
            if not json_output:
                render.print_response(response, lm.engine.num_layers)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        lines.stop()
    result = GenerationResult.of(lm.engine, responses, len(token_ids), lm.policy)
    if not json_output:
        render.stdout.print()
        if result.lossless is not None:
            render.stderr.print(render.lossless_line(result.lossless))
        elif result.tokens:
            render.stderr.print(render.exit_depth_table(result.exit_layers, result.num_layers))
        render.stderr.print(render.statistics_line(result))
    not_kept: RiverError | None = None  # said once the answer is out
    if cache is not None and responses:
        try:
            cache.keep(len(token_ids))
        except PromptCacheError as error:
            not_kept = error
        except InterruptedRunError as error:
            not_kept, is_interrupted = error, True
    variants = None
    if compare and not is_interrupted:
        try:
            variants = _compare(lm, token_ids, sampling.max_new_tokens)
        except KeyboardInterrupt:
            is_interrupted = True
    if json_output:
        output = {**settings, **asdict(result)}
        if variants is not None:
            output["comparison"] = [asdict(variant) for variant in variants]
        print_json(output)
    elif variants is not None:
        render.stdout.print(render.comparison_table(variants, lm.engine.num_layers))
    if compare and is_interrupted:
        before = "" if not_kept is None else f"{not_kept}; "
        raise InterruptedRunError(f"{before}interrupted before the comparison was done")
    if not_kept is not None:
        raise not_kept


def _compare(lm: RiverLM, token_ids: list[int], max_new_tokens: int) -> list[VariantResult] | None:
    """The variants along the backbone's own answer; None if it is too short."""
    from river_llm.cli import render
    from river_llm.cli.progress import LoadingProgress
    from river_llm.comparison import COMPARED, compare_variants
    from river_llm.config import SamplingConfig
    from river_llm.exit_policy import ExitPolicy

    with LoadingProgress("comparing") as progress:
        greedy = SamplingConfig(max_new_tokens=max_new_tokens)
        stream = lm.stream_tokens(token_ids, greedy, policy=ExitPolicy.never())
        answer = [response.token for response in stream]
        if len(answer) < 2:
            render.stderr.print("the backbone's answer is too short to compare along it")
            return None
        river = lm.policy or COMPARED
        variants = {
            "backbone": ExitPolicy.never(),
            "lossless": None,
            f"River, {river.describe()}": river,
            f"full {lm.river_config.bits}-bit": ExitPolicy.always(),
        }
        return compare_variants(lm, token_ids, answer, variants, progress=progress.steps_done)
