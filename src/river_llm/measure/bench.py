"""The variants of one model, timed against each other: backbone, full quantisation, River, lossless
mode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from river_llm.config import SamplingConfig
from river_llm.engines import CpuEngine, Engine, Step
from river_llm.engines.native_core import usable_threads
from river_llm.generate.rows import prefill
from river_llm.generate.second_look import SPAN, Again, run_step
from river_llm.lm import RiverLM
from river_llm.measure.bandwidth import BUFFER_BYTES, read_bandwidth
from river_llm.measure.environment import describe_run
from river_llm.measure.rounds import Progress, Timing, Variant, Workload, measure
from river_llm.river.policy import ExitPolicy

_SEQUENCE_STRIDE = 37  # a batch's sequences begin so many tokens apart: none is another's copy

# Plain prose, so that a similarity policy meets text like that which models are used on.
PROSE = """\
A river begins where water gathers: in a spring, under a glacier, in a marsh that never dries. It
takes the steepest way down that it can find, and where the ground is soft it carves a bed that
later floods will follow. Stones that came down as blocks arrive at the plain as gravel, and the
gravel arrives at the sea as sand. People settled along such banks because the soil was good and
the road was already there. They built mills, then bridges, then harbours, and they learned, often
too late, that a river keeps the right to move. In dry years the towns upstream and those
downstream quarrel over the same water; in wet years they carry sandbags for each other. Engineers
have straightened long reaches and given them walls, which sends a flood on faster to whoever lives
below. Lately some walls have been taken back, and meadows flood again as they used to, slowly and
without much harm. Fish return first, then the birds that eat them.
"""


class Text:
    """Tokens to run, the same for every variant: prose over and over, or any ids at all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        ids = [] if tokenizer is None else list(tokenizer(PROSE).input_ids)
        if len(ids) < 2 or max(ids) >= vocab_size:
            ids = [(1 + 7919 * index) % vocab_size for index in range(1009)]
        self._ids = torch.tensor(ids)

    def tokens(self, batch: int, first: int, count: int) -> Tensor:
        """Those at positions `first` to `first + count`, int64 `[batch, count]`."""
        starts = torch.arange(batch).unsqueeze(1) * _SEQUENCE_STRIDE
        return self._ids[(starts + torch.arange(first, first + count)) % len(self._ids)]


class Session:
    """Sequences of an engine that several variants share, since they never run at once. All that
    they ask of an engine is here."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sequences: list[int] = []

    def fill(self, workload: Workload, text: Text) -> None:
        """Have exactly the workload's context in the cache, computed once by the backbone."""
        lengths = [self.engine.length(sequence) for sequence in self._sequences]
        if len(lengths) != workload.batch or min(lengths) < workload.context:
            self.restart(workload.batch)
            if workload.context:
                self.prefill(text.tokens(workload.batch, 0, workload.context), ExitPolicy.never())
        for sequence in self._sequences:
            self.engine.truncate(sequence, workload.context)

    def restart(self, batch: int = 0) -> None:
        """Begin anew with so many empty sequences."""
        while self._sequences:
            self.engine.drop_sequence(self._sequences.pop())
        self._sequences = [self.engine.add_sequence() for _ in range(batch)]

    def prefill(self, texts: Tensor, policy: ExitPolicy) -> list[int]:
        """Run the rest of the texts `[batch, tokens]`, and wait for the next tokens."""
        pairs = zip(self._sequences, texts.tolist(), strict=True)
        return [int(prefill(self.engine, *pair, policy).best_tokens[0]) for pair in pairs]

    def decode(
        self,
        tokens: list[int],
        thresholds: Tensor,
        second_look: float | None = None,
        before: Sequence[Sequence[int]] = (),
    ) -> tuple[list[int], Tensor, Again]:
        """Append a token to each sequence: the next tokens, the exit layers `[batch]`, and which
        sequences ran again, with the tokens before."""
        step = Step(tokens, self._sequences, thresholds, range(len(tokens)))
        looks = [second_look] * len(tokens)
        result, again = run_step(self.engine, step, looks, before, keep_logits=False)
        return result.best_tokens.tolist(), result.exit_layers, again

    def step_bytes(
        self, exit_layers: Sequence[int], position: int, again: Again | None = None
    ) -> int | None:
        """Bytes that a decode step reads; None where the engine keeps no account. A weight is read
        once for all sequences; where some are in the backbone and others in the river, both of a
        layer's weights are.

        Args:
            exit_layers: how many backbone layers each sequence ran.
            position: tokens of each in the cache before.
            again: sequences that ran again, through the backbone, and how many layers at first.
        """
        if not isinstance(self.engine, CpuEngine):
            return None
        if again:
            at_first = [again.get(i, layers) for i, layers in enumerate(exit_layers)]
            passes = at_first, [self.engine.num_layers] * len(again)
            return sum(self.step_bytes(depths, position) or 0 for depths in passes)
        account = self.engine.step_bytes
        shallowest, deepest = min(exit_layers), max(exit_layers)
        weights: int = account(shallowest, 0) + sum(self.engine.layer_bytes[shallowest:deepest])
        cache = account(shallowest, position) - account(shallowest, 0)
        return weights + len(exit_layers) * cache


class EngineVariant:
    """An engine with an exit policy, greedy; see `Variant`."""

    def __init__(self, name: str, session: Session, policy: ExitPolicy, text: Text) -> None:
        self.name = name
        self.engine = session.engine.name
        self._session = session
        self._policy = policy
        self._text = text

    def takes(self, workload: Workload) -> bool:
        """A prompt that the policy sends through the backbone is timed as the backbone's alone, and
        one with a second look at its last token as one without."""
        policy = self._policy
        through_backbone = policy.prefill == "backbone" and policy.kind != "never"
        return workload.kind == "decode" or not (through_backbone or policy.second_look)

    def prepare(self, workload: Workload) -> None:
        self._session.fill(workload, self._text)

    def run(self, workload: Workload) -> Timing:
        session, count = self._session, workload.batch * workload.tokens
        if workload.kind == "prompt":
            prompt = self._text.tokens(workload.batch, 0, workload.end)
            start = time.perf_counter()
            session.prefill(prompt, self._policy)
            return Timing(time.perf_counter() - start, count)
        tokens = self._text.tokens(workload.batch, workload.context, 1)[:, 0].tolist()
        thresholds = torch.tensor(self._policy.thresholds(session.engine.num_layers))
        look = self._policy.second_look
        texts = [[token] for token in tokens]
        steps = []
        start = time.perf_counter()
        for _ in range(workload.tokens):
            before = [text[-SPAN:-1] for text in texts]
            tokens, exit_layers, again = session.decode(tokens, thresholds, look, before)
            for i, token in enumerate(tokens):
                texts[i] = [token] if i in again else [*texts[i][-SPAN:], token]
            steps.append((exit_layers, again))
        seconds = time.perf_counter() - start
        depths: list[list[int]] = [exit_layers.tolist() for exit_layers, _ in steps]
        agains = [again for _, again in steps]
        places = range(workload.context, workload.end)
        reads = list(map(session.step_bytes, depths, places, agains))
        read = None if None in reads else sum(filter(None, reads)) / count
        looks = None if look is None else sum(map(len, agains)) / count
        return Timing(seconds, count, read, sum(map(sum, depths)) / count, looks)


class LosslessVariant:
    """Lossless mode, greedy, with the context as its prompt; its speed depends on the text, and
    prose that comes again is easy to guess. See `Variant`."""

    def __init__(self, name: str, lm: RiverLM, text: Text) -> None:
        self.name = name
        self.engine = lm.engine.name
        # an answer of its own has no end
        self._lm = RiverLM(lm.engine, lm.tokenizer, lm.river_config)
        self._text = text

    def takes(self, workload: Workload) -> bool:
        """Decoding: prompts are the backbone's."""
        return workload.kind == "decode"

    def prepare(self, workload: Workload) -> None:
        """Its prompt is read in the run, and not timed."""

    def run(self, workload: Workload) -> Timing:
        prompts = self._text.tokens(workload.batch, 0, workload.context).tolist()
        sampling = SamplingConfig(max_new_tokens=workload.tokens + 1)  # the first is the prompt's
        answers = self._lm.generate_batch_tokens(prompts, sampling)
        slowest = min(answer.decode_tokens_per_second or 0.0 for answer in answers)
        return Timing(workload.tokens / slowest, workload.batch * workload.tokens)


def make_variants(
    engine: Engine,
    text: Text,
    width: str,
    exit_layers: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    second_looks: Sequence[float] = (),
    suffix: str = "",
) -> list[EngineVariant]:
    """Backbone, full quantisation, and River at fixed depths and thresholds, on one engine; all but
    the backbone with second looks too.

    Args:
        width: of the river, see `RiverConfig`.
        suffix: of their names: what is special about the engine.

    Raises:
        ConfigError: the model has fewer layers.
    """
    rivers = [*map(ExitPolicy.fixed, exit_layers), *map(ExitPolicy.similarity, thresholds)]
    policies = {
        "backbone": ExitPolicy.never(),
        f"full {width}-bit": ExitPolicy.always(),
        **{policy.describe(): policy for policy in rivers},
    }
    policies |= {
        f"{name}, second look {look:g}": replace(policy, second_look=look)
        for look in second_looks
        for name, policy in policies.items()
        if policy.kind != "never"
    }
    for policy in policies.values():
        policy.thresholds(engine.num_layers)
    session = Session(engine)
    return [
        EngineVariant(name + suffix, session, policy, text) for name, policy in policies.items()
    ]


def run_bench(
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    rounds: int,
    threads: int | None = None,
    device: torch.device | None = None,
    baselines: Sequence[Variant] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the variants of a model, the backbone first, and others beside them.

    Args:
        rounds: that count, behind one that warms up.
        threads, device: whose bandwidth is measured.

    Returns:
        plain JSON values: the run, and the results of each test with the ratios to the backbone and
        to the baselines. After Ctrl-C, of the tests that were done.

    Raises:
        KeyboardInterrupt: no test was done.
    """
    read = partial(read_bandwidth, threads or usable_threads(), device)
    results: list[dict[str, Any]] = []
    is_whole = False
    try:
        for of_test in measure([*variants, *baselines], workloads, rounds, read, progress):
            others = [of_test[0], *of_test[len(of_test) - len(baselines) :]]
            results += [result.to_dict(others) for result in of_test]
        is_whole = True
    except KeyboardInterrupt:
        if not results:
            raise
    return {
        **describe_run(),
        "threads": threads or usable_threads(),
        "rounds": rounds,
        "bandwidth_buffer_bytes": BUFFER_BYTES,
        "interrupted": not is_whole,
        "results": results,
    }
