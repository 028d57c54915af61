"""Figures. They are readable in black and white and carry the command that made them."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.errors import RiverError
from river_llm.river.policy import ExitPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from river_llm.measure.inspection import TextInspection
    from river_llm.measure.tune import Tuning
    from river_llm.river.tuned import QualityBudget

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def plot_inspection(
    inspection: TextInspection, policy: ExitPolicy, command: str, path: Path
) -> None:
    """Similarity, K and V cosine per layer, and the exit depth of every token.

    Args:
        command: what made the figure; it stands below it.
        path: a file whose suffix is one of `PLOT_SUFFIXES`.

    Raises:
        RiverError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_tokens = inspection.similarities.shape
    layers = range(1, num_layers + 1)
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    by_similarity, by_cosine, by_token = figure.subplots(3, 1)

    quantiles = inspection.similarities.float().nanquantile(
        inspection.similarities.new_tensor([0.1, 0.5, 0.9]), dim=1
    )
    low, middle, high = quantiles.tolist()
    by_similarity.fill_between(layers, low, high, color="0.85", label="80 % of the tokens")
    by_similarity.plot(layers, middle, "k-o", markersize=3, label="median")
    if policy.threshold is not None:
        by_similarity.axhline(policy.threshold, color="k", linestyle=":", label="threshold")
    by_similarity.set(xlabel="backbone layer", ylabel="state transition similarity")
    by_similarity.legend()

    by_cosine.plot(layers, inspection.key_cosine.tolist(), "k-o", markersize=3, label="keys")
    by_cosine.plot(layers, inspection.value_cosine.tolist(), "k--s", markersize=3, label="values")
    by_cosine.set(xlabel="layer", ylabel="cosine, river against backbone")
    by_cosine.legend()

    by_token.bar(range(num_tokens), inspection.exit_layers.tolist(), width=1.0, color="0.4")
    by_token.set(xlabel="token", ylabel="backbone layers run", ylim=(0, num_layers))
    by_token.set_title(f"exit depth, {policy.describe()}", fontsize="medium")

    save_figure(figure, command, path)


def plot_tuning(found: Tuning, budget: QualityBudget, command: str, path: Path) -> None:
    """Loss against speed of all settings, with the front, the budget and what was chosen.

    Args:
        command, path: as of `plot_inspection`.

    Raises:
        RiverError: it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(one, one.speed_up.median, one.loss(budget)) for one in found.measured]
    front = sorted((x, y) for one, x, y in points if one.is_on_front)
    axes.plot(*zip(*front, strict=True), "k:", linewidth=1, label="no other is better in both")
    for one, x, y in points:
        axes.plot(x, y, "k*" if one is found.chosen else "ko", fillstyle="none")
        if one.is_on_front:
            words = f"{one.setting.name}\n{Path(one.setting.river).name}"
            axes.annotate(words, (x, y), fontsize=6, xytext=(4, -8), textcoords="offset points")
    is_agreement = budget.measure == "agreement"
    limit = axes.axvline if budget.measure == "speed" else axes.axhline
    limit(budget.loss, color="k", linestyle="--", linewidth=0.8, label=budget.describe())
    label = "tokens that aren't the backbone's" if is_agreement else "mean KLD, nats"
    axes.set(xlabel="times the backbone's speed", ylabel=label)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, command, path)


def save_figure(figure: Figure, command: str, path: Path) -> None:
    """Write a figure with the command that made it below.

    Raises:
        RiverError: it can't be written.
    """
    command = textwrap.fill(command, int(15.5 * figure.get_figwidth()))
    figure.supxlabel(command, fontsize=7, family="monospace", parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # shown as boxes
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise RiverError(f"can't write the figure to {path}: {error}") from error
