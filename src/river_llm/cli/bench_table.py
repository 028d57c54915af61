"""What `river-llm bench` shows: speeds beside the limit, then ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from river_llm.cli.render import stdout
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from river_llm.benchmark.measure import Spread
    from river_llm.benchmark.suite import Result

_GIGA = 1e9
_MEGA = 1e6
_WIDEST = 400


def print_results(results: Sequence[Result], output: Mapping[str, Any]) -> None:
    """Both tables, and what a reader has to know; `output` is what --json prints."""
    river = output["river"]
    stdout.print(
        f"{output['model']}, {output['num_layers']} layers, river of {river['bits']} bits in "
        f"groups of {river['group_size']} ({river['quantizer']})"
    )
    stdout.print(f"{output['processor']}, {output['date']}")
    # as wide as they are: a figure that is cut off is of no use
    wide = Console(width=_WIDEST, highlight=False, markup=False)
    wide.print(speed_table(results))
    wide.print(ratio_table(results))
    stdout.print(
        f"tokens/s: median [slowest - fastest] of {output['rounds']} rounds in turn; speed-up: "
        "over the backbone, round by round; depth: backbone layers of a token; GB/s: what the "
        f"memory gave right before and after ({output['bandwidth_source']}, "
        f"{format_bytes(output['bandwidth_buffer_bytes'])}); limit: MB/token x tokens/s over GB/s"
    )
    if output["llama_cpp_build"]:
        stdout.print(f"llama.cpp was built for {output['llama_cpp_build']}")
    for name, share in output["same_top"].items():
        stdout.print(f"{name}: {100 * share:.0f} % of its likeliest tokens are the model's")
    for note in output["notes"]:
        stdout.print(f"note: {note}")


def speed_table(results: Sequence[Result]) -> Table:
    """One row for each arm in each test."""
    table = _table(left=("engine", "arm", "test"))
    headings = ["threads", "tokens/s", "speed-up", "depth", "MB/token", "GB/s", "limit"]
    if any(result.disturbed for result in results):
        headings.append("disturbed")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        read, limit, depth = result.bytes_per_token, result.limit_fraction, result.mean_exit_layer
        speed_up = next(iter(result.ratios.values()))
        cells = [
            result.engine,
            _own_name(result),
            result.workload.name,
            str(result.threads),
            _spread(result.speed),
            f"{speed_up.median:.2f}x",
            "" if depth is None else f"{depth:.1f}",
            "" if read is None else f"{read / _MEGA:.1f}",
            f"{result.bandwidth.median / _GIGA:.1f}",
            "" if limit is None else f"{100 * limit.median:.0f} %",
        ]
        if result.worst_disturbed is not None:
            cells.append(f"{result.worst_disturbed:.2f}x")
        table.add_row(*map(Text, cells))
    return table


def ratio_table(results: Sequence[Result]) -> Table:
    """How many times as fast each arm is as the backbone and as each peer."""
    table = _table(left=("arm", "test", "threads"), title="times as fast as")
    names = list(dict.fromkeys(name for result in results for name in result.ratios))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        cells = [
            f"{result.ratios[name].median:.2f}x" if name in result.ratios else "" for name in names
        ]
        row = [result.arm, result.workload.name, str(result.threads), *cells]
        table.add_row(*map(Text, row))
    return table


def _table(left: Sequence[str], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    return table


def _own_name(result: Result) -> str:
    """The arm's name without the engine's, which stands beside it."""
    return result.arm.removeprefix(f"{result.engine} ")


def _spread(spread: Spread) -> str:
    digits = 0 if spread.median >= 100 else 1
    ends = f"{spread.lowest:.{digits}f} - {spread.highest:.{digits}f}"
    return f"{spread.median:.{digits}f} [{ends}]"
