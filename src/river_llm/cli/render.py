"""What the commands show: coloured tokens, tables."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from river_llm.generate import (
        GenerationResponse,
        GenerationResult,
        LosslessStatistics,
        Origin,
    )
    from river_llm.measure.comparison import Compared
    from river_llm.measure.tune import Tuning
    from river_llm.river.residency import OffloadStatistics

# What a terminal obeys and does not show: C0 but newline and tab, delete, C1, and the characters
# that turn the direction of the text around them.
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_WITHOUT_OBEYED = dict.fromkeys(code for code in _OBEYED if chr(code) not in "\n\t")

_NGRAM_STYLE = "#4aa3e6"
_WIDEST = 400
_POSITIONS = 6  # of a draft that are shown

stdout = Console(highlight=False, soft_wrap=True, markup=False)
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def print_whole(table: Table) -> None:
    """A table on stdout, as wide as it is: no figure is cut off."""
    Console(width=_WIDEST, highlight=False, markup=False).print(table)


def exit_layer_style(exit_layer: int, num_layers: int) -> str:
    """From green (left early) over yellow to red (ran the whole backbone)."""
    hue = (1 - exit_layer / num_layers) / 3
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, 0.9))
    return f"#{red:02x}{green:02x}{blue:02x}"


def print_token(text: str, exit_layer: int, num_layers: int, origin: Origin = "backbone") -> None:
    """A piece of the answer, at once: to a terminal in the colour of its exit layer, in lossless
    mode of what guessed it, and without control characters; to a file as it is."""
    if stdout.is_terminal:
        text = text.translate(_WITHOUT_OBEYED)
        style = exit_layer_style(0 if origin == "river" else exit_layer, num_layers)
        if origin == "ngram":
            style = _NGRAM_STYLE
        stdout.print(Text(text, style, tab_size=8), end="")
    else:
        stdout.file.write(text)
    stdout.file.flush()


def print_response(response: GenerationResponse, num_layers: int) -> None:
    """The same, of a stream's next piece."""
    print_token(response.text, response.exit_layer, num_layers, response.origin)


def lossless_line(statistics: LosslessStatistics) -> str:
    """One line about what drafting brought."""
    if not statistics.verifications:
        return "lossless: nothing was verified"
    accepted = ", ".join(f"{share:.0%}" for share in statistics.acceptance_by_position[:_POSITIONS])
    return (
        f"lossless: {statistics.tokens_per_verification:.2f} tokens a verification, "
        f"{statistics.draft_share:.0%} of the tokens drafted ({statistics.ngram_tokens} by the "
        f"text itself), accepted by position: {accepted or 'no drafts'}; drafting "
        f"{statistics.draft_seconds:.2f} s, verifying {statistics.verify_seconds:.2f} s"
    )


def print_statistics(result: GenerationResult) -> None:
    """What came of an answer, on stderr: of drafting, and of the whole."""
    if result.lossless is not None:
        stderr.print(lossless_line(result.lossless), style="dim")
    stderr.print(statistics_line(result), style="dim")


def statistics_line(result: GenerationResult) -> str:
    """One line about a whole answer."""
    parts = [f"{len(result.tokens)} tokens ({result.finish_reason})"]
    if result.decode_tokens_per_second is not None:
        parts.append(f"{result.decode_tokens_per_second:.1f} tokens/s")
    if result.time_to_first_token is not None:
        parts.append(f"first token after {result.time_to_first_token:.2f} s")
    if result.mean_exit_layer is not None:
        parts.append(f"mean exit depth {result.mean_exit_layer:.1f} of {result.num_layers}")
    if result.second_looks is not None and result.tokens:
        parts.append(f"second look at {result.second_looks / len(result.tokens):.0%}")
    if result.offload is not None:
        parts.append(_offload_words(result.offload))
    parts.append(f"peak memory {format_bytes(result.peak_memory_bytes)}")
    return ", ".join(parts)


def _offload_words(offload: OffloadStatistics) -> str:
    """What evicted layers have cost."""
    words = f"{offload.resident_layers} layers in memory"
    if offload.misses:
        words += (
            f", {offload.misses} read back ({format_bytes(offload.bytes_read)}, "
            f"{offload.seconds_waited:.2f} s)"
        )
    if offload.depth_capped:
        words += f", {offload.depth_capped} tokens capped"
    return words


def comparison_table(variants: Sequence[Compared], num_layers: int) -> Table:
    """Variants side by side; the first one is the measure."""
    caption = Text("tokens/s: median [slowest - fastest round]")
    table = Table(caption=caption, caption_justify="left")
    table.add_column("")
    for heading in ("tokens/s", "speed-up", "exit depth", "agreement"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in variants:
        speed_up = one.tokens_per_second.median / variants[0].tokens_per_second.median
        table.add_row(
            one.variant,
            Text(str(one.tokens_per_second)),
            f"{speed_up:.2f}x",
            f"{one.mean_exit_layer:.1f} of {num_layers}",
            f"{100 * one.agreement:.0f} %",
        )
    return table


def tuning_table(found: Tuning) -> Table:
    """What a budget's settings lose and gain; those that others beat are dim."""
    caption = Text("x backbone: median of the rounds; p: of the test, if the budget weren't kept")
    table = Table(caption=caption, caption_justify="left")
    for heading in ("river", ""):
        table.add_column(heading, no_wrap=True)
    for heading in ("exit depth", "mean KLD", "agreement", "x backbone", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.measured:
        table.add_row(
            Text(Path(one.setting.river).name),
            Text(one.setting.name + " (chosen)" * (one is found.chosen)),
            f"{one.exit_layer:.1f}",
            f"{one.kld:.4f}",
            f"{100 * one.agreement:.1f} %",
            f"{one.speed_up.median:.2f}",
            "" if one.certificate is None else f"{one.certificate.p_value:.2g}",
            style=None if one.is_on_front else "dim",
        )
    return table
