"""Building a river and starting from it, at a large shape with random weights.

    python benchmarks/start.py [--shape llama-3.2-1b] [--folder FOLDER]

Writes a model of the shape with SmolLM2's tokeniser, builds its river in a process of its own, and
starts the command line, each time in a new process, until it has answered one token: the first time
without a packed copy, then with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from river_llm.benchmark.random_weights import SHAPES, random_model
from river_llm.load.model import load_backbone

BUILD = """
import sys
from river_llm import River
from river_llm.load.model import load_backbone
from river_llm.memory import peak_memory_bytes, resident_memory_bytes
model = load_backbone(sys.argv[1])[0]
weights = list(model.parameters())
held = sum(weight.nbytes for weight in weights)
for weight in weights:
    weight.sum()  # every page of the mapped file is in memory, and counts, before the building too
before = resident_memory_bytes()
river = River.build(model)
river.save(sys.argv[2])
layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
print(held, river.num_bytes, before, peak_memory_bytes(), layer)
"""


def build(model: Path, river: Path) -> None:
    """Build and write the river in a process of its own, and say what memory that takes."""
    output = subprocess.check_output([sys.executable, "-c", BUILD, model, river], text=True)
    held, river_bytes, before, peak, layer = (int(word) for word in output.split())
    print(
        f"model {held / 1e6:.0f} MB, river {river_bytes / 1e6:.0f} MB, layer {layer / 1e6:.0f} MB"
    )
    print(
        f"building and writing took {(peak - before) / 1e6:.0f} MB more than the model alone; "
        f"river and layer are {(river_bytes + layer) / 1e6:.0f} MB"
    )


def seconds_to_a_token(model: Path, river: Path) -> float:
    """Of a whole process, from its start to its end."""
    script = Path(sys.executable).parent / "river-llm"
    options = ["--model", model, "--river", river, "--exit-layer", "3", "-n", "1", "--raw"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, script, "generate", *options, "Why is the sky blue?"],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument(
        "--folder", type=Path, help="where all is written [default: a temporary one]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        model, river = Path(name) / "model", Path(name) / "river"
        os.environ["RIVER_LLM_CACHE"] = str(Path(name) / "cache")
        load_backbone("smollm2")[1].save_pretrained(model)
        random_model(SHAPES[options.shape]).save_pretrained(model)
        build(model, river)
        print(f"first start: {seconds_to_a_token(model, river):.1f} s")
        seconds = [seconds_to_a_token(model, river) for _ in range(options.rounds)]
        print(
            f"later starts: median {statistics.median(seconds):.1f} s "
            f"[{min(seconds):.1f} - {max(seconds):.1f}]"
        )


if __name__ == "__main__":
    main()
