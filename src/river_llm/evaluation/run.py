"""What the harness runs: one task with one model, item by item."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from river_llm.backbone import decoder_layers, fingerprint
from river_llm.engines import CpuEngine, Engine, TorchEngine
from river_llm.errors import ConfigError
from river_llm.evaluation.data import DataSource, Record, read_records
from river_llm.evaluation.statistics import mean_and_error, wilson_interval
from river_llm.river_lm import RiverLM

_SAMPLES = 1 << 16  # bytes of packed weights that enter their fingerprint


class Run(Protocol):
    """One task with one model.

    Attributes:
        name: of the task.
        ids: of the items, in order.
        identity: what decides over the answers, as plain JSON values.
        notes: what the user should know of it, a line each.
    """

    name: str
    notes: list[str]
    ids: list[int]
    identity: dict[str, Any]

    def answer(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Answer these items together: the record of each, without id and time."""
        ...

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What all records together say."""
        ...


def describe_model(lm: RiverLM, name: str) -> dict[str, Any]:
    """The model, the river, the policy and the engine, as plain JSON values."""
    engine = lm.engine
    return {
        "model": name,
        "weights": _weights(engine),
        "river": None if lm.river_config is None else lm.river_config.to_dict(),
        "policy": lm.policy.to_dict(),
        "engine": engine.name,
        "engine_setting": _setting(engine),
        "num_layers": engine.num_layers,
    }


def select(groups: Sequence[str | None], limit: int | None) -> list[int]:
    """Ids of the items to take: the first ones of each group in turn, in their own order.

    Args:
        groups: of every item.
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    seen: Counter[str | None] = Counter()
    places = []
    for group in groups:
        places.append(seen[group])
        seen[group] += 1
    in_turn = sorted(range(len(groups)), key=lambda item: (places[item], item))
    return sorted(in_turn[:limit])


def read_examples(
    source: DataSource | tuple[Record, ...] | None, directory: Path | None, shots: int
) -> list[Record]:
    """The records that examples are taken from; none where there are to be none.

    Raises:
        ConfigError: the task has no examples, or not so many.
        DataError: see `read_records`.
    """
    if shots < 0:
        raise ConfigError(f"--shots is {shots}; give 0 or more")
    if shots == 0:
        return []
    if source is None:
        raise ConfigError("this task has no examples; leave out --shots, or give 0")
    records = read_records(source, directory) if isinstance(source, DataSource) else list(source)
    if len(records) < shots:
        raise ConfigError(f"--shots is {shots}, but there are {len(records)} examples")
    return records


def summarise_verdicts(records: Sequence[Mapping[str, Any]], num_layers: int) -> dict[str, Any]:
    """Accuracy with its standard error and 95 % interval, every metric, groups, exit depth and
    speed, of records with verdicts."""
    correct = [bool(record["correct"]) for record in records]
    accuracy, error = mean_and_error([float(right) for right in correct])
    return {
        "items": len(records),
        "accuracy": accuracy,
        "standard_error": error,
        "interval_95": list(wilson_interval(sum(correct), len(correct))),
        "without_prediction": sum(record["prediction"] is None for record in records),
        "metrics": _metrics(records),
        "groups": _groups(records),
        **summarise_work(records, num_layers),
    }


def summarise_work(records: Sequence[Mapping[str, Any]], num_layers: int) -> dict[str, Any]:
    """Exit depth and speed."""
    histogram: Counter[int] = Counter()
    for record in records:
        histogram.update({int(layer): n for layer, n in record["exit_layers"].items()})
    count = sum(histogram.values())
    depth = sum(layer * n for layer, n in histogram.items()) / count if count else None
    tokens = sum(record["tokens"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    return {
        "mean_exit_layer": depth,
        "num_layers": num_layers,
        "exit_layers": {str(layer): histogram[layer] for layer in sorted(histogram)},
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def count_layers(exit_layers: Iterable[int]) -> dict[str, int]:
    """How many tokens ran so many backbone layers; JSON's keys are strings."""
    counts = Counter(exit_layers)
    return {str(layer): counts[layer] for layer in sorted(counts)}


def _metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of every further metric; lists count with each of their verdicts."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, verdict in record.get("metrics", {}).items():
            several = verdict if isinstance(verdict, list) else [verdict]
            values.setdefault(name, []).extend(map(float, several))
    found = {name: mean_and_error(numbers) for name, numbers in values.items() if numbers}
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in found.items()}


def _groups(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    verdicts: dict[str, list[bool]] = {}
    for record in records:
        if record.get("group") is not None:
            verdicts.setdefault(record["group"], []).append(bool(record["correct"]))
    return {
        name: {"items": len(right), "accuracy": sum(right) / len(right)}
        for name, right in sorted(verdicts.items())
    }


def _weights(engine: Engine) -> str:
    """A fingerprint of the weights that the engine holds."""
    if isinstance(engine, TorchEngine):
        return fingerprint(decoder_layers(engine.model))
    if isinstance(engine, CpuEngine):
        packed = engine.packed_weights[-1]  # river and LM head, which are always in memory
        sample = packed[:: max(1, len(packed) // _SAMPLES)]
        return f"packed-sha256:{hashlib.sha256(sample.tobytes()).hexdigest()}"
    return "unknown"


def _setting(engine: Engine) -> dict[str, Any]:
    """What changes the engine's arithmetic; threads don't."""
    # nothing about 16 bits, as in results from before there was a choice: they go on
    cache = {} if engine.kv_bits == 16 else {"kv_bits": engine.kv_bits}
    if isinstance(engine, CpuEngine):
        return {
            "kernels": engine.kernels,
            "backbone_bits": engine.backbone_bits,
            "lm_head_bits": engine.lm_head_bits,
            **cache,
        }
    if isinstance(engine, TorchEngine):
        dtype = str(engine.model.dtype).removeprefix("torch.")
        return {"dtype": dtype, "device": engine.device.type, **cache}
    return {"setting": engine.setting}
