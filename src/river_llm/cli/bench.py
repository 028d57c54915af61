"""`river-llm bench`: how fast the variants of a model are, in the manner of llama-bench."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.imports import import_libraries
from river_llm.cli.loading import LoadOptions, check_device, describe_loaded, load, prepare_torch
from river_llm.cli.progress import LoadingProgress
from river_llm.cli.settings import river_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import refuse_idle, usage_error
from river_llm.config import RiverConfig
from river_llm.errors import InterruptedRunError

if TYPE_CHECKING:
    from river_llm.engines import Engine
    from river_llm.measure.rounds import Variant
    from river_llm.river_lm import RiverLM

_WORDS = ("engine", "variant", "test")  # columns; the others are numbers
_WIDEST = 400


def _test(words: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=words, rich_help_panel="Tests", **more)


def _variant(words: str, *names: str) -> Any:
    return typer.Option(*names, help=words, rich_help_panel="Variants")


def bench(
    context: typer.Context,
    model: options.Model = "smollm2",
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
    lossless: Annotated[bool, _variant("Lossless mode too.", "--lossless")] = False,
    lm_head_bits: Annotated[
        options.WeightBits, _variant("8: all with an 8-bit LM head too (native engine).")
    ] = options.WeightBits.sixteen,
    kv_bits: Annotated[
        options.WeightBits, _variant("8: all with an 8-bit KV cache too; with --memory only so.")
    ] = options.WeightBits.sixteen,
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    json_output: options.Json = False,
    engine: options.Engine = options.EngineName.auto,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time backbone, full quantisation and River in interleaved rounds, beside the memory bandwidth
    that they could use."""
    if shape is not None:
        idle = {"--model", "--river", "--threshold", "--lossless", "--dtype"}
        refuse_idle(context, "--shape is random weights: speed at a fixed depth alone", idle)
    if memory:
        idle = {"--prompt-tokens", "--new-tokens", "--batch", "--threshold", "--lossless"}
        refuse_idle(context, "--memory is of the native engine", idle | {"--engine", "--device"})
    lengths = _numbers("--prompt-tokens", prompt_tokens), _numbers("--new-tokens", new_tokens)
    if not any(map(any, lengths)):
        raise usage_error("--prompt-tokens 0 and --new-tokens 0 leave nothing to time")
    depths, batches = _numbers("--depth", depth), _numbers("--batch", batch, 1)
    exits = [] if exit_layer is None else _numbers("--exit-layer", exit_layer)
    taus = [] if threshold is None else _numbers("--threshold", threshold, -1, 1, float)
    import_libraries()
    from river_llm.engines import CpuEngine, check_engine_options
    from river_llm.exit_policy import ExitPolicy
    from river_llm.measure.bench import LosslessVariant, Text, make_variants, run_bench
    from river_llm.measure.memory import bench_memory
    from river_llm.measure.rounds import make_workloads

    loading = LoadOptions(
        model=model,
        river=river_config(river, bits, group_size, quantizer),
        policy=ExitPolicy.never(),
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        engine=options.EngineName.cpu if memory else engine,
    )
    check_engine_options(loading.engine.value, 16, int(lm_head_bits.value), int(kv_bits.value))
    full = options.WeightBits.sixteen
    heads, caches = (dict.fromkeys((full, width)) for width in (lm_head_bits, kv_bits))
    variants: list[Variant] = []
    for head, cache in list(product(heads, caches))[-1 if memory else 0 :]:
        made, lm, output = _load(replace(loading, lm_head_bits=head, kv_bits=cache), shape)
        suffix = ", 8-bit head" * (head.value == "8") + ", 8-bit KV cache" * (cache.value == "8")
        own_bits = output["river"]["bits"]
        text = Text(lm and lm.tokenizer, made.draft_vocabularies[-1])
        variants += make_variants(made, text, own_bits, exits, taus, suffix)
        if lossless and lm is not None:
            variants.append(LosslessVariant(f"lossless{suffix}", lm, text))
    with LoadingProgress(f"measuring {output['model']}") as progress:
        done = progress.steps_done
        if isinstance(made, CpuEngine) and memory:
            output |= bench_memory(made, own_bits, exits, depths, rounds, threads, done)
        else:
            workloads = make_workloads(*lengths, depths, batches, made.context_length)
            output |= run_bench(variants, workloads, rounds, threads, made.device, progress=done)
    if json_output:
        print_json(output)
    else:
        _print(output, _memory_row if memory else _speed_row)
    if output.get("interrupted"):
        raise InterruptedRunError("interrupted; the results are of the tests that were done")


def _load(loading: LoadOptions, shape: str | None) -> tuple[Engine, RiverLM | None, dict[str, Any]]:
    """An engine, the model of that name where it isn't random weights, and what describes it."""
    if shape is None:
        lm = load(loading)
        fingerprint = lm.engine.cache_identity([0])
        return lm.engine, lm, {**describe_loaded(loading, lm), "fingerprint": fingerprint}
    assert isinstance(loading.river, RiverConfig)
    with LoadingProgress(f"making {shape}"):
        prepare_torch(loading.threads)
        from river_llm.measure.random_weights import random_engine

        engine = random_engine(
            shape,
            loading.river,
            loading.engine.value,
            device=check_device(loading.device),
            threads=loading.threads,
            lm_head_bits=int(loading.lm_head_bits.value),
            kv_bits=int(loading.kv_bits.value),
        )
    described = {"model": f"{shape} (random weights)", "engine": engine.name}
    return engine, None, described | {"river": loading.river.to_dict()}


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


def _print(
    output: Mapping[str, Any], row_of: Callable[[Mapping[str, Any]], dict[str, str]]
) -> None:
    """A table, wide enough that no figure is cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    river = output["river"]
    print(
        f"{output['model']}, river of {river['bits']} bits in groups of {river['group_size']} "
        f"({river['quantizer']}); {output['processor']}, {output['date']}"
    )
    rows = list(map(row_of, output["results"]))
    table = Table(box=None, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    Console(width=_WIDEST, highlight=False, markup=False).print(table)


def _speed_row(result: Mapping[str, Any]) -> dict[str, str]:
    from river_llm.measure.rounds import Spread

    depth, read = result["mean_exit_layer"], result["bytes_per_token"]
    fraction = result["bandwidth_fraction"]
    return {
        **{word: result[word] for word in _WORDS},
        "tokens/s": str(Spread(**result["tokens_per_second"])),
        "x backbone": f"{next(iter(result['ratios'].values()))['median']:.2f}",
        "exit depth": "" if depth is None else f"{depth:.1f}",
        "MB/token": "" if read is None else f"{read / 1e6:.1f}",
        "GB/s": f"{result['bandwidth'] / 1e9:.1f}",
        "of it": "" if fraction is None else f"{100 * fraction:.0f} %",
    }


def _memory_row(result: Mapping[str, Any]) -> dict[str, str]:
    sizes = ("steady", "peak", "expected", "base")
    return {
        "variant": result["variant"],
        "context": str(result["context"]),
        **{f"{size} MB": f"{result[f'{size}_bytes'] / 1e6:.0f}" for size in sizes},
        "x full": f"{result['times_full']:.2f}",
        "tokens/s": f"{result['tokens_per_second']:.1f}",
    }
