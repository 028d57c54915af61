"""The `generate()` of `transformers` on the plain model, timed by the tokens that come out."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_llm.benchmark.arms import Clock, Timing
from river_llm.benchmark.step_bytes import ModelBytes
from river_llm.benchmark.workload import TokenSource, Workload
from river_llm.exit_policy import ExitPolicy


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model as modules of its own around the same weights, so that a river that is attached to
    one doesn't run in the other, and a model let go of by an engine stays here."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


class TransformersArm:
    """Greedy `generate()`; see `Arm`."""

    engine = "transformers"
    policy: ExitPolicy | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: TokenSource,
        sizes: ModelBytes,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Take over `model`, a plain copy."""
        self.name = f"transformers {_short(model.dtype)}"
        self._model = model
        # no stop token, so that every run has the same number of tokens
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )
        self._tokens = tokens
        self._sizes = sizes
        self._clock = clock
        self._cache = DynamicCache()
        self._batch = 0

    def takes(self, workload: Workload) -> bool:
        """Every workload."""
        return True

    @torch.no_grad()
    def prepare(self, workload: Workload) -> None:
        # the last token of a context runs within generate(), to give the first new one
        wanted = workload.context - (workload.kind == "decode")
        have = self._cache.get_seq_length()
        if self._batch != workload.batch or have < wanted or wanted == 0:
            self._cache, self._batch = DynamicCache(), workload.batch
            if wanted:
                context = self._tokens.take(workload.batch, 0, wanted).to(self._model.device)
                self._model(context, past_key_values=self._cache, logits_to_keep=1)
        elif have > wanted:
            self._cache.crop(wanted - have)  # this many fewer

    def run(self, workload: Workload) -> Timing:
        is_prompt = workload.kind == "prompt"
        length = workload.end if is_prompt else workload.context
        token_ids = self._tokens.take(workload.batch, 0, length).to(self._model.device)
        watch = _StopWatch(self._clock)
        start = self._clock()
        self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            past_key_values=self._cache,
            max_new_tokens=1 if is_prompt else workload.tokens + 1,
            streamer=watch,
        )
        count = workload.batch * workload.tokens
        if is_prompt:
            return Timing(watch.times[0] - start, count)
        layers = len(self._sizes.backbone_layers)
        read = sum(
            self._sizes.step([layers] * workload.batch, workload.context + index)
            for index in range(workload.tokens)
        )
        return Timing(watch.times[-1] - watch.times[0], count, read / count)


class _StopWatch(BaseStreamer):  # type: ignore[misc]
    """When each new token came; the prompt, which comes first, doesn't count."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self._clock = clock
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            self.times.append(self._clock())
        self._saw_prompt = True

    def end(self) -> None:
        pass


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)
