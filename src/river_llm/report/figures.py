"""The figures of a report: black on white, told apart by marks and lines, each with its command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.plots import save_figure
from river_llm.report.findings import Point, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS: dict[str, dict[str, Any]] = {
    "backbone": {"marker": "*", "markersize": 12, "color": "k"},
    "full": {"marker": "s", "markersize": 7, "color": "k"},
    "fixed": {"marker": "o", "markersize": 7, "color": "k", "markerfacecolor": "w"},
    "similarity": {"marker": "o", "markersize": 7, "color": "k"},
    "random": {"marker": "x", "markersize": 7, "color": "k"},
    "mask": {"marker": "^", "markersize": 7, "color": "k", "markerfacecolor": "w"},
    "recompute": {"marker": "v", "markersize": 7, "color": "k", "markerfacecolor": "w"},
    "propagate": {"marker": "D", "markersize": 6, "color": "k", "markerfacecolor": "w"},
    "monotonic": {"marker": "P", "markersize": 7, "color": "k", "markerfacecolor": "w"},
}
_LINES = ("-", "--", "-.", ":")
_LINE_MARKS = "os^vDx*"
_HEAT_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of the frontier.

    Attributes:
        title: of the task.
        label: of the quality, which is better upwards.
        points: of all arms.
    """

    title: str
    label: str
    points: Sequence[Point]


def draw_frontier(panels: Sequence[Panel], speed_label: str, command: str, path: Path) -> None:
    """Quality against speed, every arm; the dotted line joins those that no other one beats.

    Raises:
        RiverError: it can't be written. So do all of these.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(5 * columns, 4 * rows)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        best = frontier(panel.points)
        axes.plot([p.speed for p in best], [p.quality for p in best], "k:", linewidth=1)
        seen: set[str] = set()
        for point in panel.points:
            label = None if point.kind in seen else point.kind
            seen.add(point.kind)
            marks = _MARKS[point.kind]
            axes.plot([point.speed], [point.quality], linestyle="", label=label, **marks)
            if point.kind != "backbone":
                text = point.arm.removesuffix("-torch").partition("-")[2]
                at = (point.speed, point.quality)
                axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=6)
        axes.set(xlabel=speed_label, ylabel=panel.label)
        axes.set_title(panel.title, fontsize="medium")
        axes.margins(0.12)
        if place == 1:
            axes.legend(fontsize=7)
    save_figure(figure, command, path)


def draw_exit_depths(
    exits: Mapping[str, Sequence[Sequence[int]]], num_layers: int, command: str, path: Path
) -> None:
    """A histogram of the exit depth for each policy."""
    figure = _figure(8, 1 + 1.5 * len(exits))
    for axes, (name, windows) in zip(_rows(figure, len(exits)), exits.items(), strict=True):
        counts = Counter(layer for window in windows for layer in window)
        total = sum(counts.values())
        mean = sum(layer * count for layer, count in counts.items()) / total
        heights = [counts[layer] / total for layer in range(num_layers + 1)]
        axes.bar(range(num_layers + 1), heights, color="0.4", edgecolor="k")
        axes.axvline(mean, color="k", linestyle=":")
        axes.set(ylabel="share")
        axes.set_title(f"{name}: mean depth {mean:.1f} (dotted)", fontsize="small")
    axes.set(xlabel="backbone layers run")
    save_figure(figure, command, path)


def draw_exit_positions(
    windows: Sequence[Sequence[int]], name: str, num_layers: int, command: str, path: Path
) -> None:
    """Which share of the tokens at each position leaves at each depth."""
    length = max(map(len, windows))
    columns = min(_HEAT_COLUMNS, length)
    shares = [[0.0] * columns for _ in range(num_layers + 1)]
    totals = [0] * columns
    for window in windows:
        for position, layer in enumerate(window):
            column = position * columns // length
            shares[layer][column] += 1
            totals[column] += 1
    shares = [[n / max(1, t) for n, t in zip(row, totals, strict=True)] for row in shares]
    figure = _figure(9, 5)
    axes = figure.add_subplot()
    image = axes.imshow(
        shares,
        cmap="Greys",
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        vmin=0,
        extent=(0, length, -0.5, num_layers + 0.5),
    )
    figure.colorbar(image, label="share of the tokens")
    axes.set(xlabel="position in the text", ylabel="backbone layers run")
    axes.set_title(f"{name}, {len(windows)} windows", fontsize="medium")
    save_figure(figure, command, path)


def draw_similarity(
    reading: Mapping[str, Any], thresholds: Sequence[float], command: str, path: Path
) -> None:
    """State transition similarity of each layer."""
    low, middle, high = reading["similarity_quantiles"].values()
    layers = range(1, len(middle) + 1)
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    axes.fill_between(layers, low, high, color="0.85", label="80 % of the tokens")
    axes.plot(layers, middle, "k-o", markersize=3, label="median")
    for place, threshold in enumerate(thresholds):
        label = "thresholds" if place == 0 else None
        axes.axhline(threshold, color="k", linestyle=":", linewidth=0.8, label=label)
    axes.set(xlabel="backbone layer", ylabel="state transition similarity")
    axes.legend()
    save_figure(figure, command, path)


def draw_cosines(reading: Mapping[str, Any], command: str, path: Path) -> None:
    """Keys and values of the river against the backbone's, in each layer."""
    layers = range(1, len(reading["key_cosine"]) + 1)
    figure = _figure(8, 4)
    axes = figure.add_subplot()
    axes.plot(layers, reading["key_cosine"], "k-o", markersize=3, label="keys")
    axes.plot(layers, reading["value_cosine"], "k--s", markersize=3, label="values")
    axes.set(xlabel="layer", ylabel="cosine, river alone against backbone alone")
    axes.legend()
    save_figure(figure, command, path)


def draw_correlation(reading: Mapping[str, Any], command: str, path: Path) -> None:
    """A token's early similarity against how near its last layer's values come."""
    figure = _figure(6, 5)
    axes = figure.add_subplot()
    early = reading["early_similarity"]
    axes.plot(early, reading["final_value_cosine"], "k.", markersize=2)
    axes.set(
        xlabel=f"mean similarity in layers 1 to {reading['early_layers']}",
        ylabel="value cosine in the last layer",
    )
    r = reading["early_correlation"]
    title = "r can't be told" if r is None else f"r = {r:.3f}"
    axes.set_title(f"{title}, {reading['tokens']} tokens", fontsize="medium")
    save_figure(figure, command, path)


def draw_token_times(
    arms: Mapping[str, Mapping[str, Any]], measure: str, command: str, path: Path
) -> None:
    """The time of a token as the sequence grows, for each of some arms.

    Args:
        measure: ``seconds_per_token`` or ``mean_seconds_per_token``, see `measure_speed`.
    """
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for place, (name, found) in enumerate(arms.items()):
        axes.plot(
            found["positions"],
            [1000 * seconds for seconds in found[measure]],
            color="k",
            linestyle=_LINES[place % len(_LINES)],
            marker=_LINE_MARKS[place % len(_LINE_MARKS)],
            markersize=4,
            label=f"{name} ({found['engine']} engine)",
        )
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds a token")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    save_figure(figure, command, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows(figure: Figure, count: int) -> list[Axes]:
    rows = figure.subplots(count, 1, squeeze=False, sharex=True)
    return [row[0] for row in rows]
