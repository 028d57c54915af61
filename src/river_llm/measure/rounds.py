"""Interleaved rounds A B C, C B A, ..., each beside the memory bandwidth of its moment.

Ratios are taken round by round, since both sides had the same machine then.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from river_llm.errors import ConfigError

SHORT_CONTEXT = 16  # tokens that stand before the first decoded one at depth 0

Progress = Callable[[int, int], None]  # (passes done, passes in all)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Workload:
    """One test.

    Attributes:
        kind: ``"prompt"``: all tokens in one pass. ``"decode"``: one token for each sequence at a
            time.
        tokens: processed or decoded, for each sequence.
        depth: tokens in the cache before it.
        batch: sequences at once.
    """

    kind: Literal["prompt", "decode"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench has it: ``pp512``, ``tg128 @ d4096``; a batch as ``tg128 b4``."""
        name = f"{'pp' if self.kind == 'prompt' else 'tg'}{self.tokens}"
        if self.batch > 1:
            name += f" b{self.batch}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def context(self) -> int:
        """Tokens of each sequence in the cache when the clock starts."""
        return max(self.depth, SHORT_CONTEXT) if self.kind == "decode" else self.depth

    @property
    def end(self) -> int:
        """Tokens of each sequence in the cache when the clock stops."""
        return self.context + self.tokens


def make_workloads(
    prompt_tokens: Iterable[int],
    new_tokens: Iterable[int],
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    context_length: int | None = None,
) -> list[Workload]:
    """Every test at every depth. Batches are decoded only: B prompts are a prompt of B times the
    length as far as speed goes.

    Raises:
        ConfigError: a test doesn't fit the model's context.
    """
    prompts = [Workload("prompt", n, depth) for depth in depths for n in prompt_tokens if n]
    lengths = [(n, depth) for depth in depths for n in new_tokens if n]
    decodes = [Workload("decode", *length, batch) for length in lengths for batch in batches]
    for workload in prompts + decodes:
        if context_length is not None and workload.end > context_length:
            raise ConfigError(
                f"{workload.name} needs {workload.end} tokens of context, and the model has "
                f"{context_length}; lower --depth, --prompt-tokens or --new-tokens"
            )
    return prompts + decodes


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass over a workload.

    Attributes:
        seconds: between the clock's start and stop.
        tokens: of all sequences together.
        bytes_per_token: that decoding had to read, the mean over the pass; None for prompts, whose
            speed isn't the memory's, and where it isn't known.
        mean_exit_layer: backbone layers of each decoded token; None where it isn't known.
        second_looks: share of decoded tokens that ran again; None where the policy has none.
        bandwidth: bytes per second that the memory gave, the mean of the readings right before and
            right after.
    """

    seconds: float
    tokens: int
    bytes_per_token: float | None = None
    mean_exit_layer: float | None = None
    second_looks: float | None = None
    bandwidth: float = math.nan

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds

    @property
    def bandwidth_fraction(self) -> float | None:
        """Bytes that were read each second over the bandwidth; above one where weights stay in a
        cache that the bandwidth's buffer doesn't fit in."""
        read = self.bytes_per_token
        return None if read is None else read * self.tokens_per_second / self.bandwidth


class Variant(Protocol):
    """One way to run the model; `engine` is what computes, as ``cpu`` or ``llama.cpp``."""

    name: str
    engine: str

    def takes(self, workload: Workload) -> bool:
        """Whether the workload says something about this variant."""
        ...

    def prepare(self, workload: Workload) -> None:
        """Bring the cache to where the workload begins. Not timed."""
        ...

    def run(self, workload: Workload) -> Timing:
        """Do the workload once."""
        ...


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of the rounds, with the least and the most."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1
        return f"{self.median:.{digits}f} [{self.lowest:.{digits}f} - {self.highest:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Result:
    """One variant in one test."""

    variant: str
    engine: str
    workload: Workload
    rounds: list[Timing] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> Spread:
        """Of all sequences together."""
        return Spread.of([one.tokens_per_second for one in self.rounds])

    def median(self, name: str) -> float | None:
        """Of an attribute of the rounds' `Timing`; None where it isn't known."""
        values = [getattr(one, name) for one in self.rounds]
        return None if None in values else statistics.median(values)

    def times_as_fast_as(self, other: Result) -> Spread:
        """Round by round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return Spread.of([a.tokens_per_second / b.tokens_per_second for a, b in pairs])

    def to_dict(self, others: Sequence[Result]) -> dict[str, Any]:
        """Plain JSON values, with the ratios to `others`."""
        names = (
            "bandwidth",
            "bytes_per_token",
            "bandwidth_fraction",
            "mean_exit_layer",
            "second_looks",
        )
        return {
            **asdict(self),
            "test": self.workload.name,
            "tokens_per_second": asdict(self.tokens_per_second),
            **{name: self.median(name) for name in names},
            "ratios": {other.variant: asdict(self.times_as_fast_as(other)) for other in others},
        }


def interleaved(items: Sequence[_Item], rounds: int) -> Iterator[Sequence[_Item]]:
    """The items of each round, every other one from last to first: where the machine changes
    during a round, none is always the later one."""
    for number in range(rounds):
        yield items if number % 2 == 0 else items[::-1]


def measure(
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    rounds: int,
    read_bandwidth: Callable[[], float],
    progress: Progress | None = None,
) -> Iterator[list[Result]]:
    """Run every test with every variant that takes it, in interleaved rounds behind one that warms
    up; the results of a test, in the order of the variants, once it is done.

    Args:
        rounds: that count.
        read_bandwidth: bytes per second that the memory gives now.
    """
    takers = [[one for one in variants if one.takes(workload)] for workload in workloads]
    total, done = (1 + rounds) * sum(map(len, takers)), 0
    for workload, taking in zip(workloads, takers, strict=True):
        results = [Result(one.name, one.engine, workload) for one in taking]
        pairs = list(zip(taking, results, strict=True))
        for number, order in enumerate(interleaved(pairs, 1 + rounds)):
            for variant, result in order:
                variant.prepare(workload)
                before = read_bandwidth() if number else 0.0
                timing = variant.run(workload)
                if number:
                    bandwidth = (before + read_bandwidth()) / 2
                    result.rounds.append(replace(timing, bandwidth=bandwidth))
                done += 1
                if progress:
                    progress(done, total)
        yield results
