"""What a result has to carry so that it means something later: versions, processor, date."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from river_llm.engines.native_core import usable_threads

PACKAGES = ("river-llm", "torch", "transformers", "llama-cpp-python", "lm-eval")


def describe_run(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Plain JSON values about this run and this machine, with the versions of `packages`."""
    program = "river-llm" if Path(sys.argv[0]).stem in ("river-llm", "__main__") else sys.argv[0]
    found = {package: list(distributions(name=package)) for package in packages}
    versions = {package: those[0].version for package, those in found.items() if those}
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": usable_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


def processor_name() -> str:
    """As the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
