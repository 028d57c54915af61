"""Quality against speed: backbone, full quantisation, exits by depth, by similarity and at random.

    python experiments/pareto.py --text wikitext2_raw_test.txt -o results

Every variant scores windows of a text, each token leaving as decoding would take it, and decodes
along it in interleaved rounds. Each threshold is held against what a rule has to beat: the fixed
depth and random depths of the same mean, and full quantisation, by sign-flip tests over windows.
Accuracies that `river-llm eval` measured join the table: `--lm-eval VARIANT=RESULTS.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from output import describe, print_table, write_figure, write_json
from text_scores import WindowScores, read_windows
from torch import Tensor

from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.engines import Engine
from river_llm.measure.pareto import pareto_front
from river_llm.measure.teacher_forcing import decode_seconds, score

_PROMPT = 16  # tokens before those whose decoding is timed
_EXACT_WINDOWS, _DRAWS = 12, 1 << 14  # all signs up to so many windows, else so many draws
_MARKERS = {
    "backbone": "*",
    "full": "s",
    "exit": "o",
    "similarity": "^",
    "random": "x",
    "look": "D",
}


@dataclass(frozen=True)
class Variant:
    """A way to run the model.

    Attributes:
        kind: ``backbone``, ``full``, ``exit``, ``similarity``, ``random`` or ``look``.
        river: its name, such as ``4bit`` or ``4bit-rtn``.
        thresholds: `[L]`, see `ExitPolicy.thresholds`, or `[T, L]`, a row for each token of a
            window.
        second_look: see `ExitPolicy`.
    """

    name: str
    kind: str
    river: str
    thresholds: Tensor
    second_look: float | None = None

    def along(self, count: int) -> Tensor:
        """The thresholds of so many tokens; behind the end of a window its rows begin anew."""
        if self.thresholds.ndim == 1:
            return self.thresholds
        return self.thresholds[torch.arange(count) % len(self.thresholds)]


def river_config(name: str, group_size: int) -> RiverConfig:
    """``4bit``, ``4bit-gptq``, ``4.5bit-gptq``: the width or, with a point, the average of widths,
    and how weights are quantised (HQQ)."""
    width, _, quantizer = name.partition("bit")
    settings = {"group_size": group_size, "quantizer": quantizer.removeprefix("-") or "hqq"}
    if "." in width:
        return RiverConfig.of({"bits": "auto", "average_bits": float(width), **settings})
    return RiverConfig.of({"bits": int(width), **settings})


def plain_variants(
    num_layers: int,
    rivers: Sequence[str],
    exit_layers: Sequence[int],
    thresholds: Sequence[float],
    second_looks: Sequence[float] = (),
) -> list[Variant]:
    """Those that leave by a policy; exits go into the first river, and second looks are at what
    left at once."""

    def variant(name: str, kind: str, policy: ExitPolicy, river: str = rivers[0]) -> Variant:
        thresholds = torch.tensor(policy.thresholds(num_layers))
        return Variant(name, kind, river, thresholds, policy.second_look)

    return [
        variant("backbone", "backbone", ExitPolicy.never()),
        *(variant(f"full-{river}", "full", ExitPolicy.always(), river) for river in rivers),
        *(fixed_variant(depth, num_layers, rivers[0]) for depth in exit_layers),
        *(variant(f"similarity-{t:g}", "similarity", ExitPolicy.similarity(t)) for t in thresholds),
        *(variant(f"look-{m:g}", "look", ExitPolicy.always(second_look=m)) for m in second_looks),
    ]


def fixed_variant(depth: int, num_layers: int, river: str) -> Variant:
    """Every token leaves after so many layers."""
    thresholds = torch.tensor(ExitPolicy.fixed(depth).thresholds(num_layers))
    return Variant(f"exit-{depth}", "exit", river, thresholds)


def random_variant(like: Variant, depths: Sequence[int], window: int, seed: int) -> Variant:
    """Each token of a window leaves at a depth drawn from those that a similarity variant gave."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(depths)[torch.randint(len(depths), (window,), generator=generator)]
    num_layers = like.thresholds.shape[-1]
    has_left = torch.arange(num_layers) >= drawn.unsqueeze(1)
    thresholds = torch.full((window, num_layers), math.inf).masked_fill(has_left, -math.inf)
    return Variant(like.name.replace("similarity", "random"), "random", like.river, thresholds)


def score_variants(
    engines: Mapping[str, Engine],
    variants: Sequence[Variant],
    windows: Sequence[list[int]],
    reference: Sequence[Tensor],
) -> dict[str, WindowScores]:
    """How far each is from the backbone's logits, of each window."""
    scores = {}
    for variant in variants:
        scores[variant.name] = WindowScores()
        for window, of_backbone in zip(windows, reference, strict=True):
            tokens = window[:-1]
            logits, depths = score(
                engines[variant.river], tokens, variant.along(len(tokens)), variant.second_look
            )
            scores[variant.name].add(window, logits, of_backbone, depths)
        print(f"scored {variant.name}", flush=True)
    return scores


def time_variants(
    engines: Mapping[str, Engine], variants: Sequence[Variant], text: list[int], rounds: int
) -> dict[str, list[float]]:
    """Tokens per second of each in interleaved rounds, after one that warms up."""
    rates: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for done in range(rounds + 1):
        for variant in variants if done % 2 == 0 else reversed(variants):
            thresholds = variant.along(len(text))
            seconds, depths = decode_seconds(
                engines[variant.river], text, thresholds, _PROMPT, variant.second_look
            )
            if done:
                rates[variant.name].append(len(depths) / seconds)
        print(f"round {done} of {rounds}", flush=True)
    return rates


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a mean this far from 0 if each difference had either sign by chance."""
    values = torch.tensor(differences, dtype=torch.float64)
    count = len(values)
    if count <= _EXACT_WINDOWS:
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=count)), dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(2, (_DRAWS, count), generator=generator).double() - 1
    signs[0] = 1  # those that were seen
    sums = (signs @ values).abs()
    return float((sums >= sums[0] - 1e-12).double().mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for their number."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for done, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[place]))
        corrected[place] = largest
    return corrected


def compare(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each threshold beside what it has to beat: the difference of mean KLD, positive where the
    threshold is nearer to the backbone, and its p, corrected for the number of thresholds."""
    rules = [result for result in results.values() if result["kind"] == "similarity"]
    full = [name for name, result in results.items() if result["kind"] == "full"]
    rivals = [
        [f"exit-{round(rule['mean_exit_layer'])}" for rule in rules],
        [rule["variant"].replace("similarity", "random") for rule in rules],
        *([name] * len(rules) for name in full),
    ]
    found = []
    for names in rivals:
        differences = [
            [theirs - own for theirs, own in zip(other, rule["kld_of_windows"], strict=True)]
            for rule, other in zip(
                rules, (results[n]["kld_of_windows"] for n in names), strict=True
            )
        ]
        p_values = holm([sign_flip_p(of_windows) for of_windows in differences])
        for rule, name, of_windows, p in zip(rules, names, differences, p_values, strict=True):
            mean = fmean(of_windows)
            verdict = "no difference shown" if p > 0.05 else "better" if mean > 0 else "worse"
            found.append(
                {
                    "rule": rule["variant"],
                    "against": name,
                    "difference": mean,
                    "p": p,
                    "verdict": verdict,
                }
            )
    return found


def read_accuracies(path: Path) -> dict[str, dict[str, float]]:
    """Of each task in a result file of lm-eval: accuracy and its standard error."""
    found = {}
    for task, metrics in json.loads(path.read_text(encoding="utf-8"))["results"].items():
        for metric in ("acc_norm,none", "acc,none", "exact_match,strict-match"):
            if metric in metrics:
                error = metrics[metric.replace(",", "_stderr,")]
                found[task] = {"metric": metric, "accuracy": metrics[metric], "error": error}
                break
    return found


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Both measures of quality against speed; the dotted line is the Pareto front."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (measure, label) in zip(
        figure.subplots(1, 2),
        [("same_top", "same top token as the backbone"), ("mean_kld", "mean KLD, nats")],
        strict=True,
    ):
        sign = -1 if measure == "mean_kld" else 1
        points = [(r["tokens_per_second"], sign * r[measure]) for r in results]
        front = [points[place] for place in pareto_front(points)]
        axes.plot([x for x, _ in front], [sign * y for _, y in front], "k:", linewidth=1)
        for result, (x, y) in zip(results, points, strict=True):
            axes.plot(x, sign * y, _MARKERS[result["kind"]], color="k", fillstyle="none")
            axes.annotate(
                result["variant"],
                (x, sign * y),
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
        axes.set(xlabel="tokens per second", ylabel=label)
        if measure == "mean_kld":
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.invert_yaxis()
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.95, 0.97, 0.98, 0.99])
    parser.add_argument("--second-looks", type=float, nargs="*", default=[0.2, 0.4, 0.6])
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[3, 10, 20])
    parser.add_argument(
        "--rivers",
        nargs="+",
        default=["4bit-gptq", "4.5bit-gptq", "5bit-gptq", "6bit-gptq", "8bit", "4bit", "4bit-rtn"],
        metavar="BITS",
        help="4bit (HQQ), 4bit-gptq, 4.5bit-gptq and so on; exits take the first",
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--speed-tokens", type=int, default=192)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of random depths")
    parser.add_argument("--lm-eval", nargs="*", default=[], metavar="VARIANT=RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    given = arguments()
    rivers = {name: river_config(name, given.group_size) for name in given.rivers}
    lms = {
        name: RiverLM.from_pretrained(given.model, config, engine=given.engine)
        for name, config in rivers.items()
    }
    lm = lms[given.rivers[0]]
    windows = read_windows(lm.tokenizer, given.text, given.window, given.windows)
    results = measure({name: one.engine for name, one in lms.items()}, windows, given)
    for pair in given.lm_eval:
        name, _, path = pair.partition("=")
        results[name]["tasks"] = read_accuracies(Path(path))
    comparisons = compare(results)
    described = {
        **describe(),
        "model": given.model,
        "weights": lm.engine.cache_identity([]),
        "rivers": {name: config.to_dict() for name, config in rivers.items()},
        "engine": lm.engine.setting,
        "text": given.text.name,
        "window": given.window,
        "windows": len(windows),
        "seed": given.seed,
    }
    rows = list(results.values())
    values = {**described, "results": rows, "comparisons": comparisons}
    write_json(given.output / "pareto.json", values)
    write_figure(given.output / "pareto.png", draw(rows))
    report(rows, comparisons)


def measure(
    engines: Mapping[str, Engine], windows: Sequence[list[int]], given: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All variants by name, those at a threshold's mean depth among them: quality and speed.

    Args:
        engines: by the names of their rivers.
    """
    engine = engines[given.rivers[0]]
    settings = given.rivers, given.exit_layers, given.thresholds, given.second_looks
    variants = plain_variants(engine.num_layers, *settings)
    reference = [score(engine, window[:-1], variants[0].thresholds)[0] for window in windows]
    scores = score_variants(engines, variants, windows, reference)
    others: dict[str, Variant] = {}
    for rule in [variant for variant in variants if variant.kind == "similarity"]:
        depths = scores[rule.name].exit_layers
        drawn = random_variant(rule, depths, len(windows[0]), given.seed)
        fixed = fixed_variant(round(fmean(depths)), engine.num_layers, rule.river)
        others |= {other.name: other for other in (drawn, fixed) if other.name not in scores}
    scores |= score_variants(engines, list(others.values()), windows, reference)
    variants += others.values()
    text = [token for window in windows for token in window][: _PROMPT + given.speed_tokens]
    rates = time_variants(engines, variants, text, given.rounds)
    results = {}
    for variant in variants:
        own = rates[variant.name]
        ratios = [rate / base for rate, base in zip(own, rates["backbone"], strict=True)]
        results[variant.name] = {
            "variant": variant.name,
            "kind": variant.kind,
            **scores[variant.name].summarise(),
            "tokens_per_second": median(own),
            "slowest": min(own),
            "fastest": max(own),
            "speed_up": median(ratios),
            "tasks": {},
        }
    return results


def report(results: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))
    headings = ["variant", "depth", "perplexity", "mean KLD", "same top", "tokens/s", "speed-up"]
    rows = []
    for result in results:
        own = result["tasks"]
        rows.append(
            [
                result["variant"],
                f"{result['mean_exit_layer']:.1f}",
                f"{result['perplexity']:.2f}",
                f"{result['mean_kld']:.4f} ± {result['mean_kld_error']:.4f}",
                f"{result['same_top']:.1%}",
                f"{result['tokens_per_second']:.0f}",
                f"{result['speed_up']:.2f}x",
                *(f"{own[task]['accuracy']:.1%}" if task in own else "" for task in tasks),
            ]
        )
    print_table([*headings, *tasks], rows)
    print_table(
        ["threshold", "against", "difference of KLD", "p (Holm)", ""],
        [
            [c["rule"], c["against"], f"{c['difference']:+.4f}", f"{c['p']:.3g}", c["verdict"]]
            for c in comparisons
        ],
    )


if __name__ == "__main__":
    main()
