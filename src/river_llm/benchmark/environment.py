"""What a result has to carry so that it means something later: versions, processor, date."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from river_llm.benchmark.bandwidth import (
    bandwidth_source,
    buffer_bytes,
    last_level_cache_bytes,
)

_PACKAGES = ("river-llm", "torch", "transformers", "numpy", "llama-cpp-python", "gguf")


def describe_environment() -> dict[str, Any]:
    """Plain JSON values about this run, this machine and how its memory is measured."""
    return {
        **describe_run(_PACKAGES),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "bandwidth_buffer_bytes": buffer_bytes(),
        "bandwidth_source": bandwidth_source(),
    }


def describe_run(packages: Iterable[str]) -> dict[str, Any]:
    """Plain JSON values about this run and this machine, with the versions of `packages`."""
    return {
        "command": shlex.join(["river-llm", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": usable_cores(),
        "versions": {"python": platform.python_version(), **installed_versions(packages)},
    }


def processor_name() -> str:
    """As the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those of `packages` that are installed."""
    found = {package: list(distributions(name=package)) for package in packages}
    return {package: versions[0].version for package, versions in found.items() if versions}
