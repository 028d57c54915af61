"""Every setting once: its default, what it means, what it may be. A value out of its range is a
`ConfigError`, one line that names the setting.

`RiverLM`, the command line, lm-eval's arguments and saved results all read these dataclasses, so a
new setting is one line here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from river_llm.errors import ConfigError
from river_llm.settings import Allowed, Settings, number, one_of, setting, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from river_llm.river.policy import ExitPolicy

    LogitsFunction = Callable[[Tensor, Tensor], Tensor]

Quantizer = Literal["hqq", "gptq", "rtn", "imported"]
EngineChoice = Literal["auto", "cpu", "torch"]
Dtype = Literal["bfloat16", "float16", "float32"]
PolicyName = Literal["never", "always", "tuned"]
Prefill = Literal["backbone", "river", "sequence"]

DEFAULT_MODEL = "smollm2"
DEFAULT_THRESHOLD = 0.9  # where the paper puts its deeper models; see docs/results.md
BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_AVERAGE_BITS = 4.5
GROUP_SIZES = (32, 64, 128)
MOST_DRAFT_TOKENS = 64
MOST_THREADS = 1024  # of the native core
MIN_TEMPERATURE = 1e-4  # besides 0: below it logits would leave the range of float32


@dataclass(frozen=True, slots=True)
class RiverConfig(Settings):
    """How every linear weight of an exit layer is quantised. Activations stay in 16 bits (W4A16).

    HQQ is half-quadratic quantisation (Badri and Shaji 2023), the paper's default. GPTQ (Frantar et
    al. 2022) fits the weights to calibration text and loses a third as much; `build` takes it. The
    group size has to divide the input width of every linear layer.

    With ``bits="auto"`` each matrix has a width of its own out of `BITS`, and its codes (scales and
    zeros don't count) take `average_bits` a weight at most.

    Raises:
        ConfigError: a value is out of its range, or one width is to have an average.
    """

    bits: int | Literal["auto"] = setting(
        4,
        "Bits of a river's weight, or auto: each matrix has as many as it needs.",
        one_of(*BITS, "auto"),
    )
    group_size: int = setting(64, "Weights that share a scale and a zero.", one_of(*GROUP_SIZES))
    quantizer: Quantizer = setting(
        "hqq",
        "How weights are quantised: hqq, gptq (better, slower), rtn (round to nearest); imported "
        "is what build --from makes.",
        one_of(*get_args(Quantizer)),
    )
    average_bits: float | None = setting(
        None,
        f"Of a weight on average, with auto; by default {DEFAULT_AVERAGE_BITS}.",
        number(lambda value: 4 <= value <= 8, "a number from 4 to 8"),
    )

    def __post_init__(self) -> None:
        super(RiverConfig, self).__post_init__()  # slots make another class
        if self.bits == "auto" and self.average_bits is None:
            object.__setattr__(self, "average_bits", DEFAULT_AVERAGE_BITS)
        if self.bits != "auto" and self.average_bits is not None:
            raise ConfigError(f"average_bits goes with bits auto, not with {self.bits} bits")

    @property
    def needs_text(self) -> bool:
        """Whether a river is fitted to calibration text."""
        return self.quantizer == "gptq" or self.bits == "auto"

    @property
    def width(self) -> str:
        """Bits of a weight, or with auto their average: `4`, `4.5`."""
        return f"{self.average_bits or self.bits}"

    def describe_bits(self, average: float | None = None) -> str:
        """The width in words: `4 bits`, or `4.50 bits on average`.

        Args:
            average: what a river has; None: what was ordered.
        """
        if self.bits != "auto":
            return f"{self.bits} bits"
        return f"{self.average_bits if average is None else average:.2f} bits on average"


@dataclass(frozen=True, slots=True)
class EngineConfig(Settings):
    """How a model is loaded, and what computes."""

    engine: EngineChoice = setting(
        "auto",
        "What computes: the native engine (cpu), or PyTorch (torch), for every model and device.",
        one_of(*get_args(EngineChoice)),
    )
    threads: int | None = setting(
        None,
        "CPU threads; by default all cores of the process.",
        whole(1, MOST_THREADS),
        daily=True,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; by default CUDA where there is one.")
    dtype: Dtype = setting(
        "bfloat16",
        "Of weights, activations and KV cache; the native engine has bfloat16.",
        one_of(*get_args(Dtype)),
    )
    backbone_bits: int = setting(
        16,
        "Bits of the backbone's weights: 16, or 8 (native engine; not the exact model).",
        one_of(16, 8),
    )
    lm_head_bits: int = setting(
        16,
        "Bits of the LM head: 16, or 8 (native engine; faster, not the exact model).",
        one_of(16, 8),
    )
    kv_bits: int = setting(
        16,
        "Bits of the KV cache: 16 (the dtype), or 8 (half the bytes; not the exact model).",
        one_of(16, 8),
    )
    offload: str | int | None = setting(
        None,
        "Backbone layers that stay in memory: off (all of them), auto (as many as tokens need), "
        "the first N, or as many as fit a size such as 2GiB.",
        daily=True,
    )
    no_miss: bool = setting(
        False, "Tokens that would go deeper than the layers that stay leave after the last of them."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model. Read it first.")

    def __post_init__(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")  # a torch.dtype too
        object.__setattr__(self, "dtype", dtype)
        super(EngineConfig, self).__post_init__()  # slots make another class
        if self.engine == "cpu" and dtype != "bfloat16":
            raise ConfigError(
                f"the native engine computes in bfloat16, not in {dtype}; leave the dtype out, or "
                "take --engine torch"
            )
        if self.engine == "torch" and (self.backbone_bits, self.lm_head_bits) != (16, 16):
            raise ConfigError(
                "8 bits of backbone and LM head are for the native engine; take --engine cpu"
            )
        from river_llm.river.residency import OffloadConfig  # which needs this module

        OffloadConfig.of(self.offload, self.no_miss)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch has it."""
        import torch

        return cast("torch.dtype", getattr(torch, self.dtype))


@dataclass(frozen=True, slots=True)
class PolicyConfig(Settings):
    """When tokens leave the backbone, as the command line names it; see `ExitPolicy`.

    Raises:
        ConfigError: a value is out of its range, or two contradict each other.
    """

    policy: PolicyName | None = setting(
        None,
        "Tokens never leave, always at once, or as `river-llm tune` chose for the river; without a "
        "policy, --threshold and --exit-layer, answers are lossless.",
        one_of(*get_args(PolicyName)),
    )
    threshold: float | None = setting(
        None,
        "Leave after the first layer whose similarity exceeds this.",
        number(lambda value: -1 <= value <= 1, "a cosine, in [-1, 1]"),
        daily=True,
    )
    exit_layer: int | None = setting(
        None, "Every token leaves after this many layers.", whole(0), daily=True
    )
    first_layer: int = setting(1, "First layer after which --threshold counts.", whole(1))
    second_look: float | None = setting(
        None,
        "A token that left runs again through the backbone where the next one is so unsure: where "
        "1 - p2/p1 of the two most likely is this or less.",
        number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        daily=True,
    )
    prefill: Prefill | None = setting(
        None,
        "How the prompt runs in river mode: backbone, river, or sequence (the paper's: it leaves "
        "as a whole); by default backbone, with --policy always river.",
        one_of(*get_args(Prefill)),
    )

    def __post_init__(self) -> None:
        super(PolicyConfig, self).__post_init__()
        named = ("policy", "threshold", "exit_layer")
        given = [name for name in named if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.first_layer != 1 and self.threshold is None:
            raise ConfigError("first_layer goes with threshold")
        if self.policy == "tuned" and self.prefill is not None:
            raise ConfigError("a tuned policy brings its own prefill; leave it out")
        if self.is_lossless and self.prefill is not None:
            raise ConfigError("prefill goes with a policy; lossless mode runs prompts in full")
        if self.second_look is not None and (self.is_lossless or self.policy == "never"):
            raise ConfigError(
                "second_look goes with a policy by which tokens leave: threshold, exit_layer, or "
                "policy always"
            )

    @property
    def is_lossless(self) -> bool:
        """Whether there is no policy."""
        return self.policy is None and self.threshold is None and self.exit_layer is None

    def exit_policy(self) -> ExitPolicy | Literal["tuned"] | None:
        """The policy; None: lossless mode. ``"tuned"`` is what was saved with the river."""
        from river_llm.river.policy import ExitPolicy

        rules: dict[str, Any] = {} if self.prefill is None else {"prefill": self.prefill}
        rules |= {} if self.second_look is None else {"second_look": self.second_look}
        if self.threshold is not None:
            return ExitPolicy.similarity(self.threshold, self.first_layer, **rules)
        if self.exit_layer is not None:
            return ExitPolicy.fixed(self.exit_layer, **rules)
        if self.policy is None or self.policy == "tuned":
            return self.policy
        return ExitPolicy.always(**rules) if self.policy == "always" else ExitPolicy.never(**rules)


@dataclass(frozen=True, slots=True)
class TuneConfig(Settings):
    """How a setting is chosen by a budget."""

    confidence: float = setting(
        0.95,
        "1 - the largest chance that what is certified is over the budget.",
        number(lambda value: 0.5 <= value <= 0.9999, "between 0.5 and 0.9999"),
        daily=True,
    )
    sequences: int = setting(
        120, "Texts or prompts at most: a quarter to learn, half to certify.", whole(1), daily=True
    )
    tokens: int = setting(128, "Tokens of a text, or of an answer at most.", whole(8), daily=True)
    rounds: int = setting(5, "Rounds that speeds are measured in.", whole(1))
    seed: int = setting(0, "Of the texts that the model writes, and of the split.", whole(0, 2**62))


@dataclass(frozen=True, slots=True)
class SamplingConfig(Settings):
    """How tokens are chosen and when generation stops.

    `stop` may be one string or several. `processors` are more logits processors of `transformers`,
    or functions like them of (token ids `[1, T]`, logits `[1, V]`) that give logits; they come
    after the penalty and before the temperature. In lossless mode they are asked about drafted text
    too, so their answer may depend on nothing but what they are given.
    """

    max_new_tokens: int = setting(
        256,
        "Tokens of the answer at most.",
        whole(1),
        option=("--max-new-tokens", "-n"),
        daily=True,
    )
    temperature: float = setting(
        0.0,
        "0 is greedy.",
        number(
            lambda value: value == 0 or MIN_TEMPERATURE <= value < math.inf,
            f"0 (greedy), or a number, {MIN_TEMPERATURE} or more",
        ),
        daily=True,
    )
    top_k: int = setting(0, "Sample among so many most probable tokens; 0 takes all.", whole(0))
    top_p: float = setting(
        1.0,
        "Sample among the most probable tokens that hold this share.",
        number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        daily=True,
    )
    min_p: float = setting(
        0.0,
        "Leave out tokens less probable than this share of the most probable one.",
        number(lambda value: 0 <= value <= 1, "between 0 and 1"),
    )
    repetition_penalty: float = setting(
        1.0,
        "Above 1 makes tokens of the text less probable.",
        number(lambda value: 0 < value < math.inf, "above 0 and finite"),
    )
    seed: int | None = setting(
        None,
        "Of the random numbers, which the texts of a batch don't share. By default a new one.",
        whole(0, 2**63 - 1),
        daily=True,
    )
    stop: tuple[str, ...] | str | None = setting(
        (),
        "End the answer at this string, which may spell special tokens; may be repeated.",
        Allowed(
            lambda value: (
                isinstance(value, tuple) and all(isinstance(one, str) and one for one in value)
            ),
            "a string or several, no empty string",
        ),
        daily=True,
    )
    processors: tuple[LogitsFunction, ...] = setting(
        (),
        "More logits processors.",
        Allowed(
            lambda value: isinstance(value, tuple) and all(map(callable, value)),
            "functions of (token ids, logits)",
        ),
        option=("",),
    )

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = [] if stop is None else stop
        for name, values in (("stop", stop), ("processors", self.processors)):
            object.__setattr__(self, name, tuple(values) if isinstance(values, list) else values)
        super(SamplingConfig, self).__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, without the processors."""
        values = super(SamplingConfig, self).to_dict()
        del values["processors"]
        return values


@dataclass(frozen=True, slots=True)
class DraftConfig(Settings):
    """How tokens are guessed in lossless mode. It decides over speed only: whatever is drafted, the
    tokens are the backbone's.
    """

    tokens: int | None = setting(
        None,
        "Tokens of every draft; by default up to 6, fewer where the river is unsure.",
        whole(1, MOST_DRAFT_TOKENS),
        option=("--draft-tokens",),
    )
    exit_layer: int = setting(
        0, "Backbone layers that a drafted token runs.", whole(0), option=("--draft-exit-layer",)
    )
    lm_head_bits: int | None = setting(
        None,
        "Bits of the LM head that drafts; by default 8 on the native engine, 16 elsewhere.",
        one_of(16, 8, 4),
        option=("--draft-lm-head-bits",),
    )
    ngram: bool = setting(True, "Draft out of the text itself where it repeats.")


@dataclass(frozen=True, slots=True)
class ChatConfig(Settings):
    """How messages become tokens.

    `chat_template_kwargs` are further variables that the chat template reads, such as
    ``{"enable_thinking": False}``.
    """

    chat_template_kwargs: Mapping[str, Any] | None = setting(
        None,
        "Further variables of the chat template, as a JSON object such as "
        """'{"enable_thinking": false}'.""",
        Allowed(lambda value: isinstance(value, Mapping), "an object with variables"),
    )
    allow_control_tokens: bool = setting(
        False, "What spells a control token in a message is one; by default it is text."
    )


@dataclass(frozen=True, slots=True)
class PromptConfig(ChatConfig):
    """The same, of one prompt.

    Raises:
        ConfigError: a raw prompt is to go through a chat template.
    """

    raw: bool = setting(
        False,
        "Give the prompt to the model as it is, without chat template; what spells a control token "
        "in it is one.",
    )

    def __post_init__(self) -> None:
        super(PromptConfig, self).__post_init__()
        if self.raw and (self.chat_template_kwargs or self.allow_control_tokens):
            raise ConfigError(
                "a raw prompt goes through no chat template, and its control tokens are what they "
                "are; leave chat_template_kwargs and allow_control_tokens out"
            )
