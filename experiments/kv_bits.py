"""What a KV cache of 8 bits changes beside one of 16, by how many tokens stood before.

    python experiments/kv_bits.py wikitext2_raw_test.txt --tokens 8192 -o kv_bits.json

The text's first tokens run through the backbone with either cache, in the same pieces. What it
brings in speed and memory: `river-llm bench --kv-bits 8`, with `--memory` too.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from output import describe, print_table, write_json
from torch import Tensor

from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.engines import Step
from river_llm.measure.divergence import compare_logits

PIECE = 256  # tokens of a pass
BORDERS = (0, 2048, 4096, 8192, 16384, 32768)


def logits_of(lm: RiverLM, sequence: int, tokens: Tensor) -> Tensor:
    """Append tokens `[T]` through the backbone: logits `[T, vocabulary]`."""
    never = torch.tensor(ExitPolicy.never().thresholds(lm.engine.num_layers))
    rows = range(len(tokens))
    return lm.engine.forward(Step(tokens.tolist(), [sequence] * len(tokens), never, rows)).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engine", default="auto", choices=["auto", "cpu", "torch"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()

    wide, narrow = (
        RiverLM.from_pretrained(
            options.model,
            RiverConfig(quantizer="rtn"),  # nothing enters the river
            ExitPolicy.never(),
            engine=options.engine,
            kv_bits=bits,
        )
        for bits in (16, 8)
    )
    text = options.text.read_text(encoding="utf-8")
    most = min(options.tokens, wide.engine.context_length or options.tokens)
    tokens = torch.tensor(wide.tokenizer(text).input_ids[:most])
    sequences = [(lm, lm.engine.add_sequence()) for lm in (wide, narrow)]
    parts = []
    for piece, targets in zip(tokens[:-1].split(PIECE), tokens[1:].split(PIECE), strict=True):
        reference, logits = (logits_of(*one, piece) for one in sequences)
        of_reference = compare_logits(reference, reference, targets)[0]
        parts.append((*compare_logits(logits, reference, targets), of_reference))
    nll, kld, same, reference_nll = map(torch.cat, zip(*parts, strict=True))

    ends = [border for border in BORDERS if border < len(kld)] + [len(kld)]
    rows: list[dict[str, Any]] = []
    for first, end in [*pairwise(ends), (0, len(kld))]:
        part = slice(first, end)
        rows.append(
            {
                "tokens before": "all" if (first, end) == (0, len(kld)) else f"{first} to {end}",
                "mean KLD": float(kld[part].mean()),
                "99 %": float(kld[part].quantile(0.99)),
                "same top": float(same[part].mean()),
                "perplexity": float(nll[part].mean().exp()),
                "with 16 bits": float(reference_nll[part].mean().exp()),
            }
        )
    formats = ("{}", "{:.6f}", "{:.5f}", "{:.2%}", "{:.3f}", "{:.3f}")
    cells = [[f.format(v) for f, v in zip(formats, row.values(), strict=True)] for row in rows]
    print_table(list(rows[0]), cells)
    if options.output:
        setting = narrow.engine.setting
        write_json(options.output, {**describe(), "engine": setting, "results": rows})


if __name__ == "__main__":
    main()
