"""Every example runs as README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path) -> None:
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "mean exit depth" in run.stdout
