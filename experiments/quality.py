"""Perplexity and KL divergence on a text file: backbone, full quantisation, fixed depths, tau.

    python experiments/quality.py wikitext2_raw_test.txt -o quality.json

Every token but the first of each window is predicted and counts. Fixed depths equal to the mean
depth of each tau are added, since a rule has to be measured against them. Full 8-bit and
round-to-nearest stand beside for scale.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from output import describe, print_table, write_json

from river_llm import ExitPolicy, RiverConfig, attach_river, detach_river
from river_llm.load.model import load_backbone
from river_llm.measure.divergence import TextScore, score_text

_OTHER_RIVERS = {
    "full 4-bit (RTN)": RiverConfig(quantizer="rtn"),
    "full 8-bit (HQQ)": RiverConfig(bits=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[10, 20])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.97, 0.98])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()

    model, tokenizer = load_backbone(options.model, getattr(torch, options.dtype))
    token_ids = tokenizer(options.text.read_text(encoding="utf-8")).input_ids
    starts = range(0, len(token_ids) - options.context + 1, options.context)
    windows = [token_ids[start : start + options.context] for start in starts][: options.windows]
    if not windows:
        sys.exit(f"{options.text} has {len(token_ids)} tokens, less than one window")

    attached = attach_river(model)
    taus = {f"tau = {tau:g}": ExitPolicy.similarity(tau) for tau in options.thresholds}
    depths = {f"exit after {layer}": ExitPolicy.fixed(layer) for layer in options.exit_layers}
    ends = {"backbone": ExitPolicy.never(), "full 4-bit (HQQ)": ExitPolicy.always()}
    scores = score_text(attached, windows, {**ends, **depths, **taus})
    same_depths = {round(scores[name].mean_exit_layer) for name in taus}
    more = {f"exit after {layer}": ExitPolicy.fixed(layer) for layer in sorted(same_depths)}
    scores |= score_text(attached, windows, {k: v for k, v in more.items() if k not in depths})
    for name, config in _OTHER_RIVERS.items():
        detach_river(model)
        attached = attach_river(model, config)
        scores |= score_text(attached, windows, {name: ExitPolicy.always()})

    headings = ("variant", "mean depth", "perplexity", "mean KLD", "median", "99 %", "same top")
    ordered = sorted(scores.items(), key=lambda item: -item[1].mean_kld)
    print_table(headings, [_row(name, score) for name, score in ordered])
    if options.output:
        found = {name: asdict(score) for name, score in scores.items()}
        settings = {key: str(value) for key, value in vars(options).items()}
        write_json(options.output, {**describe(), **settings, "scores": found})


def _row(name: str, score: TextScore) -> list[str]:
    return [
        name,
        f"{score.mean_exit_layer:.1f}",
        f"{score.perplexity:.2f} ± {score.perplexity_error:.2f}",
        f"{score.mean_kld:.4f} ± {score.mean_kld_error:.4f}",
        f"{score.median_kld:.4f}",
        f"{score.kld_99:.3f}",
        f"{100 * score.same_top:.1f} %",
    ]


if __name__ == "__main__":
    main()
