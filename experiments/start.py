"""Building a river and starting from it, at a large shape with random weights.

    python experiments/start.py --shape llama-3.2-1b -o start.json

Writes a model of the shape with SmolLM2's tokeniser, builds its river in a process of its own, and
starts the command line, each time in a new process, until it has answered one token: the first time
without repacked weights in the cache, then with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from output import describe, write_json

from river_llm.load.model import load_backbone
from river_llm.measure.random_weights import SHAPES, random_model
from river_llm.measure.rounds import Spread

_BUILD = """
import json, sys
from river_llm import River
from river_llm.load.model import load_backbone
from river_llm.memory import peak_memory_bytes, resident_memory_bytes
model = load_backbone(sys.argv[1])[0]
weights = list(model.parameters())
for weight in weights:
    weight.sum()  # every page of the mapped file is in memory, and counts, before the building too
before = resident_memory_bytes()
river = River.build(model)
river.save(sys.argv[2])
print(json.dumps({
    "model_bytes": sum(weight.nbytes for weight in weights),
    "layer_bytes": sum(weight.nbytes for weight in model.model.layers[0].parameters()),
    "river_bytes": river.num_bytes,
    "more_than_the_model_bytes": peak_memory_bytes() - before,
}))
"""


def seconds_to_a_token(model: Path, river: Path) -> float:
    """Of a whole process, from its start to its end."""
    script = Path(sys.executable).parent / "river-llm"
    command = [sys.executable, script, "generate", "--model", model, "--river", river]
    command += ["--exit-layer", "3", "-n", "1", "--raw", "Why is the sky blue?"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where all is written; by default a temporary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        model, river = Path(name) / "model", Path(name) / "river"
        os.environ["RIVER_LLM_CACHE"] = str(Path(name) / "cache")
        load_backbone("smollm2")[1].save_pretrained(model)
        random_model(SHAPES[options.shape]).save_pretrained(model)
        built = subprocess.check_output([sys.executable, "-c", _BUILD, model, river], text=True)
        output = json.loads(built)
        for what, size in output.items():
            print(f"{what.removesuffix('_bytes').replace('_', ' ')}: {size / 1e6:.0f} MB")
        seconds = [seconds_to_a_token(model, river) for _ in range(1 + options.rounds)]
    print(f"first start: {seconds[0]:.1f} s, later starts: {Spread.of(seconds[1:])} s")
    if options.output:
        write_json(options.output, {**describe(), **output, "seconds_to_a_token": seconds})


if __name__ == "__main__":
    main()
