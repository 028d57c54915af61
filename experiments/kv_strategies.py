"""What becomes of the keys and values of layers that a token skips: the river beside other answers.

A token that leaves the backbone after l of L layers has no keys and values in layers l+1 ... L. All
variants here leave by the same thresholds; each has its own answer:

- river: exit layers write them (this project).
- mask: they are missing, and later tokens don't attend to that position in those layers (D-LLM,
  Jiang et al. 2024).
- recompute: the token waits with its hidden state; a later one that comes to a layer takes along
  all that wait, in one batch (EE-LLM, Chen et al. 2023, which runs them through whole passes).
- propagate: each skipped layer makes them of the hidden state at the exit, by its own norm and
  projections (CALM, Schuster et al. 2022).
- monotonic: no token goes deeper than the one before it, so nobody misses them (SkipDecode, Del
  Corro et al. 2023; which lowers the depth by a schedule).
- none: no token leaves.

But for the river, a token's output is what the final norm and the LM head make of the hidden state
at the exit; a model that was not trained to exit says little there.

    python experiments/kv_strategies.py --text wikitext2_raw_test.txt -o results

decodes windows of the text token by token, once with each variant, all on one PyTorch model: the
divergence from the backbone's predictions, and the time of each token. One sequence at a time;
models with rotary angles and full attention.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from kv_decoders import STRATEGIES, Decoder, NoExit, RiverDecoder, check_model, follow, generate
from matplotlib.figure import Figure
from output import describe, print_table, write_figure, write_json
from text_scores import WindowScores, read_windows
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig
from river_llm.load.model import load_backbone


def make_decoders(
    model: PreTrainedModel, river: River, policies: Sequence[ExitPolicy]
) -> dict[str, Decoder]:
    """The backbone, full quantisation, and every strategy with every policy, by name."""
    num_layers = len(river.exit_layers)
    decoders: dict[str, Decoder] = {
        "backbone": NoExit(model, ExitPolicy.never().thresholds(num_layers)),
        f"full {river.config.width}-bit": RiverDecoder(model, river, ExitPolicy.always()),
    }
    for policy in policies:
        thresholds = policy.thresholds(num_layers)
        decoders[f"river, {policy.describe()}"] = RiverDecoder(model, river, policy)
        for name, strategy in STRATEGIES.items():
            decoders[f"{name}, {policy.describe()}"] = strategy(model, thresholds)
    return decoders


def measure(decoders: dict[str, Decoder], windows: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Every variant along every window, in interleaved rounds; the first is the reference."""
    scores = {name: WindowScores() for name in decoders}
    seconds: dict[str, list[list[float]]] = defaultdict(list)  # of each window's tokens
    reference = next(iter(decoders))
    for done, window in enumerate(windows):
        order = list(decoders) if done % 2 == 0 else list(reversed(decoders))
        found = {}
        for name in order:
            with decoders[name] as decoder:
                logits, exit_layers, times = follow(decoder, window)
            found[name] = (logits, exit_layers)
            seconds[name].append(times)
        for name, (logits, exit_layers) in found.items():
            scores[name].add(window, logits, found[reference][0], exit_layers)
        print(f"window {done + 1} of {len(windows)}", flush=True)
    rates = {name: [(len(t) - 1) / sum(t[1:]) for t in times] for name, times in seconds.items()}
    return [
        {
            "variant": name,
            **score.summarise(),
            "tokens_per_second": median(rates[name]),
            "slowest": min(rates[name]),
            "fastest": max(rates[name]),
            "speed_up": median(map(_ratio, rates[name], rates[reference])),
            "milliseconds_by_position": [
                1000 * fmean(at) for at in zip(*seconds[name], strict=True)
            ],
        }
        for name, score in scores.items()
    ]


def _ratio(rate: float, reference: float) -> float:
    return rate / reference


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Quality against speed; the time of a token as the text grows."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    quality, growth = figure.subplots(1, 2)
    styles = ["-", "--", ":", "-."]
    for place, result in enumerate(results):
        marker = "osD^v<>Pp*hX"[place % 12]
        x, y = result["tokens_per_second"], 100 * result["same_top"]
        quality.plot(x, y, marker, color="k", label=result["variant"], fillstyle="none")
        times = result["milliseconds_by_position"]
        chunk = max(1, len(times) // 16)
        means = [fmean(times[i : i + chunk]) for i in range(1, len(times) - chunk + 1, chunk)]
        places = [1 + chunk * (i + 0.5) for i in range(len(means))]
        line = styles[place % len(styles)]
        growth.plot(places, means, line, color="k", marker=marker, markersize=4, linewidth=0.7)
    quality.set(xlabel="tokens per second", ylabel="same top token as the backbone, %")
    quality.legend(fontsize="small")
    growth.set(xlabel="position", ylabel="milliseconds of a token, mean", ylim=(0, None))
    return figure


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.98])
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[20])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", help="let every variant answer it, too")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="a folder")
    given = parser.parse_args()
    policies = [*map(ExitPolicy.similarity, given.thresholds)]
    policies += [*map(ExitPolicy.fixed, given.exit_layers)]
    model, tokenizer = load_backbone(given.model, getattr(torch, given.dtype), given.device)
    check_model(model)
    windows = read_windows(tokenizer, given.text, given.window, given.windows)
    river = River.build(model, RiverConfig(given.bits, given.group_size))
    decoders = make_decoders(model, river, policies)
    results = measure(decoders, windows)
    if given.prompt is not None:
        prompt = list(tokenizer(given.prompt).input_ids)
        for result in results:
            with decoders[result["variant"]] as decoder:
                answer = generate(decoder, prompt, given.new_tokens)
            result["answer"] = tokenizer.decode(answer)
    described = {
        **describe(),
        "model": given.model,
        "fingerprint": river.fingerprint,
        "river": river.config.to_dict(),
        "engine": f"torch {given.device} {given.dtype}, {torch.get_num_threads()} threads",
        "text": given.text.name,
        "window": given.window,
        "windows": len(windows),
    }
    write_json(given.output / "kv_strategies.json", {**described, "results": results})
    write_figure(given.output / "kv_strategies.png", draw(results))
    headings = ["variant", "depth", "perplexity", "mean KLD", "same top", "tokens/s", "speed-up"]
    print_table(headings, [_row(result) for result in results])


def _row(result: dict[str, Any]) -> list[str]:
    return [
        result["variant"],
        f"{result['mean_exit_layer']:.1f}",
        f"{result['perplexity']:.2f}",
        f"{result['mean_kld']:.4f}",
        f"{result['same_top']:.1%}",
        f"{result['tokens_per_second']:.1f}",
        f"{result['speed_up']:.2f}x",
    ]


if __name__ == "__main__":
    main()
