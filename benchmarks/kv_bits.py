"""What a KV cache of 8 bits changes: KL divergence and likeliest tokens on a text file.

    python benchmarks/kv_bits.py TEXT [--model M] [--tokens 8192] [--windows 4] [--context 2048]

The first table runs the text's first tokens through the engine with a cache of 16 bits and with one
of 8, the same tokens in the same pieces, and compares the logits of every token by how many stood
before it. The second one asks where keys should be rounded, before their rotary embedding or after
it, in float32 on windows of the text that stand on their own: rounding is put into the model there,
for models of the Llama family whose keys have no norm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import river_llm
from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.backbone import decoder_layers
from river_llm.engines.kv_cache import dequantize_states, quantize_states
from river_llm.load.model import load_backbone
from river_llm.measure.divergence import compare_logits

PIECE = 256  # tokens of a pass of the first table
BORDERS = (0, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Score:
    """Over some tokens: mean KL divergence in nats, its 99 % quantile, share of the same likeliest
    token, and perplexities."""

    name: str
    num_tokens: int
    mean_kld: float
    kld_99: float
    same_top: float
    perplexity: float
    reference_perplexity: float


class Comparison:
    """Logits beside those of a reference, piece by piece."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Logits `[tokens, vocabulary]` that predict `targets`."""
        of_reference, _, _ = compare_logits(reference, reference, targets)
        self._parts.append((*compare_logits(logits, reference, targets), of_reference))

    def score(self, name: str, first: int = 0, end: int | None = None) -> Score:
        """Of the tokens [first, end)."""
        joined = [torch.cat(part)[first:end] for part in zip(*self._parts, strict=True)]
        nll, kld, same, of_reference = joined
        return Score(
            name=name,
            num_tokens=len(kld),
            mean_kld=float(kld.mean()),
            kld_99=float(kld.quantile(0.99)),
            same_top=float(same.mean()),
            perplexity=float(nll.mean().exp()),
            reference_perplexity=float(of_reference.mean().exp()),
        )


def by_context(model: str, engine: str, text: str, num_tokens: int) -> tuple[str, list[Score]]:
    """The engine's setting, and its cache of 8 bits beside that of 16, by tokens before."""
    engines = []
    for kv_bits in (16, 8):
        lm = RiverLM.from_pretrained(
            model,
            RiverConfig(quantizer="rtn"),  # nothing enters the river
            ExitPolicy.never(),
            engine=engine,  # type: ignore[arg-type]
            kv_bits=kv_bits,
        )
        engines.append(lm.engine)
    most = min(num_tokens, engines[0].context_length or num_tokens)
    token_ids = lm.tokenizer(text).input_ids[:most]
    tokens = torch.tensor([token_ids])
    comparison = Comparison()
    for start in range(0, len(token_ids) - 1, PIECE):
        piece = tokens[:, start : min(start + PIECE, len(token_ids) - 1)]
        targets = tokens[0, start + 1 : start + 1 + piece.shape[1]]
        reference, logits = (engine.verify(piece).logits[0] for engine in engines)
        comparison.add(logits, reference, targets)
        Console(stderr=True).print(f"{start + piece.shape[1]}/{len(token_ids)} tokens", end="\r")
    ends = [border for border in BORDERS if border < len(token_ids)]
    ranges = list(zip(ends, [*ends[1:], len(token_ids)], strict=True))
    scores = [comparison.score(f"{first} to {end}", first, end) for first, end in ranges]
    return engines[1].setting, [*scores, comparison.score("all")]


# ---- where keys are rounded ----


def rounded(states: Tensor) -> Tensor:
    """Keys or values `[..., D]` as a cache of 8 bits gives them back."""
    return dequantize_states(*quantize_states(states), states.dtype)


class RoundingLayer(DynamicLayer):
    """A cache layer that rounds keys, values or both."""

    def __init__(self, keys: bool, values: bool) -> None:
        super().__init__()
        self._rounds = (keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, G, T, D]`."""
        keys, values = self._rounds
        result: tuple[Tensor, Tensor] = super().update(
            rounded(key_states) if keys else key_states,
            rounded(value_states) if values else value_states,
        )
        return result


@contextmanager
def rounded_before_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Within, keys are rounded as their projection gives them."""
    head_dim = model.config.head_dim

    def round_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return rounded(output.unflatten(-1, (-1, head_dim))).flatten(-2)

    with ExitStack() as ending:
        for layer in decoder_layers(model):
            hook = layer.module.self_attn.k_proj.register_forward_hook(round_output)
            ending.callback(hook.remove)
        yield


@torch.no_grad()
def logits_of(model: PreTrainedModel, window: Tensor, keys: bool, values: bool) -> Tensor:
    """Logits `[T - 1, vocabulary]` that predict `window[1:]`, of a cache that rounds."""
    cache = DynamicCache()
    cache.layers = [RoundingLayer(keys, values) for _ in decoder_layers(model)]
    logits: Tensor = model(input_ids=window.unsqueeze(0), past_key_values=cache).logits
    return logits[0, :-1]


def by_rounding(model: PreTrainedModel, windows: list[Tensor]) -> list[Score]:
    """Each way to round beside none."""

    def before(window: Tensor) -> Tensor:
        with rounded_before_rotation(model):
            return logits_of(model, window, keys=False, values=True)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "keys after RoPE, values": partial(logits_of, model, keys=True, values=True),
        "keys before RoPE, values": before,
        "keys after RoPE only": partial(logits_of, model, keys=True, values=False),
        "values only": partial(logits_of, model, keys=False, values=True),
    }
    comparisons = {name: Comparison() for name in ways}
    for done, window in enumerate(windows, start=1):
        reference = logits_of(model, window, keys=False, values=False)
        for name, way in ways.items():
            comparisons[name].add(way(window), reference, window[1:])
        Console(stderr=True).print(f"{done}/{len(windows)} windows", end="\r")
    return [comparison.score(name) for name, comparison in comparisons.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engine", default="auto", choices=["auto", "cpu", "torch"])
    parser.add_argument("--tokens", type=int, default=8192, help="of the first table; 0: none")
    parser.add_argument("--windows", type=int, default=4, help="of the second table; 0: none")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--json", type=Path, help="write the result file there")
    arguments = parser.parse_args()

    text = arguments.text.read_text(encoding="utf-8")
    setting, contexts, roundings = "", [], []
    console = Console(width=110)
    if arguments.tokens:
        setting, contexts = by_context(arguments.model, arguments.engine, text, arguments.tokens)
        console.print(table(f"8 bits beside 16, by tokens before ({setting})", contexts))
    if arguments.windows:
        model, tokenizer = load_backbone(arguments.model, torch.float32)
        token_ids = torch.tensor(tokenizer(text).input_ids)
        windows = [
            window
            for window in token_ids.split(arguments.context)[: arguments.windows]
            if len(window) == arguments.context
        ]
        if not windows:
            sys.exit(f"{arguments.text} has less than one window of {arguments.context} tokens")
        roundings = by_rounding(model, windows)
        title = f"where keys are rounded, float32, {len(windows)} windows of {arguments.context}"
        console.print(table(title, roundings))
    if arguments.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "model": arguments.model,
            "engine": setting,
            "processor": platform.processor() or platform.machine(),
            "versions": {
                "river_llm": river_llm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "by_context": [asdict(score) for score in contexts],
            "by_rounding": [asdict(score) for score in roundings],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def table(title: str, scores: list[Score]) -> Table:
    result = Table(title=title)
    for heading in ("", "tokens", "mean KLD", "99 %", "same top", "perplexity", "of 16 bits"):
        result.add_column(heading, justify="right" if heading else "left")
    for score in scores:
        result.add_row(
            score.name,
            str(score.num_tokens),
            f"{score.mean_kld:.6f}",
            f"{score.kld_99:.5f}",
            f"{100 * score.same_top:.2f} %",
            f"{score.perplexity:.3f}",
            f"{score.reference_perplexity:.3f}",
        )
    return result


if __name__ == "__main__":
    main()
