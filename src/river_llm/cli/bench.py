"""`river-llm bench`: how fast the variants of a model are, in the manner of llama-bench."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.imports import import_libraries
from river_llm.cli.loading import describe_loaded, load, prepare_torch, saved_or_new
from river_llm.cli.progress import LoadingProgress
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import print_json
from river_llm.cli.usage import refuse_idle, usage_error
from river_llm.config import DEFAULT_MODEL, EngineConfig, RiverConfig
from river_llm.errors import InterruptedRunError

if TYPE_CHECKING:
    from river_llm.engines import Engine
    from river_llm.lm import RiverLM
    from river_llm.measure.rounds import Variant

_WORDS = ("engine", "variant", "test")  # columns; the others are numbers
_ENGINE = EngineConfig(device="cpu")
_Row = dict[str, str]  # of a table: heading -> cell


def _test(words: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=words, rich_help_panel="Tests", **more)


def _variant(words: str, *names: str) -> Any:
    return typer.Option(*names, help=words, rich_help_panel="Variants")


@partial(with_settings, without=("offload", "no_miss"))  # --memory has its own
def bench(
    context: typer.Context,
    config: RiverConfig,
    engine: EngineConfig = _ENGINE,
    model: options.Model = DEFAULT_MODEL,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights in place of a model: llama-3.2-1b, -3b, llama-3.1-8b."),
    ] = None,
    prompt_tokens: Annotated[str, _test("Of each prompt test (pp): 512,1024; 0: none.")] = "512",
    new_tokens: Annotated[str, _test("Of each decoding test (tg): 128,256; 0: none.")] = "128",
    depth: Annotated[str, _test("Tokens in the cache before each test: 0,4096.")] = "0",
    batch: Annotated[str, _test("Sequences that decode together: 1,2,4,8.")] = "1",
    rounds: Annotated[int, _test("Interleaved, after one that warms up.", min=1)] = 5,
    memory: Annotated[
        bool,
        _test(
            "Measure memory: backbone, full quantisation, River without and with offloading, each "
            "in its own process, at every --depth. \\[default: 4K to 64K, --exit-layer 3]",
            "--memory",
        ),
    ] = False,
    exit_layer: Annotated[str | None, _variant("Tokens leave after so many layers: 3,10.")] = None,
    threshold: Annotated[str | None, _variant("Tokens leave above this similarity: 0.97.")] = None,
    second_look: Annotated[
        str | None, _variant("All that leave with a second look too, up to this margin: 0.1,0.3.")
    ] = None,
    lossless: Annotated[bool, _variant("Lossless mode too.", "--lossless")] = False,
    river: options.RiverPath = None,
    json_output: options.Json = False,
) -> None:
    """Time backbone, full quantisation and River in interleaved rounds, beside the memory bandwidth
    that they could use."""
    if shape is not None:
        idle = {"--model", "--river", "--threshold", "--second-look", "--lossless", "--dtype"}
        refuse_idle(context, "--shape is random weights: speed at a fixed depth alone", idle)
    if memory:
        idle = {"--prompt-tokens", "--new-tokens", "--batch", "--threshold", "--second-look"}
        idle |= {"--lossless", "--engine", "--device"}
        refuse_idle(context, "--memory is of the native engine", idle)
    lengths = _numbers("--prompt-tokens", prompt_tokens), _numbers("--new-tokens", new_tokens)
    if not any(map(any, lengths)):
        raise usage_error("--prompt-tokens 0 and --new-tokens 0 leave nothing to time")
    depths, batches = _numbers("--depth", depth), _numbers("--batch", batch, 1)
    exits = [] if exit_layer is None else _numbers("--exit-layer", exit_layer)
    taus = [] if threshold is None else _numbers("--threshold", threshold, -1, 1, float)
    looks = [] if second_look is None else _numbers("--second-look", second_look, 0, 1, float)
    if 0 in looks:
        raise usage_error("--second-look 0 looks at no token again")
    import_libraries()
    from river_llm.engines import CpuEngine
    from river_llm.measure.bench import LosslessVariant, Text, make_variants, run_bench
    from river_llm.measure.memory import bench_memory
    from river_llm.measure.rounds import make_workloads

    if memory:
        engine = replace(engine, engine="cpu")
    built = saved_or_new(river, config)
    heads, caches = (dict.fromkeys((16, bits)) for bits in (engine.lm_head_bits, engine.kv_bits))
    variants: list[Variant] = []
    for head, cache in list(product(heads, caches))[-1 if memory else 0 :]:
        of_widths = replace(engine, lm_head_bits=head, kv_bits=cache)
        made, lm, output = _load(model, built, of_widths, shape, lossless)
        suffix = ", 8-bit head" * (head == 8) + ", 8-bit KV cache" * (cache == 8)
        width = RiverConfig.of(output["river"]).width
        text = Text(lm and lm.tokenizer, made.vocab_size)
        variants += make_variants(made, text, width, exits, taus, looks, suffix)
        if lossless and lm is not None:
            variants.append(LosslessVariant(f"lossless{suffix}", lm, text))
    threads = engine.threads
    with LoadingProgress(f"measuring {output['model']}") as progress:
        done = progress.steps_done
        if isinstance(made, CpuEngine) and memory:
            output |= bench_memory(made, width, exits, depths, rounds, threads, done)
        else:
            workloads = make_workloads(*lengths, depths, batches, made.context_length)
            output |= run_bench(variants, workloads, rounds, threads, made.device, progress=done)
    if json_output:
        print_json(output)
    else:
        _print(output, _memory_row if memory else _speed_row)
    if output.get("interrupted"):
        raise InterruptedRunError("interrupted; the results are of the tests that were done")


def _load(
    model: str,
    river: Path | RiverConfig,
    config: EngineConfig,
    shape: str | None,
    lossless: bool,
) -> tuple[Engine, RiverLM | None, dict[str, Any]]:
    """An engine, the model of that name where it isn't random weights, and what describes it."""
    from river_llm.engines.step import CacheAccess
    from river_llm.river.policy import ExitPolicy

    if shape is None:
        lm, config = load(model, river, None if lossless else ExitPolicy.never(), config)
        described = describe_loaded(model, river, config, lm)
        if isinstance(lm.engine, CacheAccess):
            described["fingerprint"] = lm.engine.cache_identity([0])
        return lm.engine, lm, described
    assert isinstance(river, RiverConfig)
    with LoadingProgress(f"making {shape}"):
        prepare_torch(config)
        from river_llm.measure.random_weights import random_engine

        made = random_engine(shape, river, config)
    described = {"model": f"{shape} (random weights)", "engine": made.name}
    return made, None, described | {"river": river.to_dict()}


def _numbers(
    option: str,
    text: str,
    least: float = 0,
    most: float = math.inf,
    kind: Callable[[str], float] = int,
) -> list[Any]:
    """`1,2,4` as numbers, each once."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(least <= value <= most for value in values):
        limits = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise usage_error(f"{option} takes numbers {limits}, as 1,2,4; not {text!r}")
    return list(dict.fromkeys(values))


def _print(output: Mapping[str, Any], row_of: Callable[[Mapping[str, Any]], _Row]) -> None:
    """What it is of, and a table."""
    from rich.table import Table
    from rich.text import Text

    from river_llm.cli.render import print_whole

    river = RiverConfig.of(output["river"])
    print(
        f"{output['model']}, river of {river.describe_bits()} in groups of {river.group_size} "
        f"({river.quantizer}); {output['processor']}, {output['date']}"
    )
    rows = list(map(row_of, output["results"]))
    table = Table(box=None, pad_edge=False)
    if not any(row.get("second looks") for row in rows):
        for row in rows:
            row.pop("second looks", None)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    print_whole(table)


def _speed_row(result: Mapping[str, Any]) -> _Row:
    from river_llm.measure.rounds import Spread

    depth, read = result["mean_exit_layer"], result["bytes_per_token"]
    fraction, looks = result["bandwidth_fraction"], result["second_looks"]
    return {
        **{word: result[word] for word in _WORDS},
        "tokens/s": str(Spread(**result["tokens_per_second"])),
        "x backbone": f"{next(iter(result['ratios'].values()))['median']:.2f}",
        "exit depth": "" if depth is None else f"{depth:.1f}",
        "second looks": "" if looks is None else f"{100 * looks:.0f} %",
        "MB/token": "" if read is None else f"{read / 1e6:.1f}",
        "GB/s": f"{result['bandwidth'] / 1e9:.1f}",
        "of it": "" if fraction is None else f"{100 * fraction:.0f} %",
    }


def _memory_row(result: Mapping[str, Any]) -> _Row:
    sizes = ("steady", "peak", "expected", "base")
    return {
        "variant": result["variant"],
        "context": str(result["context"]),
        **{f"{size} MB": f"{result[f'{size}_bytes'] / 1e6:.0f}" for size in sizes},
        "x full": f"{result['times_full']:.2f}",
        "tokens/s": f"{result['tokens_per_second']:.1f}",
    }
