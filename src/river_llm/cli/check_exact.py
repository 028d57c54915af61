"""`river-llm check-exact`: lossless mode beside the backbone, token for token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from river_llm.cli import options
from river_llm.cli.loading import describe_loaded, load, saved_or_new
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import print_json
from river_llm.cli.usage import read_given, usage_error
from river_llm.config import (
    DEFAULT_MODEL,
    DraftConfig,
    EngineConfig,
    PromptConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.errors import InterruptedRunError

if TYPE_CHECKING:
    from river_llm.lm import RiverLM
    from river_llm.measure.exactness import Exactness
    from river_llm.text.prompt import Prompt

_SAMPLING = SamplingConfig(max_new_tokens=128, seed=0)


@with_settings
def check_exact(
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help="One prompt a line; or .jsonl with objects that have messages, turns (the first "
            "counts) or prompt.",
        ),
    ],
    drafts: DraftConfig,
    form: PromptConfig,
    config: RiverConfig,
    engine: EngineConfig,
    sampling: SamplingConfig = _SAMPLING,
    model: options.ModelArgument = DEFAULT_MODEL,
    river: options.RiverPath = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many prompts only.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 1,
    json_output: options.Json = False,
) -> None:
    """Answer prompts by the backbone alone and in lossless mode, alternating: whether all tokens
    are the same (else the exit code is 1), and how much faster lossless mode is."""
    if engine.no_miss:
        raise usage_error("lossless mode verifies with the whole backbone: leave out --no-miss")
    texts = read_prompts(prompts)[:limit]
    built = saved_or_new(river, config)
    lm, engine = load(model, built, None, engine, drafts)
    from river_llm.cli.progress import LoadingProgress
    from river_llm.measure.exactness import check_exactness

    with LoadingProgress("answering") as progress:
        found = check_exactness(
            lm,
            texts,
            drafts=drafts,
            batch_size=batch_size,
            progress=progress.steps_done,
            **form.to_dict(),
            **sampling.to_dict(),
        )
    if json_output:
        output = {
            **describe_loaded(model, built, engine, lm),
            "drafts": drafts.to_dict(),
            "batch_size": batch_size,
            "sampling": sampling.to_dict(),
            **asdict(found),
        }
        print_json(output)
    else:
        _print(lm, found)
    if found.interrupted:
        raise InterruptedRunError(f"interrupted after {found.prompts} of {len(texts)} prompts")
    if found.differences:
        raise typer.Exit(1)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        typer.Exit: it can't be read, or holds none.
    """
    lines = [line for line in read_given(path).split("\n") if line.strip()]
    if not lines:
        raise usage_error(f"{path} holds no prompt; put one on each line")
    if path.suffix != ".jsonl":
        return list(lines)
    return [_prompt(line, f"{path}: object {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, name: str) -> Prompt:
    try:
        match json.loads(line):
            case {"messages": [_, *_] as messages}:
                return [{key: _text(one[key]) for key in ("role", "content")} for one in messages]
            case {"turns": [text, *_]} | {"prompt": text}:
                return _text(text)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise usage_error(f"{name} is no prompt; give it messages, turns or prompt")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return value


def _print(lm: RiverLM, found: Exactness) -> None:
    from river_llm.cli.render import stdout

    def shown(token: int | None) -> str:
        return "the end" if token is None else repr(lm.tokenizer.decode([token]))

    for one in found.differences:
        best = zip(one.top_tokens, one.top_logits, strict=True)
        logits = ", ".join(f"{shown(token)} {logit:.4f}" for token, logit in best)
        stdout.print(
            f"prompt {one.prompt + 1}, token {one.place + 1}: the backbone has "
            f"{shown(one.backbone)}, lossless mode {shown(one.lossless)}"
            + (f"; argmax there: {logits}" if logits else "")
        )
    same = found.prompts - len(found.differences)
    quartiles = found.speed_up_quartiles
    spread = f", quartiles {quartiles[0]:.2f} to {quartiles[-1]:.2f}" if quartiles else ""
    stdout.print(
        f"{same} of {found.prompts} prompts have the backbone's own tokens ({found.tokens} in all)"
    )
    stdout.print(
        f"backbone {found.backbone_tokens_per_second:.1f} tokens/s, lossless "
        f"{found.lossless_tokens_per_second:.1f}: {found.speed_up:.2f}x{spread}; "
        f"{found.tokens_per_verification:.2f} tokens a verification, {found.draft_share:.0%} "
        f"drafted ({found.ngram_share:.0%} by the text itself), {found.draft_time_share:.0%} of "
        "the time in drafting"
    )
