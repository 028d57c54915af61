"""Every example runs as README says, and names only what there is, as every experiment does."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path) -> None:
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "mean exit depth" in run.stdout


@pytest.mark.parametrize("program", [*EXAMPLES, *EXPERIMENTS], ids=lambda path: path.name)
def test_what_is_imported_is_there(program: Path) -> None:
    """Of this project's own; extras of some experiments may be missing."""
    imports = [
        (node.module, name.name)
        for node in ast.walk(ast.parse(program.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("river_llm")
        for name in node.names
    ]
    for module, name in imports:
        if str(module).endswith("lm_eval_model"):
            pytest.importorskip("lm_eval")
        assert hasattr(import_module(str(module)), name), f"{module}.{name}"
