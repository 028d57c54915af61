"""`river-llm bench`: how fast backbone, river and peers are, in the manner of llama-bench."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from river_llm.cli import options
from river_llm.cli.bench_memory import bench_memory
from river_llm.cli.imports import import_libraries
from river_llm.cli.loading import prepare_torch, torch_dtype
from river_llm.cli.settings import new_river_config, river_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import usage_error
from river_llm.errors import InterruptedRunError

if TYPE_CHECKING:
    from river_llm.benchmark.lineup import Lineup
    from river_llm.benchmark.subject import Subject
    from river_llm.benchmark.suite import Result
    from river_llm.config import RiverConfig
    from river_llm.exit_policy import ExitPolicy

_TESTS, _ARMS = "Tests", "Arms"
_Value = TypeVar("_Value", int, float)


class ShapeName(str, Enum):
    llama_3_2_1b = "llama-3.2-1b"
    llama_3_2_3b = "llama-3.2-3b"
    llama_3_1_8b = "llama-3.1-8b"


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A model directory, a GGUF file, a Hub id (org/name), or smollm2, the default.",
        ),
    ] = None,
    random_weights: Annotated[
        ShapeName | None,
        typer.Option(help="Random weights of this shape in place of a model. Speed only."),
    ] = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens of each prompt test (pp), as 512,1024; 0: none.", rich_help_panel=_TESTS
        ),
    ] = "512",
    new_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens of each decoding test (tg), as 128; 0: none.", rich_help_panel=_TESTS
        ),
    ] = "128",
    depth: Annotated[
        str,
        typer.Option(
            help="Tokens in the cache before each test, as 0,4096.", rich_help_panel=_TESTS
        ),
    ] = "0",
    batch: Annotated[
        str,
        typer.Option(help="Sequences that decode together, as 1,2,4,8.", rich_help_panel=_TESTS),
    ] = "1",
    threads: Annotated[
        str | None,
        typer.Option(
            help="CPU threads, as 1,2. \\[default: as many as there are cores]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="In turn, after one that warms up.", rich_help_panel=_TESTS),
    ] = 5,
    disturb: Annotated[
        bool,
        typer.Option(
            "--disturb",
            help="As many rounds again beside a process that keeps one core busy.",
            rich_help_panel=_TESTS,
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Measure memory in place of speed: backbone, full quantisation, River without and "
            "with offloading, each in a process of its own, at every --depth. \\[default: 4K to "
            "64K, --exit-layer 3]",
            rich_help_panel=_TESTS,
        ),
    ] = False,
    exit_layer: Annotated[
        str | None,
        typer.Option(
            help="River arms whose tokens leave after so many layers, as 3,10.",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="River arms whose tokens leave above this similarity, as 0.97,0.98.",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    lm_head_bits: Annotated[
        options.WeightBits,
        typer.Option(
            help="8: every arm with an 8-bit LM head too (native engine).", rich_help_panel=_ARMS
        ),
    ] = options.WeightBits.sixteen,
    kv_bits: Annotated[
        options.WeightBits,
        typer.Option(
            help="8: every arm with an 8-bit KV cache too; with --memory, every arm has it.",
            rich_help_panel=_ARMS,
        ),
    ] = options.WeightBits.sixteen,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Others on the same weights: transformers,llama.cpp. \\[extra: bench]",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where llama.cpp's files are kept. \\[default: a temporary directory]",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    json_output: options.Json = False,
    engine: options.Engine = options.EngineName.auto,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time backbone, river and peers in turn, beside the memory bandwidth that they could use."""
    from river_llm.benchmark.disturbance import can_disturb, disturbed_core
    from river_llm.benchmark.environment import describe_environment, usable_cores
    from river_llm.cli.bench_table import print_results
    from river_llm.cli.progress import LoadingProgress

    if random_weights is not None:
        _check_random(model, river, threshold)
    config = river_config(river, bits, group_size, quantizer)
    counts = [usable_cores()] if threads is None else _thread_counts(threads)
    policies = _policies(bits, exit_layer, threshold)
    wanted_peers = _wanted_peers(peers)
    if work_dir is not None and "llama.cpp" not in wanted_peers:
        raise usage_error("--work-dir goes with --peers llama.cpp")
    if disturb and not can_disturb():
        raise usage_error("--disturb needs a system that pins processes to cores (Linux)")
    numbers = [
        _numbers("--prompt-tokens", prompt_tokens, int, 0),
        _numbers("--new-tokens", new_tokens, int, 0),
        _numbers("--depth", depth, int, 0),
        _numbers("--batch", batch, int, 1),
    ]
    if not any(numbers[0] + numbers[1]):
        raise usage_error("--prompt-tokens 0 and --new-tokens 0 leave nothing to time")
    if memory:
        _check_memory(peers, threshold, engine, disturb, batch, prompt_tokens, new_tokens, counts)
        bench_memory(
            partial(
                _load_subject,
                random_weights,
                model or "smollm2",
                config,
                dtype,
                trust_remote_code,
                int(kv_bits.value),
            ),
            random_weights.value if random_weights else model or "smollm2",
            [3] if exit_layer is None else _numbers("--exit-layer", exit_layer, int, 0),
            [context for context in numbers[2] if context > 0],
            rounds,
            counts[0],
            int(lm_head_bits.value),
            int(kv_bits.value),
            json_output,
        )
        return
    head_bits = [16] if lm_head_bits is options.WeightBits.sixteen else [16, 8]
    cache_bits = [16] if kv_bits is options.WeightBits.sixteen else [16, 8]
    with ExitStack() as ending:
        name = random_weights.value if random_weights else model or "smollm2"
        with LoadingProgress(f"loading {name}") as progress:
            prepare_torch(counts[0])
            from river_llm.benchmark.bandwidth import read_bandwidth
            from river_llm.benchmark.lineup import Lineup
            from river_llm.benchmark.subject import load_subject, random_subject
            from river_llm.benchmark.suite import Plan, run_suite
            from river_llm.benchmark.workload import check_fits, make_workloads
            from river_llm.engines import check_dtype, check_engine_options, choose_engine

            check_dtype(torch_dtype(dtype), engine.value)
            check_engine_options(engine.value, 16, head_bits[-1])
            if random_weights:
                subject = random_subject(name, new_river_config(bits, group_size, quantizer))
            else:
                subject = load_subject(
                    name,
                    config,
                    torch_dtype(dtype),
                    trust_remote_code,
                    progress.layers_built,
                    partial(
                        choose_engine,
                        choice=engine.value,
                        backbone_bits=16,
                        lm_head_bits=head_bits[-1],
                        kv_bits=cache_bits[-1],
                    ),
                )
            workloads = make_workloads(*numbers)
            check_fits(workloads, subject.context_length)
            lineup = Lineup(
                subject.model,
                subject.river,
                subject.tokens,
                policies,
                engine.value,
                head_bits,
                counts,
                cache_bits,
            )
            if "transformers" in wanted_peers:
                lineup.add_transformers()
            if "llama.cpp" in wanted_peers:
                folder = work_dir or ending.enter_context(tempfile.TemporaryDirectory())
                lineup.add_llama_cpp(Path(folder))
        core = disturbed_core() if disturb else None
        plan = Plan(workloads, counts, rounds, core)
        results: list[Result] = []
        is_whole = False
        try:
            with LoadingProgress(f"timing {name}") as progress:
                results.extend(run_suite(lineup.arms, plan, read_bandwidth, progress.steps_done))
            is_whole = True
        except KeyboardInterrupt:
            if not results:
                raise
    output = {
        **describe_environment(),
        **_describe_model(subject, lineup),
        "rounds": rounds,
        "threads": counts,
        "disturbed_core": core,
        "interrupted": not is_whole,
        "results": [result.to_dict() for result in results],
    }
    if json_output:
        print_json(output)
    else:
        print_results(results, output)
    if not is_whole:
        raise InterruptedRunError("interrupted; the results are of the tests that were done")


def _load_subject(
    random_weights: ShapeName | None,
    name: str,
    config: Path | RiverConfig,
    dtype: options.DtypeName,
    trust_remote_code: bool,
    kv_bits: int,
) -> Subject:
    """The model and its river, for `bench_memory`."""
    prepare_torch(None)
    from river_llm.benchmark.subject import load_subject, random_subject
    from river_llm.config import RiverConfig
    from river_llm.engines.llama_family import check_supported

    if random_weights is not None:
        assert isinstance(config, RiverConfig)
        return random_subject(random_weights.value, config)
    check = partial(check_supported, kv_bits=kv_bits)
    return load_subject(name, config, torch_dtype(dtype), trust_remote_code, check=check)


def _check_memory(
    peers: str | None,
    threshold: str | None,
    engine: options.EngineName,
    disturb: bool,
    batch: str,
    prompt_tokens: str,
    new_tokens: str,
    counts: list[int],
) -> None:
    """See that no option of the speed tests is given with --memory."""
    if engine is options.EngineName.torch:
        raise usage_error("--memory measures the native engine")
    if len(counts) > 1:
        raise usage_error("--memory takes one number of --threads")
    given = {
        "--peers": peers is not None,
        "--threshold": threshold is not None,
        "--disturb": disturb,
        "--batch": batch != "1",
        "--prompt-tokens": prompt_tokens != "512",
        "--new-tokens": new_tokens != "128",
    }
    for option, is_given in given.items():
        if is_given:
            raise usage_error(f"{option} is for speed; leave it out with --memory")


def _describe_model(subject: Subject, lineup: Lineup) -> dict[str, Any]:
    notes = list(lineup.notes)
    if subject.is_random:
        notes.insert(0, "random weights: the speeds are those of the shape, no text was computed")
    return {
        "model": subject.name,
        "random_weights": subject.is_random,
        "architecture": type(subject.model).__name__,
        "num_layers": len(subject.river.exit_layers),
        "fingerprint": lineup.fingerprint,
        "river": subject.river.config.to_dict(),
        "engine": lineup.engine,
        "same_top": lineup.same_top,
        "llama_cpp_build": lineup.llama_cpp_build,
        "notes": notes,
    }


def _check_random(model: str | None, river: Path | None, threshold: str | None) -> None:
    if model is not None:
        raise usage_error("give --model or --random-weights, not both")
    if river is not None:
        raise usage_error("--random-weights brings its own river; leave --river out")
    if threshold is not None:
        raise usage_error(
            "--threshold says nothing on random weights; take --exit-layer, a fixed depth"
        )


def _numbers(
    option: str, text: str, kind: Callable[[str], _Value], least: float, most: float | None = None
) -> list[_Value]:
    """`1,2,4` as numbers, each once."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    fits = values and all(least <= value and (most is None or value <= most) for value in values)
    if not fits:
        limits = f"from {least} to {most}" if most is not None else f"of {least} or more"
        raise usage_error(f"{option} takes numbers {limits}, as 1,2,4; not {text!r}")
    return list(dict.fromkeys(values))


def _thread_counts(text: str) -> list[int]:
    import_libraries()
    from river_llm.engines.choice import MAX_THREADS

    return _numbers("--threads", text, int, 1, MAX_THREADS)


def _policies(bits: int, exit_layer: str | None, threshold: str | None) -> dict[str, ExitPolicy]:
    """The arms on our own engine, by name; the backbone first."""
    from river_llm.exit_policy import ExitPolicy

    depths = [] if exit_layer is None else _numbers("--exit-layer", exit_layer, int, 0)
    taus = [] if threshold is None else _numbers("--threshold", threshold, float, -1, 1)
    rivers = [*map(ExitPolicy.fixed, depths), *map(ExitPolicy.similarity, taus)]
    return {
        "backbone": ExitPolicy.never(),
        f"full {bits}-bit": ExitPolicy.always(),
        **{policy.describe(): policy for policy in rivers},
    }


def _wanted_peers(text: str | None) -> list[str]:
    from river_llm.benchmark.peers import INSTALL_LLAMA_CPP, PEERS, llama_cpp_is_installed

    names = [] if text is None else text.split(",")
    for name in names:
        if name not in PEERS:
            raise usage_error(f"--peers takes {', '.join(PEERS)}; not {name!r}")
    if "llama.cpp" in names and not llama_cpp_is_installed():
        raise usage_error(f"--peers llama.cpp needs llama-cpp-python: {INSTALL_LLAMA_CPP}")
    return names
