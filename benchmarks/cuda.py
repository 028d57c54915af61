"""Speed and memory of the torch engine on a CUDA device, at a large shape with random weights.

    python benchmarks/cuda.py [--shape llama-3.1-8b] [--exit-layer 3] [--contexts 512 4096 65536]

Arms with all layers on the device decode in turn, those with evicted layers one after the other
behind them; speeds are medians of the rounds. Each reads the prompt with the layers that it has.
Memory is the most that PyTorch's allocator held on the device while it did and decoded. The model
alone, without a river, is measured before one is attached.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy, RiverConfig, attach_river
from river_llm.benchmark.random_weights import SHAPES, random_model, random_river
from river_llm.benchmark.turns import in_turn
from river_llm.engines import TorchEngine

TOKENS = 24  # of a round
WARM_UP = 4
VOCABULARY = 128_000
_Decode = Callable[[Tensor], Tensor]


@dataclass
class Arm:
    """One way to decode.

    Attributes:
        resident: backbone layers on the device; None: all, with the river.
        speeds: tokens a second, round by round.
        peak_bytes: of reading the prompt and decoding.
        prompt_seconds: to read the prompt.
    """

    name: str
    policy: ExitPolicy
    resident: int | None = None
    speeds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    prompt_seconds: float = 0.0
    misses: int = 0
    seconds_waited: float = 0.0

    def row(self) -> dict[str, Any]:
        """Its figures."""
        return {
            "arm": self.name,
            "tokens_per_second": round(statistics.median(self.speeds), 2),
            "slowest_and_fastest": [round(min(self.speeds), 2), round(max(self.speeds), 2)],
            "prompt_seconds": round(self.prompt_seconds, 3),
            "peak_gigabytes": round(self.peak_bytes / 1e9, 2),
            "misses": self.misses,
            "seconds_waited": round(self.seconds_waited, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {options.shape} with random weights, bfloat16"
    )
    print(f"copies between host and device: {_copy_speed() / 1e9:.1f} GB/s", flush=True)
    start = time.perf_counter()
    model = random_model(SHAPES[options.shape]).cuda()
    print(f"model on the device after {time.perf_counter() - start:.1f} s", flush=True)
    alone = {context: measure_alone(model, context) for context in options.contexts}
    start = time.perf_counter()
    attached = attach_river(model, random_river(model, RiverConfig()))
    torch.cuda.synchronize()
    print(
        f"river of {attached.num_bytes / 1e9:.2f} GB attached after "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )
    engine = TorchEngine(attached)
    for context in options.contexts:
        rows = measure(engine, context, options.exit_layer, options.rounds)
        for row in [alone[context], *rows]:
            print(json.dumps({"context": context, **row}), flush=True)


def measure_alone(model: PreTrainedModel, context: int) -> dict[str, Any]:
    """The model without a river, called as `transformers` does."""
    _begin()
    cache = DynamicCache()
    with torch.no_grad():
        start = time.perf_counter()
        arguments: dict[str, Any] = {"past_key_values": cache, "logits_to_keep": 1}
        model(_prompt(context).cuda(), **arguments)
        torch.cuda.synchronize()
        prompt_seconds = time.perf_counter() - start
        for _ in range(2):  # the first time, PyTorch's allocator takes memory piece by piece
            speed = speed_of(
                lambda token: model(token.view(1, 1).cuda(), **arguments).logits[:, -1]
            )
    return {
        "arm": "model without a river",
        "tokens_per_second": round(speed, 2),
        "prompt_seconds": round(prompt_seconds, 3),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def measure(
    engine: TorchEngine, context: int, exit_layer: int, rounds: int
) -> list[dict[str, Any]]:
    """All arms at one length of context."""
    fixed = ExitPolicy.fixed(exit_layer)
    arms = [
        Arm("backbone", ExitPolicy.never()),
        Arm("full 4-bit", ExitPolicy.always()),
        Arm(f"exit after {exit_layer}", fixed),
    ]
    for arm in arms:
        read_prompt(engine, arm, context)
    for order in in_turn(arms, rounds):
        for arm in order:
            decode(engine, arm, context)
    evicted = [
        Arm("full 4-bit, backbone evicted", ExitPolicy.always(), 0),
        Arm(f"exit after {exit_layer}, the others evicted", fixed, exit_layer),
        Arm("backbone, the others evicted", ExitPolicy.never(), exit_layer),
    ]
    for arm in evicted:
        assert arm.resident is not None
        engine.truncate(0)
        engine.keep_layers(arm.resident)
        read_prompt(engine, arm, context)
        before = engine.offload_statistics
        for _ in range(rounds):
            decode(engine, arm, context)
        after = engine.offload_statistics
        arm.misses = after.misses - before.misses
        arm.seconds_waited = after.seconds_waited - before.seconds_waited
    engine.keep_layers(engine.num_layers)
    return [arm.row() for arm in arms + evicted]


def read_prompt(engine: TorchEngine, arm: Arm, context: int) -> None:
    """Read the prompt with the layers that the arm has, and take memory and time of it."""
    _begin()
    engine.truncate(0)
    engine.policy = arm.policy
    if arm.resident is not None and arm.policy != ExitPolicy.never():
        engine.depth_limit = arm.resident
    start = time.perf_counter()
    engine.prefill(_prompt(context)).best_tokens.tolist()
    arm.prompt_seconds = time.perf_counter() - start
    speed_of(lambda token: engine.decode(token.cpu()).logits)
    arm.peak_bytes = torch.cuda.max_memory_allocated()
    engine.depth_limit = None


def decode(engine: TorchEngine, arm: Arm, context: int) -> None:
    """One round."""
    engine.truncate(context)
    engine.policy = arm.policy
    arm.speeds.append(speed_of(lambda token: engine.decode(token.cpu()).logits))


def speed_of(step: _Decode) -> float:
    """Tokens a second of a step that takes the last token `[1]` and gives logits `[1, V]`."""
    token = torch.zeros(1, dtype=torch.long)
    for place in range(-WARM_UP, TOKENS):
        if place == 0:
            torch.cuda.synchronize()
            start = time.perf_counter()
        token = (
            step(token).argmax(-1).cpu()
        )  # it is sent back before the next step, as in an answer
    return TOKENS / (time.perf_counter() - start)


def _prompt(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (1, length), generator=generator)


def _begin() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def _copy_speed() -> float:
    """Bytes a second from pinned memory of the host."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return source.nbytes / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
