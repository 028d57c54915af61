"""`river-llm check-exact`: lossless mode beside the backbone, token for token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import LoadOptions, describe_loaded, load
from river_llm.cli.settings import draft_config, river_config, sampling_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import usage_error
from river_llm.errors import DataError
from river_llm.utf8 import read_text

if TYPE_CHECKING:
    from river_llm.exactness import Difference, Exactness
    from river_llm.lm import RiverLM
    from river_llm.text import Prompt


def check_exact(
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help="One prompt a line; or .jsonl with objects that have messages, turns (the first "
            "counts) or prompt.",
        ),
    ],
    model: options.ModelArgument = "smollm2",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many prompts only.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 1,
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    draft_tokens: options.DraftTokens = None,
    draft_exit_layer: options.DraftExitLayer = None,
    draft_lm_head_bits: options.DraftHead = None,
    ngram: options.Ngram = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give prompts to the model without chat template.")
    ] = False,
    json_output: options.Json = False,
    engine: options.Engine = options.EngineName.auto,
    backbone_bits: options.BackboneBits = options.WeightBits.sixteen,
    lm_head_bits: options.HeadBits = options.WeightBits.sixteen,
    kv_bits: options.KvBits = options.WeightBits.sixteen,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer prompts by the backbone alone and in lossless mode, in turn: whether all tokens are
    the same (else the exit code is 1), and how much faster lossless mode is."""
    drafts = draft_config(None, draft_tokens, draft_exit_layer, draft_lm_head_bits, ngram)
    sampling = sampling_config(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, None
    )
    settings = asdict(sampling)
    del settings["processors"]  # there are none
    texts = read_prompts(prompts)[:limit]
    loading = LoadOptions(
        model=model,
        river=river_config(river, bits, group_size, quantizer),
        policy=None,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        engine=engine,
        backbone_bits=backbone_bits,
        lm_head_bits=lm_head_bits,
        kv_bits=kv_bits,
        drafts=drafts,
    )
    lm = load(loading)
    from river_llm.cli.progress import LoadingProgress
    from river_llm.exactness import InterruptedCheckError, check_exactness

    cut_short: InterruptedCheckError | None = None
    try:
        with LoadingProgress("answering") as progress:
            found = check_exactness(
                lm,
                texts,
                raw=raw,
                drafts=drafts,
                batch_size=batch_size,
                progress=progress.steps_done,
                **settings,
            )
    except InterruptedCheckError as error:
        cut_short, found = error, error.found
    if json_output:
        output = {
            **describe_loaded(loading, lm),
            "batch_size": batch_size,
            "sampling": settings,
            "interrupted": cut_short is not None,
            **asdict(found),
        }
        print_json(output)
    elif found.prompts:
        _print(lm, found)
    if cut_short is not None:
        raise cut_short
    if found.differences:
        raise typer.Exit(1)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        typer.Exit: it can't be read, or holds none.
    """
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
    except DataError as error:
        raise usage_error(str(error)) from error
    if not lines:
        raise usage_error(f"{path} holds no prompt; put one on each line")
    if path.suffix != ".jsonl":
        return list(lines)
    return [_prompt(line, f"{path}: object {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, name: str) -> Prompt:
    try:
        return _prompt_of(json.loads(line))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise usage_error(f"{name} is no prompt; give it messages, turns or prompt") from error


def _prompt_of(entry: dict[str, Any]) -> Prompt:
    if "messages" in entry:
        messages = [
            {"role": _text(message["role"]), "content": _text(message["content"])}
            for message in entry["messages"]
        ]
        if not messages:
            raise ValueError("no message")
        return messages
    if "turns" in entry and not isinstance(entry["turns"], list):
        raise TypeError("turns are a list")
    return _text(entry["turns"][0] if "turns" in entry else entry["prompt"])


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return value


def _print(lm: RiverLM, found: Exactness) -> None:
    from river_llm.cli import render

    for difference in found.differences:
        render.stdout.print(_line(lm, difference))
    same = found.prompts - len(found.differences)
    quartiles = found.speed_up_quartiles
    spread = f", quartiles {quartiles[0]:.2f} to {quartiles[-1]:.2f}" if quartiles else ""
    render.stdout.print(
        f"{same} of {found.prompts} prompts have the backbone's own tokens ({found.tokens} in all)"
    )
    render.stdout.print(
        f"backbone {found.backbone_tokens_per_second:.1f} tokens/s, lossless "
        f"{found.lossless_tokens_per_second:.1f}: {found.speed_up:.2f}x{spread}; "
        f"{found.tokens_per_verification:.2f} tokens a verification, {found.draft_share:.0%} "
        f"drafted ({found.ngram_share:.0%} by the text itself), {found.draft_time_share:.0%} of "
        "the time in drafting"
    )


def _line(lm: RiverLM, difference: Difference) -> str:
    def shown(token: int | None) -> str:
        return "the end" if token is None else repr(lm.tokenizer.decode([token]))

    line = (
        f"prompt {difference.prompt + 1}, token {difference.place + 1}: the backbone has "
        f"{shown(difference.backbone)}, lossless mode {shown(difference.lossless)}"
    )
    pairs = zip(difference.top_tokens, difference.top_logits, strict=True)
    best = ", ".join(f"{shown(token)} {logit:.4f}" for token, logit in pairs)
    return f"{line}; most likely there: {best}" if best else line
