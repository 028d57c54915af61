"""Options that several commands share; `settings.py` and `loading.py` have what they come to."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


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


class DraftHeadBits(str, Enum):
    sixteen = "16"
    eight = "8"
    four = "4"


class QuantizerName(str, Enum):
    hqq = "hqq"
    rtn = "rtn"


class DtypeName(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


_MODEL_HELP = "A model directory, a GGUF file, a Hub id (org/name), or smollm2."
_POLICY, _RIVER, _LOSSLESS = "Exit policy", "Exit river", "Lossless mode"
_PROMPT, _SAMPLING, _SYSTEM = "Prompt", "Sampling", "Machine"
TASKS = "Tasks"

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
        help="When tokens leave the backbone. Without a policy, threshold or exit layer every "
        "token is the backbone's: the river drafts, the backbone verifies (lossless mode).",
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
DraftTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of every draft. \\[default: as many as are worth their time]",
        rich_help_panel=_LOSSLESS,
    ),
]
DraftExitLayer = Annotated[
    int | None,
    typer.Option(
        help="Backbone layers that a drafted token runs. \\[default: 0]",
        rich_help_panel=_LOSSLESS,
    ),
]
DraftHead = Annotated[
    DraftHeadBits | None,
    typer.Option(
        "--draft-lm-head-bits",
        help="Of the LM head that drafts. \\[default: 8 on the native engine, 16 elsewhere]",
        rich_help_panel=_LOSSLESS,
    ),
]
Ngram = Annotated[
    bool | None,
    typer.Option(
        "--ngram/--no-ngram",
        help="Draft out of the text itself where it repeats. \\[default: ngram]",
        rich_help_panel=_LOSSLESS,
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
    typer.Option(
        help="End the answer at this string, which may spell special tokens; may be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="Further variables of the chat template, as a JSON object such as "
        """'{"enable_thinking": false}'.""",
        rich_help_panel=_PROMPT,
    ),
]
AllowControlTokens = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens",
        help="What spells a control token in a message is one; by default it is text.",
        rich_help_panel=_PROMPT,
    ),
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
KvBits = Annotated[
    WeightBits,
    typer.Option(
        "--kv-bits",
        help="Of the KV cache: 16 (--dtype) or 8 (half the bytes; not the exact model).",
        rich_help_panel=_SYSTEM,
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="Backbone layers that stay in memory: off (all of them), auto (as many as tokens "
        "need), the first N, or as many as fit a size such as 2GiB. \\[default: off]",
        rich_help_panel=_SYSTEM,
    ),
]
NoMiss = Annotated[
    bool,
    typer.Option(
        "--no-miss",
        help="Tokens that would go deeper than the layers that stay leave behind the last of them.",
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
TaskLimit = Annotated[
    int | None, typer.Option(min=1, help="Items of a task at most.", rich_help_panel=TASKS)
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Where the tasks' files are. \\[default: $RIVER_LLM_DATA, else the Hub]",
        rich_help_panel=TASKS,
    ),
]
AllowCodeExecution = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Let humaneval run the model's programs, confined.",
        rich_help_panel=TASKS,
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Items that run together.", rich_help_panel=TASKS)
]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        help="Read the beginning of the prompt from this file, as far as it is the same, and keep "
        "the prompt there for the next time.",
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
