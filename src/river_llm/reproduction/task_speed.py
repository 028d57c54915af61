"""Tokens per second of every arm along the backbone's own answers to a task."""

from __future__ import annotations

from itertools import chain, cycle, islice
from pathlib import Path

import torch

from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.environment import processor_name
from river_llm.engines import Engine
from river_llm.errors import ConfigError
from river_llm.evaluation.generation_run import GenerationRun
from river_llm.evaluation.requests import make_run
from river_llm.report.arms import BACKBONE
from river_llm.report.identity import model_identity, tokens_digest
from river_llm.report.models import Models, Progress
from river_llm.report.quality import TaskResults
from river_llm.report.saved import Values, measured_once
from river_llm.report.speed import measure_speed
from river_llm.reproduction.paper import PaperTask
from river_llm.reproduction.plan import Plan, settings_for

_FEWEST_TOKENS = 2  # that a speed is measured with


def measure_task_speed(
    plan: Plan,
    models: Models,
    task: PaperTask,
    found: TaskResults,
    folder: Path,
    read_bandwidth: ReadBandwidth,
    threads: int,
    progress: Progress | None,
) -> Values:
    """Let every arm decode the backbone's own answers after the prompt of the first item.

    Raises:
        ConfigError: there are no answers, or no room for them.
    """
    lm = models.of(BACKBONE)
    run = make_run(lm, task.name, settings_for(task, plan.settings))
    assert isinstance(run, GenerationRun)
    prompt = run.prompt_tokens(run.ids[0])
    items = found.results[BACKBONE.name].items
    answers = list(
        chain.from_iterable(
            lm.tokenizer(items[item]["answer"], add_special_tokens=False).input_ids
            for item in run.ids
        )
    )
    room = lm.engine.context_length
    tokens = plan.speed_tokens if room is None else min(plan.speed_tokens, room - len(prompt))
    if not answers or tokens < _FEWEST_TOKENS:
        why = "the backbone's answers are empty" if not answers else "the prompt fills the context"
        raise ConfigError(f"not measured: {why}")
    token_ids = [*prompt, *islice(cycle(answers), tokens)]
    lm.forget_cache()
    settings = {
        "context": len(prompt),
        "tokens": tokens,
        "rounds": plan.rounds,
        "threads": threads,
    }
    return measured_once(
        folder / "measurements" / f"speed.{task.name}.json",
        {
            "model": model_identity(lm, plan.settings.model),
            "setting": lm.engine.setting,
            "machine": machine_of(lm.engine),
            "arms": {arm.name: arm.policy.to_dict() for arm in plan.arms},
            "text": tokens_digest(token_ids),
            **settings,
        },
        lambda: measure_speed(
            models,
            plan.arms,
            token_ids,
            tokens=tokens,
            rounds=plan.rounds,
            threads=threads,
            read_bandwidth=read_bandwidth,
            context=len(prompt),
            progress=progress,
        ),
        plan.restart,
    )


def machine_of(engine: Engine) -> str:
    """What computes: the accelerator where there is one, else the processor."""
    device = getattr(engine, "device", None)
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()
