"""Perplexity and KL divergence on a text file: backbone, full quantisation, fixed depths, tau.

    python benchmarks/quality.py TEXT [--model M] [--windows 4] [--context 1024] [--json FILE]

Every token but the first of each window is predicted and counts. Fixed depths equal to the mean
depth of each tau arm are added, since a rule has to be measured against them. Full 8-bit and
round-to-nearest stand beside for scale.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import river_llm
from river_llm import ExitPolicy, RiverConfig, attach_river, detach_river
from river_llm.backbone import decoder_layers, fingerprint
from river_llm.load.model import load_backbone
from river_llm.measure.divergence import TextScore, score_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[10, 20])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.97, 0.98])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result file there")
    arguments = parser.parse_args()

    model, tokenizer = load_backbone(arguments.model, getattr(torch, arguments.dtype))
    token_ids = tokenizer(arguments.text.read_text(encoding="utf-8")).input_ids
    context = arguments.context
    windows = [
        token_ids[i * context : (i + 1) * context]
        for i in range(min(arguments.windows, len(token_ids) // context))
    ]
    if not windows:
        sys.exit(f"{arguments.text} has {len(token_ids)} tokens, less than one window of {context}")

    console = Console(stderr=True)

    def progress(done: int, total: int) -> None:
        console.print(f"{done}/{total} windows", end="\r")

    attached = attach_river(model)
    weights = fingerprint(decoder_layers(model))
    similarity_arms = {f"tau = {t:g}": ExitPolicy.similarity(t) for t in arguments.thresholds}
    arms = {
        "backbone": ExitPolicy.never(),
        "full 4-bit (HQQ)": ExitPolicy.always(),
        **{f"exit after {e}": ExitPolicy.fixed(e) for e in arguments.exit_layers},
        **similarity_arms,
    }
    scores = score_text(attached, windows, arms, progress)
    depths = {round(scores[name].mean_exit_layer) for name in similarity_arms}
    depth_arms = {
        f"exit after {e}": ExitPolicy.fixed(e) for e in sorted(depths - set(arguments.exit_layers))
    }
    scores |= score_text(attached, windows, depth_arms, progress)
    for name, config in (
        ("full 4-bit (RTN)", RiverConfig(quantizer="rtn")),
        ("full 8-bit (HQQ)", RiverConfig(bits=8)),
    ):
        detach_river(model)
        attached = attach_river(model, config)
        scores |= score_text(attached, windows, {name: ExitPolicy.always()}, progress)

    Console(width=110).print(_table(scores, len(windows), context))
    if arguments.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "model": arguments.model,
            "fingerprint": weights,
            "river": RiverConfig().to_dict(),
            "engine": "torch",
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "versions": {
                "river_llm": river_llm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "scores": {name: asdict(score) for name, score in scores.items()},
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _table(scores: dict[str, TextScore], num_windows: int, context: int) -> Table:
    table = Table(title=f"{num_windows} windows of {context} tokens")
    for heading in ("arm", "mean depth", "perplexity", "mean KLD", "median", "99 %", "same top"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, score in sorted(scores.items(), key=lambda item: -item[1].mean_kld):
        table.add_row(
            name,
            f"{score.mean_exit_layer:.1f}",
            f"{score.perplexity:.2f} ± {score.perplexity_error:.2f}",
            f"{score.mean_kld:.4f} ± {score.mean_kld_error:.4f}",
            f"{score.median_kld:.4f}",
            f"{score.kld_99:.3f}",
            f"{100 * score.same_top:.1f} %",
        )
    return table


if __name__ == "__main__":
    main()
