"""The paper's tables on one of its models, ours beside the paper's (`paper.yaml`).

    python experiments/paper_tables.py --model llama-3.2-1b-instruct -o results
    python experiments/paper_tables.py --model llama-3.1-8b-instruct --weights path/to/weights
    python experiments/paper_tables.py --weights smollm2 --tasks arc_easy --limit 20

Backbone, all layers in 4 bits, and River at each threshold of the paper: accuracies by lm-eval with
the paper's shots, in River with prompts that leave as a whole; speed and peak memory by `river-llm
bench`. `--weights` without `--model` runs the same on a model that the paper doesn't have. The JSON
file is written after each measurement, and the same command goes on where it was cut short.
`humaneval` runs programs that the model wrote: only with --allow-code-execution, in a container.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import yaml  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from output import describe, print_table, write_figure, write_json

from river_llm import ExitPolicy, RiverConfig, RiverLM

PAPER: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text("utf-8"))
_SETTINGS = ("model", "weights", "group_size", "limit", "engine", "local")
_LOCAL_TASKS = Path(__file__).with_name("tasks")
_GIB = 1 << 30


class Saved:
    """Measurements by name, in a JSON file that is written after each."""

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool) -> None:
        """
        Raises:
            SystemExit: the file holds measurements of other settings.
        """
        self.path = path
        self.values: dict[str, Any] = {**describe(), "settings": settings, "measured": {}}
        if path.exists() and not restart:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["settings"] != settings:
                raise SystemExit(f"{path} is of other settings; give another -o, or --restart")
            self.values["measured"] = before["measured"]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this name, now or before."""
        measured = self.values["measured"]
        if name not in measured:
            print(f"measuring {name}", flush=True)
            measured[name] = measure()
            write_json(self.path, self.values)
        return measured[name]


def variants(thresholds: Sequence[float]) -> dict[str, ExitPolicy]:
    """By name, as `river-llm bench` has them."""
    river = [ExitPolicy.similarity(tau, prefill="sequence") for tau in thresholds]
    return {
        "backbone": ExitPolicy.never(),
        f"full {PAPER['bits']}-bit": ExitPolicy.always(),
        **{policy.describe(): policy for policy in river},
    }


class Tasks:
    """Runs lm-eval's tasks on one model, which is loaded when it is first needed."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._lm: RiverLM | None = None

    def run(self, task: str, policy: ExitPolicy) -> dict[str, Any]:
        """Accuracy with its standard error, mean exit layer, and what was right, item by item."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from river_llm.measure.lm_eval_model import RiverEvalLM

        given, of_paper = self._given, PAPER["tasks"][task]
        if self._lm is None:
            config = RiverConfig(PAPER["bits"], given.group_size)
            self._lm = RiverLM.from_pretrained(given.weights, config, engine=given.engine)
        self._lm.policy = policy
        model = RiverEvalLM(self._lm, batch_size=given.batch_size)
        found = simple_evaluate(
            model=model,
            tasks=[of_paper["local"] if given.local else task],
            num_fewshot=of_paper["shots"],
            limit=given.limit,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(_LOCAL_TASKS)),
            confirm_run_unsafe_code=given.allow_code_execution,
        )
        depth = model.get_model_info()["river_llm"]["mean_exit_layer"]
        kept = summarise(found, task, of_paper["metric"])
        return {**kept, "mean_exit_layer": depth}


def summarise(found: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    """What we keep of lm-eval's results."""
    name, chosen = metric.split(",")
    items = [
        float(sample[name])
        for own_name in sorted(found["samples"])
        for sample in found["samples"][own_name]
        if sample.get("filter", "none") == chosen
    ]
    results = found["results"]
    accuracy = float(results.get(task, results.get(f"{task}_local"))[metric])
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(items)),
        "items": items,
    }


def bench(given: argparse.Namespace, *options: object) -> list[dict[str, Any]]:
    """Results of `river-llm bench` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    of_model = ["--model", given.weights, "--group-size", given.group_size]
    start = [sys.executable, "-c", "from river_llm.cli import main; main()"]
    command = ["bench", "--json", *map(str, [*of_model, *options])]
    done = subprocess.run([*start, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"this failed: river-llm {shlex.join(command)}")
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results


def interval(found: dict[str, Any]) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy."""
    z, p, n = NormalDist().inv_cdf(0.975), found["accuracy"], len(found["items"])
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mcnemar(items: Sequence[float], others: Sequence[float]) -> float:
    """Two-sided exact p that two variants are right equally often."""
    won = sum(a > b for a, b in zip(items, others, strict=True))
    lost = sum(a < b for a, b in zip(items, others, strict=True))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << (won + lost)))


def paper_figures(model: dict[str, Any], task: str, policy: ExitPolicy) -> dict[str, float]:
    """What the paper's table has for a variant; empty where it has nothing."""
    figures = model.get("figures", {}).get(task, {})
    if policy.threshold is None:
        return dict(figures.get("backbone" if policy.kind == "never" else "full", {}))
    lowest, highest = model.get("table", (math.inf, -math.inf))
    return dict(figures.get("river", {})) if lowest <= policy.threshold <= highest else {}


def accuracy_rows(
    measured: dict[str, Any],
    model: dict[str, Any],
    tasks: Sequence[str],
    policies: dict[str, ExitPolicy],
) -> list[dict[str, Any]]:
    """Each variant on each task: ours, and the paper's; `verdict` says whether the paper's lies
    outside our interval."""
    rows = []
    for task in tasks:
        for name, policy in policies.items():
            found, base = measured[f"{task}, {name}"], measured[f"{task}, backbone"]
            low, high = interval(found)
            paper = paper_figures(model, task, policy)
            claimed = paper.get("accuracy", math.nan) / 100
            verdict = "higher" if low > claimed else "lower" if high < claimed else "within"
            rows.append(
                {
                    "task": task,
                    "variant": name,
                    **{key: value for key, value in found.items() if key != "items"},
                    "items": len(found["items"]),
                    "interval_95": [low, high],
                    "p_against_backbone": mcnemar(found["items"], base["items"]),
                    "paper": paper,
                    "verdict": verdict if "accuracy" in paper else None,
                }
            )
    return rows


def bandwidth_share(model: dict[str, Any]) -> float | None:
    """Of its card's bandwidth, what the paper's own backbone reaches on GSM8K: its speed-ups depend
    on how slow that is."""
    figures = model.get("figures", {}).get("gsm8k", {})
    river = figures.get("river", {})
    speed = figures.get("backbone", {}).get("speed")
    if speed is None and "speed" in river and "speed_up" in river:
        speed = river["speed"] / river["speed_up"]
    read = model.get("gigabytes_per_token")
    if speed is None or read is None:
        return None
    return float(speed * read / PAPER["machine"]["gigabytes_per_second"])


def measure_speed(given: argparse.Namespace, thresholds: Sequence[float]) -> dict[str, Any]:
    """Decoding in interleaved rounds, by variant; how many times the backbone's speed."""
    taus = ",".join(f"{tau:g}" for tau in thresholds)
    options = ["--engine", given.engine, "--prompt-tokens", 0, "--new-tokens", given.speed_tokens]
    found = bench(given, "--threshold", taus, *options)
    return {
        result["variant"]: {
            "tokens_per_second": result["tokens_per_second"],
            "speed_up": result["ratios"]["backbone"],
            "mean_exit_layer": result["mean_exit_layer"],
        }
        for result in found
    }


def measure_memory(given: argparse.Namespace, depth: int) -> dict[str, Any]:
    """Resident and peak bytes of each variant at the paper's length of context, every token of
    River leaving after `depth` layers."""
    context = min(PAPER["memory_context"], given.memory_context)
    found = bench(given, "--memory", "--exit-layer", depth, "--depth", context, "--rounds", 1)
    keys = ("context", "steady_bytes", "peak_bytes", "expected_bytes", "tokens_per_second")
    return {result["variant"]: {key: result[key] for key in keys} for result in found}


def draw(rows: Sequence[dict[str, Any]], speeds: dict[str, Any]) -> Figure:
    """Accuracies with their intervals beside the paper's; speed-ups."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    by_accuracy, by_speed = figure.subplots(1, 2, width_ratios=[2, 1])
    labels = [f"{row['task']}, {row['variant']}" for row in rows]
    for place, row in enumerate(rows):
        low, high = row["interval_95"]
        by_accuracy.plot([100 * low, 100 * high], [place, place], "k-", linewidth=1)
        by_accuracy.plot(100 * row["accuracy"], place, "ko")
        if "accuracy" in row["paper"]:
            by_accuracy.plot(row["paper"]["accuracy"], place, "kx", markersize=9)
    by_accuracy.set_yticks(range(len(rows)), labels, fontsize="small")
    by_accuracy.invert_yaxis()
    by_accuracy.set(xlabel="accuracy, %; line: our 95 % interval, cross: the paper's")
    by_speed.barh(list(speeds), [s["speed_up"]["median"] for s in speeds.values()], color="0.6")
    by_speed.invert_yaxis()
    by_speed.set(xlabel="decoding speed, times the backbone's")
    return figure


def report(
    rows: Sequence[dict[str, Any]],
    speeds: dict[str, Any],
    memory: dict[str, Any],
    model: dict[str, Any],
) -> None:
    """Print the tables."""

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    print_table(
        ["task, variant", "accuracy", "the paper's", "", "p", "depth", "paper's speed-up"],
        [
            [
                f"{row['task']}, {row['variant']}",
                f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}",
                figure(row["paper"].get("accuracy"), "{:.1f}%"),
                row["verdict"] or "",
                f"{row['p_against_backbone']:.3g}",
                figure(row["mean_exit_layer"], "{:.1f}"),
                figure(row["paper"].get("speed_up"), "{:.2f}x"),
            ]
            for row in rows
        ],
    )
    print_table(
        ["variant", "tokens/s", "speed-up", "depth"],
        [
            [
                name,
                f"{found['tokens_per_second']['median']:.1f}",
                f"{found['speed_up']['median']:.2f}x",
                figure(found["mean_exit_layer"], "{:.1f}"),
            ]
            for name, found in speeds.items()
        ],
    )
    papers = model.get("memory", {})  # by variant; an exit's depth is left out
    print_table(
        ["variant", "context", "resident GiB", "peak GiB", "the paper's"],
        [
            [
                name,
                str(found["context"]),
                f"{found['steady_bytes'] / _GIB:.2f}",
                f"{found['peak_bytes'] / _GIB:.2f}",
                figure(papers.get(re.sub(r"after \d+, ", "", name)), "{:.2f}"),
            ]
            for name, found in memory.items()
        ],
    )
    if (share := bandwidth_share(model)) is not None:
        print(f"The paper's backbone reaches {share:.0%} of its card's bandwidth (GSM8K).")


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(PAPER["models"]), help="of the paper")
    parser.add_argument("--weights", help="a model directory, GGUF file or Hub id")
    parser.add_argument("--tasks", nargs="*", choices=list(PAPER["tasks"]), help="default: all")
    parser.add_argument("--thresholds", type=float, nargs="+")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--local", action="store_true", help="take the files in $RIVER_LLM_DATA")
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--speed-tokens", type=int, default=256)
    parser.add_argument("--memory-context", type=int, default=PAPER["memory_context"])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="a folder")
    given = parser.parse_args()
    if given.model is None and given.weights is None:
        parser.error("give --model, --weights, or both")
    model = PAPER["models"].get(given.model, {})
    given.weights = given.weights or model["hub"]
    given.thresholds = given.thresholds or model.get("thresholds", [0.5, 0.7])
    if given.tasks is None:
        given.tasks = [t for t in PAPER["tasks"] if t != "humaneval" or given.allow_code_execution]
    elif "humaneval" in given.tasks and not given.allow_code_execution:
        parser.error("humaneval needs --allow-code-execution")
    return given


def main() -> None:
    """See the module."""
    given = arguments()
    if given.allow_code_execution:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
    model = PAPER["models"].get(given.model, {})
    settings = {name: getattr(given, name) for name in _SETTINGS}
    saved = Saved(given.output / "paper_tables.json", settings, given.restart)
    policies, tasks = variants(given.thresholds), Tasks(given)
    for task in given.tasks:
        for name, policy in policies.items():
            saved.once(f"{task}, {name}", lambda t=task, p=policy: tasks.run(t, p))  # type: ignore[misc]
    measured = saved.values["measured"]
    rows = accuracy_rows(measured, model, given.tasks, policies)
    taus = ", ".join(f"{tau:g}" for tau in given.thresholds)
    speeds = saved.once(f"speed, {taus}", lambda: measure_speed(given, given.thresholds))
    memory = {}
    if not given.no_memory:
        first = ExitPolicy.similarity(given.thresholds[0]).describe()
        depths = [row["mean_exit_layer"] for row in rows if row["variant"] == first]
        depth = math.ceil(fmean([d for d in depths if d] or [speeds[first]["mean_exit_layer"]]))
        memory = saved.once(f"memory, {depth}", lambda: measure_memory(given, depth))
    saved.values |= {"accuracies": rows, "speeds": speeds, "memory": memory}
    saved.values["paper"] = {**model, "bandwidth_share": bandwidth_share(model)}
    write_json(saved.path, saved.values)
    write_figure(given.output / "paper_tables.png", draw(rows, speeds))
    report(rows, speeds, memory, model)


if __name__ == "__main__":
    main()
