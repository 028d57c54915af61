"""A tiny native core with random weights, for what is tested below `CpuEngine`.

Needs no PyTorch, so that a process of its own starts at once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from river_llm import _core

LAYERS, HIDDEN, INNER, VOCABULARY, POSITIONS = 2, 64, 96, 97, 64
GROUP = 32
SHAPE = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "rotary_dim": 16,
    "rope_kinds": 1,
    "rope_boundary": 0,
    "norm_epsilon": 1e-5,
    "attention_scale": 0.25,
    "embedding_scale": 1.0,
    "logit_cap": 0.0,
    "gelu": False,
    "tied_head": True,
}
SETTINGS = {
    "backbone": (16, 0),
    "river": ([[4] * 4] * LAYERS, GROUP),
    "head": (16, 0),
    "threads": 1,
    "kernels": "",
    "resident_layers": LAYERS,
}
# (rows, columns) of the matrices of each projection
PROJECTIONS = (
    ((64, HIDDEN), (32, HIDDEN), (32, HIDDEN)),
    ((HIDDEN, 64),),
    ((INNER, HIDDEN), (INNER, HIDDEN)),
    ((HIDDEN, INNER),),
)


def empty_core(**changes: Any) -> _core.Engine:
    """A core without weights; `changes` are sizes or constructor arguments."""
    shape = {name: changes.pop(name, value) for name, value in SHAPE.items()}
    return _core.Engine(shape, **{**SETTINGS, **changes})


def ready_core(**changes: Any) -> _core.Engine:
    """A core with weights, positions and one empty sequence; the sizes are those above."""
    core = empty_core(**changes)
    generator = np.random.default_rng(0)
    for layer in range(LAYERS):
        norm = generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        parts = {
            "attention_norm": norm,
            "mlp_norm": norm,
            "backbone": [[weights(generator, *size) for size in of] for of in PROJECTIONS],
            "river": [[codes(generator, *size) for size in of] for of in PROJECTIONS],
        }
        core.load_layer(layer, parts)
    core.load_head({"weights": weights(generator, VOCABULARY, HIDDEN)})
    load_positions(core)
    core.add_sequence()
    return core


def load_positions(core: _core.Engine, first: int = 0, count: int = POSITIONS) -> None:
    core.load_positions(first, [angles(count)], np.empty(0, np.float32))


def weights(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint16]:
    """Random weights as the bits of bfloat16."""
    return bfloat16_bits(generator.normal(0, columns**-0.5, (rows, columns)))


def codes(generator: np.random.Generator, rows: int, columns: int, bits: int = 4) -> Any:
    """Random codes with the scales and zeros of their groups."""
    packed = generator.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    scales = bfloat16_bits(np.full((rows, columns // GROUP), 0.03))
    return packed, scales, np.zeros_like(scales)


def bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of the floats."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def angles(positions: int, rotary_dim: int = 16) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cosines and sines `[positions, rotary_dim / 2]`."""
    steps = np.arange(rotary_dim // 2) / 8
    turned = np.arange(positions)[:, None] * 1e-4**steps
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


def run_pass(core: _core.Engine, **changes: Any) -> Any:
    """One pass, by default over one token that leaves after one layer; what `forward` returns."""
    tokens = changes.get("tokens", [5])
    arguments: dict[str, Any] = {
        "tokens": tokens,
        "sequences": [0] * len(tokens),
        "thresholds": np.array([1, -1], np.float32),
        "logit_rows": [len(tokens) - 1],
        "mean_groups": [],
        "minimum_groups": [],
        "record_similarities": False,
    }
    return core.forward(**{**arguments, **changes})


def run_python(code: str) -> str:
    """Run code that may crash, in a process of its own beside this file; what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, f"exit code {process.returncode}\n{process.stderr}"
    return process.stdout
