"""What a second look brings back of the backbone's own choices, on the text that a variant writes.

    python experiments/second_look.py --prompts mt_bench.jsonl --river river4 -o results

Every variant answers the prompts greedily; then the backbone reads each answer, and a token agrees
where it is the backbone's argmax too, given the same text before. The first token of an answer
comes of the prompt, which the backbone reads, and doesn't count. Speeds are decoding's, prompt by
prompt beside the backbone's, in interleaved order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from output import describe, print_table, write_figure, write_json

from river_llm import ExitPolicy, GenerationResult, RiverLM
from river_llm.cli.check_exact import read_prompts
from river_llm.config import DEFAULT_MODEL, SamplingConfig
from river_llm.engines import Engine, Step
from river_llm.generate.rows import new_sequence
from river_llm.measure.rounds import interleaved


def backbone_choices(engine: Engine, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The backbone's argmax at each place of an answer but the first."""
    text = [*prompt, *answer[:-1]]
    never = torch.tensor(ExitPolicy.never().thresholds(engine.num_layers))
    with new_sequence(engine) as sequence:
        rows = range(len(prompt), len(text))
        best = engine.forward(Step(text, [sequence] * len(text), never, rows)).best_tokens
    return [int(token) for token in best]


def policies(exit_layer: int, margins: Sequence[float]) -> dict[str, ExitPolicy]:
    """The backbone, what leaves after so many layers, and that with second looks."""
    looks = [None, *margins]
    leaving = [ExitPolicy.fixed(exit_layer, second_look=margin) for margin in looks]
    return {"backbone": ExitPolicy.never(), **{policy.describe(): policy for policy in leaving}}


def measure(
    lm: RiverLM, prompts: Sequence[list[int]], variants: dict[str, ExitPolicy], tokens: int
) -> list[dict[str, Any]]:
    """Of each variant: its share of second looks, agreement and speed."""
    greedy = SamplingConfig(max_new_tokens=tokens)
    answers: dict[str, list[GenerationResult]] = {name: [] for name in variants}
    for prompt, order in zip(prompts, interleaved(list(variants), len(prompts)), strict=True):
        for name in order:
            (result,) = lm.generate_batch_tokens([prompt], greedy, policy=variants[name])
            answers[name].append(result)
        print(f"answered {len(answers['backbone'])} of {len(prompts)}", flush=True)
    return [_summary(lm, name, prompts, answers) for name in variants]


def _summary(
    lm: RiverLM,
    name: str,
    prompts: Sequence[list[int]],
    answers: dict[str, list[GenerationResult]],
) -> dict[str, Any]:
    own = answers[name]
    agreed = count = looks = 0
    for prompt, answer in zip(prompts, own, strict=True):
        choices = backbone_choices(lm.engine, prompt, answer.tokens)
        agreed += sum(a == b for a, b in zip(choices, answer.tokens[1:], strict=True))
        count += len(choices)
        looks += answer.second_looks or 0
    ratios = [
        one.decode_tokens_per_second / base.decode_tokens_per_second
        for one, base in zip(own, answers["backbone"], strict=True)
        if one.decode_tokens_per_second and base.decode_tokens_per_second
    ]
    return {
        "variant": name,
        "tokens": count,
        "second_looks": looks / count,
        "agreement": agreed / count,
        "speed_up": median(ratios),
    }


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Agreement against the share of tokens that ran twice."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    leaving = results[1:]
    places = [one["second_looks"] for one in leaving]
    axes.plot(places, [one["agreement"] for one in leaving], "ko-", fillstyle="none")
    for one in leaving:
        point = one["second_looks"], one["agreement"]
        axes.annotate(one["variant"], point, fontsize=6, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="share of second looks", ylabel="tokens that are the backbone's argmax")
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--river", help="folder of a saved one")
    parser.add_argument("--prompts", type=Path, required=True, help="as check-exact takes them")
    parser.add_argument("--limit", type=int, default=20, help="prompts")
    parser.add_argument("--exit-layer", type=int, default=0)
    parser.add_argument(
        "--second-looks", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    given = arguments()
    lm = RiverLM.from_pretrained(given.model, given.river, engine=given.engine)
    prompts = [lm.encode(prompt) for prompt in read_prompts(given.prompts)[: given.limit]]
    variants = policies(given.exit_layer, given.second_looks)
    results = measure(lm, prompts, variants, given.new_tokens)
    described = {
        **describe(),
        "model": given.model,
        "river": lm.river_config.to_dict(),
        "engine": lm.engine.setting,
        "prompts": given.prompts.name,
    }
    write_json(given.output / "second_look.json", {**described, "results": results})
    write_figure(given.output / "second_look.png", draw(results))
    print_table(
        ["variant", "tokens", "second looks", "agreement", "x backbone"],
        [
            [
                one["variant"],
                str(one["tokens"]),
                f"{one['second_looks']:.1%}",
                f"{one['agreement']:.1%}",
                f"{one['speed_up']:.2f}",
            ]
            for one in results
        ],
    )


if __name__ == "__main__":
    main()
