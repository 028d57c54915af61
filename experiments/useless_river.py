"""Lossless mode with a river of noise: every draft is wrong, the text is right, and the speed is to
stay near that of plain decoding.

    python experiments/useless_river.py -o useless-river
    river-llm check-exact --river useless-river --prompts mt_bench.jsonl --limit 40 --no-ngram
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from river_llm import River, RiverConfig
from river_llm.load.model import load_backbone
from river_llm.river.quantize import QuantizedMatrix


def with_random_codes(matrix: QuantizedMatrix, generator: torch.Generator) -> QuantizedMatrix:
    """The matrix with random codes in place of its own."""
    shape = matrix.packed.shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return replace(matrix, packed=codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the river")
    options = parser.parse_args()
    river = River.build(load_backbone(options.model)[0], RiverConfig(quantizer="rtn"))
    generator = torch.Generator().manual_seed(0)
    exit_layers = [
        {name: with_random_codes(matrix, generator) for name, matrix in layer.items()}
        for layer in river.exit_layers
    ]
    replace(river, exit_layers=exit_layers).save(options.output)


if __name__ == "__main__":
    main()
