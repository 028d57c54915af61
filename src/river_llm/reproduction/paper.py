"""What the paper reports, as data: models, tasks, shots, thresholds and figures.

Source: Shen and Zou, "River-LLM: Large Language Model Seamless Exit Based on KV Share", arXiv
2604.18396, ACL 2026, one NVIDIA A40, batch 1. The figures are from second-hand summaries of the
paper and were not checked against its tables; what no summary gives is None here, and is shown as
unknown.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from river_llm.errors import ConfigError

SOURCE = (
    'Shen and Zou, "River-LLM: Large Language Model Seamless Exit Based on KV Share", '
    "arXiv 2604.18396, ACL 2026; figures from second-hand summaries of the paper, not checked "
    "against its tables"
)
MACHINE = "NVIDIA A40"
MACHINE_BANDWIDTH = 696  # GB/s of memory, by its data sheet; 10**9 bytes
BITS = 4  # of the exit river
MEMORY_CONTEXT = 65_536  # tokens
UNKNOWN = "unknown"  # a figure that no summary gives, in tables
NEAR_LOSSLESS = 0.7  # the threshold that the paper calls so


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm on one task.

    Attributes:
        accuracy: in per cent.
        tokens_per_second: of generation.
        speed_up: over the backbone.
    """

    accuracy: float | None = None
    tokens_per_second: float | None = None
    speed_up: float | None = None


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """The three arms on one task; `awq` is River with exit layers by AWQ."""

    backbone: Figures = Figures()
    full: Figures = Figures()
    river: Figures = Figures()
    awq: Figures = Figures()


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """At `MEMORY_CONTEXT` tokens, in the paper's GB, which are 2**30 bytes: the weights of
    Llama-3.1-8B in 16 bits and its keys and values come to just 22.96 of those.

    Attributes:
        backbone, full, offloaded: the arms.
        reading: what the figures seem to count, by `ModelSizes`.
    """

    backbone: float
    full: float
    offloaded: float
    reading: str = ""


@dataclass(frozen=True, slots=True)
class PaperTask:
    """A task as the paper asks it.

    Attributes:
        name: of ours.
        title: the paper's.
        shots: solved examples in the prompt.
    """

    name: str
    title: str
    shots: int = 0


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of the paper.

    Attributes:
        name: on the command line.
        title: for people.
        hub: where its weights are.
        num_layers, hidden_size: by which other weights are told.
        thresholds: of similarity exits.
        table_thresholds: lowest and highest that the figures may be of.
        figures: by task.
        memory: None where not known.
        read_gb: 10**9 bytes of 16-bit weights that a token of the backbone reads: all but an input
            embedding of its own.
    """

    name: str
    title: str
    hub: str
    num_layers: int
    hidden_size: int
    thresholds: tuple[float, ...]
    table_thresholds: tuple[float, float]
    figures: Mapping[str, TaskFigures] = field(default_factory=dict)
    memory: MemoryFigures | None = None
    read_gb: float | None = None

    @property
    def bandwidth_share(self) -> float | None:
        """Of the paper's card's bandwidth, what its backbone reaches on GSM8K; None: not known."""
        found = self.figures.get("gsm8k", TaskFigures())
        speed, river = found.backbone.tokens_per_second, found.river
        if speed is None and river.tokens_per_second and river.speed_up:
            speed = river.tokens_per_second / river.speed_up
        if speed is None or self.read_gb is None:
            return None
        return speed * self.read_gb / MACHINE_BANDWIDTH

    def may_be_of(self, threshold: float) -> bool:
        """Whether the figures may be of this threshold."""
        lowest, highest = self.table_thresholds
        return lowest <= threshold <= highest


TASKS = (
    PaperTask("gsm8k", "GSM8K", shots=5),
    PaperTask("math500", "MATH", shots=4),
    PaperTask("humaneval", "HumanEval"),
    PaperTask("boolq", "BoolQ"),
    PaperTask("hellaswag", "HellaSwag"),
    PaperTask("arc_easy", "ARC"),
    PaperTask("arc_challenge", "ARC"),
    PaperTask("mmlu", "MMLU"),
)

_LLAMA = (0.5, NEAR_LOSSLESS), (0.5, 0.5)
_DEEPER = (0.8, 0.9), (0.8, 0.9)  # the paper names the range

MODELS = (
    PaperModel(
        "llama-3.2-1b-instruct",
        "Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        16,
        2048,
        *_LLAMA,
        {
            "gsm8k": TaskFigures(Figures(33.2, 84.5), Figures(25.1), Figures(29.3, 182.9, 2.16)),
            "math500": TaskFigures(Figures(17.8), Figures(12.2), Figures(14.6, 189.2, 1.88)),
            "humaneval": TaskFigures(river=Figures(23.2, 171.8, 1.71)),
        },
        read_gb=2.47,
    ),
    PaperModel(
        "llama-3.1-8b-instruct",
        "Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        32,
        4096,
        *_LLAMA,
        {
            "gsm8k": TaskFigures(
                Figures(78.2),
                Figures(69.8),
                Figures(74.4, 45.0, 1.78),
                awq=Figures(77.3, 46.9),
            ),
            "math500": TaskFigures(river=Figures(26.6, 43.1, 1.72)),
            "humaneval": TaskFigures(Figures(57.3), Figures(50.2), Figures(55.5, 44.7, 1.77)),
        },
        MemoryFigures(
            22.96,
            12.47,
            14.73,
            "12.47 comes out without scales and zeros, and with the LM head in 4 bits too; with "
            "the head in 16 bits that is 13.21, and 14.73 is 13.21 and 3.75 backbone layers of "
            "0.41. So the two seem to have different heads.",
        ),
        read_gb=15.01,
    ),
    PaperModel(
        "phi-4-mini",
        "Phi-4-mini",
        "microsoft/Phi-4-mini-instruct",
        32,
        3072,
        *_DEEPER,
        {"gsm8k": TaskFigures(river=Figures(81.0, 115.0, 1.61))},
    ),
    PaperModel(
        "ministral-3-8b",
        "Ministral-3-8B",
        "mistralai/Ministral-3-8B-Instruct-2512-BF16",
        34,
        4096,
        *_DEEPER,
        {
            "gsm8k": TaskFigures(river=Figures(84.3, 61.8, 1.77)),
            "math500": TaskFigures(Figures(48.1), Figures(46.0), Figures(46.6, speed_up=1.85)),
        },
    ),
)

DEFAULT_THRESHOLDS = _LLAMA[0]  # for a model that the paper doesn't have
MEAN_DEPTH = "3 to 4"  # backbone layers of a token, on average
OVER_FULL = "about 0.9"  # River's speed over full quantisation
LAYER_SPEED = "2.4"  # an exit layer's throughput over a backbone layer's


def find_model(name: str) -> PaperModel:
    """The model of the paper of that name: ours, or the one in the Hub.

    Raises:
        ConfigError: the paper has none; the message has the nearest names, or all of them.
    """
    known = {model.name: model for model in MODELS}
    known |= {model.hub.rpartition("/")[2].lower(): model for model in MODELS}
    wanted = name.rpartition("/")[2].lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return known[wanted]
    near = dict.fromkeys(known[one].name for one in difflib.get_close_matches(wanted, known))
    if near:
        raise ConfigError(f"the paper has no model {name!r}; did you mean {' or '.join(near)}?")
    names = ", ".join(model.name for model in MODELS)
    raise ConfigError(
        f"the paper has no model {name!r}; it has {names}; --model runs its tasks on another one"
    )


def find_tasks(names: list[str]) -> list[PaperTask]:
    """The paper's tasks of these names, all of them where none is named.

    Raises:
        ConfigError: the paper has no such task, or it is named twice.
    """
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), known)
            words = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"the paper has no task {name!r}; {words}")
    if len(set(names)) < len(names):
        raise ConfigError("a task is named twice")
    return [known[name] for name in names] if names else list(TASKS)
