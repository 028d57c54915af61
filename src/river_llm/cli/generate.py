"""`river-llm generate`: answer one prompt."""

from __future__ import annotations

import secrets
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import check_mode, describe_loaded, load, saved_or_new
from river_llm.cli.prompt_cache import PromptCache, check_prompt_cache
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import print_json, read_stdin
from river_llm.cli.usage import check_text, usage_error
from river_llm.config import (
    DEFAULT_MODEL,
    DraftConfig,
    EngineConfig,
    PolicyConfig,
    PromptConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.errors import InterruptedRunError

if TYPE_CHECKING:
    from river_llm.lm import RiverLM
    from river_llm.measure.comparison import Compared


@with_settings
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help="The prompt, or - to read it from stdin; -- goes before one that begins with -."
        ),
    ],
    policy: PolicyConfig,
    sampling: SamplingConfig,
    drafts: DraftConfig,
    form: PromptConfig,
    config: RiverConfig,
    engine: EngineConfig,
    model: options.Model = DEFAULT_MODEL,
    river: options.RiverPath = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Then run backbone, lossless mode, River and full quantisation along the "
            "backbone's own greedy answer, in interleaved rounds: speed, exit depth, agreement.",
        ),
    ] = False,
    prompt_cache: options.PromptCacheFile = None,
    json_output: options.Json = False,
) -> None:
    """Answer a prompt losslessly: the river drafts, the backbone verifies, and each token is shown
    in the colour of what guessed it: green the river, blue the text itself, red nothing.

    With --threshold, --exit-layer or --policy tokens leave the backbone early, and each has the
    colour of the layer at which it left.
    """
    if compare and engine.no_miss:
        raise usage_error("--compare runs the whole backbone: leave out --no-miss")
    check_mode(policy, engine, drafts)
    check_prompt_cache(prompt_cache, policy)
    prompt = _checked_prompt(prompt)
    if sampling.seed is None and sampling.temperature > 0:  # one that can be told
        sampling = replace(sampling, seed=secrets.randbits(32))
    built = saved_or_new(river, config)
    lm, engine = load(model, built, policy.exit_policy(), engine, drafts)
    token_ids = lm.encode(prompt, form)
    cache = None if prompt_cache is None else PromptCache(prompt_cache, lm)
    settings = {
        **describe_loaded(model, built, engine, lm),
        **form.to_dict(),
        "sampling": sampling.to_dict(),
        "drafts": drafts.to_dict() if lm.policy is None else None,
    }
    _answer(lm, cache, token_ids, sampling, drafts, compare, json_output, settings)


def _checked_prompt(prompt: str) -> str:
    if prompt == "-":
        prompt = read_stdin()
    check_text("the prompt", prompt)
    if not prompt.strip():
        raise usage_error("the prompt is empty; give some text, or - to read it from stdin")
    return prompt


def _answer(
    lm: RiverLM,
    cache: PromptCache | None,
    token_ids: list[int],
    sampling: SamplingConfig,
    drafts: DraftConfig,
    compare: bool,
    json_output: bool,
    settings: dict[str, Any],
) -> None:
    """Stream the answer to stdout, its statistics to stderr; or all of it as JSON.

    Raises:
        InterruptedRunError: Ctrl-C came before a comparison was done.
    """
    from river_llm.cli import render
    from river_llm.cli.progress import LoadingProgress
    from river_llm.generate import GenerationResult

    responses = []
    is_interrupted = False
    progress = LoadingProgress("answering")
    of_mode = drafts if lm.policy is None else None
    try:
        with progress if json_output else nullcontext():
            for response in lm.stream_tokens(
                token_ids, sampling, reuse_cache=cache is not None, drafts=of_mode
            ):
                responses.append(response)
                progress.steps_done(len(responses), sampling.max_new_tokens)
                if cache is not None:
                    cache.note_use(response)
                if not json_output:
                    render.print_response(response, lm.engine.num_layers)
    except KeyboardInterrupt:
        is_interrupted = True
    result = GenerationResult.of(lm.engine, responses, len(token_ids), lm.policy)
    if not json_output:
        render.stdout.print()
        render.print_statistics(result)
    if cache is not None and responses:
        cache.keep(len(token_ids))
    variants = None
    if compare and not is_interrupted:
        try:
            variants = _compare(lm, token_ids, sampling.max_new_tokens, drafts)
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
        raise InterruptedRunError("interrupted before the comparison was done")


def _compare(
    lm: RiverLM, token_ids: list[int], max_new_tokens: int, drafts: DraftConfig
) -> list[Compared] | None:
    """The variants along the backbone's own answer; None if it is too short."""
    from river_llm.cli import render
    from river_llm.cli.progress import LoadingProgress
    from river_llm.measure.comparison import compare_variants, compared_variants
    from river_llm.river.policy import ExitPolicy

    with LoadingProgress("comparing") as progress:
        greedy = SamplingConfig(max_new_tokens=max_new_tokens)
        stream = lm.stream_tokens(token_ids, greedy, policy=ExitPolicy.never())
        answer = [response.token for response in stream]
        if len(answer) < 2:
            render.stderr.print("the backbone's answer is too short to compare along it")
            return None
        return compare_variants(
            lm,
            token_ids,
            answer,
            compared_variants(lm),
            drafts=drafts,
            progress=progress.steps_done,
        )
