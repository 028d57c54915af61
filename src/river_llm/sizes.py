"""Sizes in bytes, in words."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """In units of 1024, as `ls -h` does."""
    if count < 1024:
        return f"{count} B"
    value, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 100 else f"{value:.1f} {units[0]}"
