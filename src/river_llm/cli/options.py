"""Options that several commands share, and what they come to."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli.imports import import_libraries
from river_llm.config import RiverConfig, SamplingConfig
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from river_llm.exit_policy import ExitPolicy
    from river_llm.river_lm import RiverLM


class PolicyName(str, Enum):
    never = "never"
    always = "always"
    fixed = "fixed"
    similarity = "similarity"


class PrefillName(str, Enum):
    backbone = "backbone"
    river = "river"
    sequence = "sequence"


class EngineName(str, Enum):
    auto = "auto"
    cpu = "cpu"
    torch = "torch"


class WeightBits(str, Enum):
    sixteen = "16"
    eight = "8"


class QuantizerName(str, Enum):
    hqq = "hqq"
    rtn = "rtn"


class DtypeName(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


_MODEL_HELP = "A model directory, a GGUF file, a Hub id (org/name), or smollm2."
_POLICY, _RIVER, _SAMPLING, _SYSTEM = "Exit policy", "Exit river", "Sampling", "Machine"

ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=True)]
Model = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)]
RiverPath = Annotated[
    Path | None,
    typer.Option(
        "--river",
        help="The folder of a river made by `river-llm build`; without it one is built anew.",
        rich_help_panel=_RIVER,
    ),
]
Bits = Annotated[int, typer.Option(help="Bits of a weight: 2-6 or 8.", rich_help_panel=_RIVER)]
GroupSize = Annotated[
    int, typer.Option(help="Weights that share a scale: 32, 64, 128.", rich_help_panel=_RIVER)
]
Quantizer = Annotated[
    QuantizerName, typer.Option(help="How weights are quantised.", rich_help_panel=_RIVER)
]
Policy = Annotated[
    PolicyName | None,
    typer.Option(
        help="When tokens leave the backbone. \\[default: similarity, threshold 0.9]",
        rich_help_panel=_POLICY,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Leave after the first layer whose similarity exceeds this, in [-1, 1].",
        rich_help_panel=_POLICY,
    ),
]
ExitLayer = Annotated[
    int | None,
    typer.Option(help="Every token leaves after this many layers.", rich_help_panel=_POLICY),
]
FirstLayer = Annotated[
    int, typer.Option(help="First layer after which --threshold counts.", rich_help_panel=_POLICY)
]
Prefill = Annotated[
    PrefillName | None,
    typer.Option(
        help="How the prompt runs. \\[default: backbone; river with --policy always]",
        rich_help_panel=_POLICY,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="0 takes all.", rich_help_panel=_SAMPLING)]
MinP = Annotated[float, typer.Option(rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[float, typer.Option(rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer at this string; may be repeated.", rich_help_panel=_SAMPLING),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        help="What computes: the native one (cpu), or PyTorch, for every model and device.",
        rich_help_panel=_SYSTEM,
    ),
]
BackboneBits = Annotated[
    WeightBits,
    typer.Option(
        help="Of the backbone's weights: 16 (bfloat16) or 8 (native engine; not the exact model).",
        rich_help_panel=_SYSTEM,
    ),
]
HeadBits = Annotated[
    WeightBits,
    typer.Option(
        "--lm-head-bits",
        help="Of the LM head: 16 (bfloat16) or 8 (native engine; faster, not the exact model).",
        rich_help_panel=_SYSTEM,
    ),
]
Dtype = Annotated[DtypeName, typer.Option(help="Of the backbone.", rich_help_panel=_SYSTEM)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ... \\[default: cuda if any]", rich_help_panel=_SYSTEM),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. \\[default: all]", rich_help_panel=_SYSTEM)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model. Read it first.",
        rich_help_panel=_SYSTEM,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from river_llm import __version__

        print(f"river-llm {__version__}")
        raise typer.Exit


print_version = typer.Option(
    False, "--version", callback=_print_version, is_eager=True, help="Print the version."
)


def usage_error(message: str) -> typer.Exit:
    """Wrong usage: one line on stderr, exit code 2."""
    print(f"river-llm: {message}", file=sys.stderr)
    return typer.Exit(2)


def is_text(text: str) -> bool:
    """Whether a string can be encoded: bytes that are no UTF-8 come in as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(name: str, text: str) -> None:
    """See that an argument is UTF-8 text.

    Raises:
        typer.Exit: it is not.
    """
    if not is_text(text):
        raise usage_error(f"{name} is no UTF-8 text; convert it first")


def read_stdin() -> str:
    """All of stdin.

    Raises:
        typer.Exit: it is no text.
    """
    try:
        text = sys.stdin.read()
    except UnicodeError as error:
        raise usage_error("stdin is no UTF-8 text; convert it first") from error
    check_text("stdin", text)
    return text


def exit_policy(
    policy: PolicyName | None,
    threshold: float | None,
    exit_layer: int | None,
    first_layer: int,
    prefill: PrefillName | None,
) -> ExitPolicy:
    """The policy that the options name.

    Raises:
        typer.Exit: they contradict each other, or one is out of its range.
    """
    from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy

    if threshold is not None and exit_layer is not None:
        raise usage_error("give --threshold or --exit-layer, not both")
    implied = PolicyName.fixed if exit_layer is not None else PolicyName.similarity
    kind = policy or implied
    if threshold is not None and kind != PolicyName.similarity:
        raise usage_error(f"--threshold goes with --policy similarity, not {kind.value}")
    if exit_layer is not None and kind != PolicyName.fixed:
        raise usage_error(f"--exit-layer goes with --policy fixed, not {kind.value}")
    rules = {} if prefill is None else {"prefill": prefill.value}
    try:
        if kind == PolicyName.never:
            return ExitPolicy.never(**rules)
        if kind == PolicyName.always:
            return ExitPolicy.always(**rules)
        if kind == PolicyName.fixed:
            if exit_layer is None:
                raise usage_error("--policy fixed needs --exit-layer N")
            return ExitPolicy.fixed(exit_layer, **rules)
        tau = DEFAULT_THRESHOLD if threshold is None else threshold
        return ExitPolicy.similarity(tau, first_layer, **rules)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def prepare_torch(threads: int | None) -> None:
    """Set the number of threads, and keep the libraries' own bars and notes off the terminal."""
    import_libraries()
    import huggingface_hub
    import torch
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def torch_dtype(name: DtypeName) -> torch.dtype:
    """PyTorch's dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name.value)
    return dtype


def sampling_config(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> SamplingConfig:
    """The sampling settings that the options name.

    Raises:
        typer.Exit: one is out of its range.
    """
    try:
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
    except ConfigError as error:
        raise usage_error(str(error)) from error


def new_river_config(bits: int, group_size: int, quantizer: QuantizerName) -> RiverConfig:
    """How to build a river.

    Raises:
        typer.Exit: a setting is out of its range.
    """
    try:
        return RiverConfig(bits, group_size, quantizer.value)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def river_config(
    river: Path | None, bits: int, group_size: int, quantizer: QuantizerName
) -> Path | RiverConfig:
    """The folder of a saved river, or how to build one.

    Raises:
        typer.Exit: both are given, or a setting is out of its range.
    """
    config = new_river_config(bits, group_size, quantizer)
    if river is None:
        return config
    if config != RiverConfig():
        raise usage_error("--river brings its own --bits, --group-size and --quantizer")
    return river


def load(
    model: str,
    river: Path | RiverConfig,
    policy: ExitPolicy | None,
    engine: EngineName,
    dtype: DtypeName,
    device: str | None,
    threads: int | None,
    trust_remote_code: bool,
    backbone_bits: WeightBits = WeightBits.sixteen,
    lm_head_bits: WeightBits = WeightBits.sixteen,
) -> RiverLM:
    """The model with its river, with progress on stderr.

    Raises:
        RiverError: see `RiverLM.from_pretrained`.
    """
    from river_llm.cli.render import LoadingProgress

    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(threads)
        from river_llm.river_lm import RiverLM

        lm = RiverLM.from_pretrained(
            model,
            river,
            policy,
            torch_dtype(dtype),
            device=check_device(device),
            engine=engine.value,
            threads=threads,
            backbone_bits=int(backbone_bits.value),
            lm_head_bits=int(lm_head_bits.value),
            trust_remote_code=trust_remote_code,
            progress=progress.layers_built,
        )
    notes = []
    if lm.fallback_reason is not None:
        notes.append(f"PyTorch computes: {lm.fallback_reason}")
    for name, bits in (("backbone", backbone_bits), ("LM head", lm_head_bits)):
        if bits is WeightBits.eight:
            notes.append(f"the {name} is in 8 bits: its answers are not exactly the model's")
    for note in notes:
        print(f"river-llm: {note}", file=sys.stderr)
    return lm


def check_device(device: str | None) -> Any:
    """The device of that name, seen to be there.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if device is None:
        return None
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {device!r} here; try --device cpu") from error
