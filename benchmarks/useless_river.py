"""Lossless mode with a river of noise: every draft is wrong, the text is right, and the speed is to
stay near that of plain decoding.

    python benchmarks/useless_river.py --prompts mt_bench.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from river_llm import DraftConfig, ExitPolicy, River, RiverLM
from river_llm.cli.check_exact import read_prompts
from river_llm.measure.exactness import check_exactness
from river_llm.load.model import load_backbone


def with_random_codes(river: River) -> River:
    """The river with random codes in place of its own."""
    generator = torch.Generator().manual_seed(0)
    exit_layers = [
        {
            name: replace(
                matrix,
                packed=torch.randint(
                    0, 256, matrix.packed.shape, dtype=torch.uint8, generator=generator
                ),
            )
            for name, matrix in layer.items()
        }
        for layer in river.exit_layers
    ]
    return replace(river, exit_layers=exit_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, required=True, help="as of river-llm check-exact")
    parser.add_argument("--limit", type=int, default=20, help="the first so many prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    river = with_random_codes(River.build(load_backbone(options.model)[0]))
    lm = RiverLM.from_pretrained(options.model, river, ExitPolicy.never())
    prompts = read_prompts(options.prompts)[: options.limit]
    found = check_exactness(
        lm, prompts, drafts=DraftConfig(ngram=False), max_new_tokens=options.max_new_tokens
    )
    low, median, high = found.speed_up_quartiles
    print(
        f"{len(found.differences)} of {found.prompts} answers differ; "
        f"{found.speed_up:.3f} of plain speed, quartiles {low:.3f} {median:.3f} {high:.3f}; "
        f"{100 * found.draft_time_share:.1f} % of the time in drafting"
    )


if __name__ == "__main__":
    main()
