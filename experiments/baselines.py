"""Our variants beside `transformers` and llama.cpp on the same weights, in interleaved rounds: the
README's table.

    pip install 'river-llm[bench]'
    python experiments/baselines.py --exit-layers 3 10 --lm-head-bits 8 -o baselines.json

Prints a table of each test, medians [slowest - fastest], with the ratios to the backbone and to
every baseline, round by round, and the part of the memory's bandwidth that was used.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from output import describe, write_json
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from river_llm import ExitPolicy, RiverLM
from river_llm.engines.native_core import usable_threads
from river_llm.load.model import load_backbone
from river_llm.measure.bench import Session, Text, make_variants, run_bench
from river_llm.measure.rounds import Spread, Timing, Workload, make_workloads

_SAME_MODEL_SHARE = 0.9  # of argmaxes; what is left is rounding at near ties


class TransformersBaseline:
    """Greedy `generate()` of `transformers` on the plain model, timed by the tokens that come out;
    see `river_llm.measure.rounds.Variant`."""

    name, engine = "transformers bf16", "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        text: Text,
        step_bytes: Callable[[Sequence[int], int], int | None],
    ) -> None:
        # no stop token, so that every run has the same number of tokens
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )
        self._model, self._text, self._step_bytes = model, text, step_bytes
        self._cache, self._batch = DynamicCache(), 0

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
                context = self._text.tokens(workload.batch, 0, wanted)
                self._model(context, past_key_values=self._cache, logits_to_keep=1)
        elif have > wanted:
            self._cache.crop(wanted - have)  # this many fewer

    def run(self, workload: Workload) -> Timing:
        is_prompt = workload.kind == "prompt"
        length = workload.end if is_prompt else workload.context
        token_ids = self._text.tokens(workload.batch, 0, length)
        watch = _StopWatch()
        start = time.perf_counter()
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
        depths = [self._model.config.num_hidden_layers] * workload.batch
        reads = [self._step_bytes(depths, at) or 0 for at in range(workload.context, workload.end)]
        return Timing(watch.times[-1] - watch.times[0], count, sum(reads) / count or None)


class _StopWatch(BaseStreamer):
    """When each new token came; the prompt, which comes first, doesn't count."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        pass


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """One of each test, in Markdown."""
    for test in dict.fromkeys(result["test"] for result in results):
        rows = [result for result in results if result["test"] == test]
        others = list(rows[0]["ratios"])
        headings = [test, "tokens/s", "MB/token", "of bandwidth", *(f"x {name}" for name in others)]
        print(f"\n| {' | '.join(headings)} |\n| --- |{' ---: |' * (len(headings) - 1)}")
        for row in rows:
            read, fraction = row["bytes_per_token"], row["bandwidth_fraction"]
            cells = [
                row["variant"],
                str(Spread(**row["tokens_per_second"])),
                "" if read is None else f"{read / 1e6:.1f}",
                "" if fraction is None else f"{100 * fraction:.0f} %",
                *(f"{row['ratios'][name]['median']:.2f}" for name in others),
            ]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--river", help="the folder of a saved river")
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[3])
    parser.add_argument("--lm-head-bits", type=int, choices=[16, 8], default=16)
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=["transformers", "llama.cpp"],
        default=["transformers", "llama.cpp"],
    )
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--new-tokens", type=int, nargs="*", default=[128])
    parser.add_argument("--depths", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    variants = []
    for bits in sorted({16, options.lm_head_bits}, reverse=True):
        settings = {"threads": options.threads, "lm_head_bits": bits, "device": "cpu"}
        lm = RiverLM.from_pretrained(options.model, options.river, ExitPolicy.never(), **settings)
        text = Text(lm.tokenizer, lm.engine.vocab_size)
        suffix = "" if bits == 16 else f", {bits}-bit head"
        width, exits = lm.river_config.width, options.exit_layers
        variants += make_variants(lm.engine, text, width, exits, suffix=suffix)
        if bits == 16:
            session = Session(lm.engine)
    model = load_backbone(options.model, torch.bfloat16)[0]
    lengths = (options.prompt_tokens, options.new_tokens, options.depths, options.batches)
    workloads = make_workloads(*lengths, lm.engine.context_length)
    output: dict[str, Any] = {"model": options.model, "engine": lm.engine.setting}
    with ExitStack() as ending:
        baselines: list[Any] = []
        if "transformers" in options.baselines:
            baselines.append(TransformersBaseline(model, text, session.step_bytes))
        if "llama.cpp" in options.baselines:
            import llama_cpp_baseline as llama_cpp

            folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
            same_top = {}
            for name, path in llama_cpp.make_gguf_files(model, folder).items():
                repack = llama_cpp.runs_repacked(path)
                one = llama_cpp.LlamaCppBaseline(
                    f"llama.cpp {name}", path, text, options.threads, repack
                )
                if not repack:
                    print(f"{one.name} keeps its weights as they are: its own layout crashes here")
                ending.callback(one.close)
                baselines.append(one)
                same_top[one.name] = one.same_top_share(model)
                print(f"{one.name}: {same_top[one.name]:.0%} of its argmaxes are the model's")
            if same_top["llama.cpp bf16"] < _SAME_MODEL_SHARE:
                print("llama.cpp is not running the same model!")
            output |= {"llama_cpp_build": llama_cpp.build_description(), "same_top": same_top}
        rounds, threads = options.rounds, options.threads
        output |= run_bench(variants, workloads, rounds, threads, baselines=baselines)
    print_tables(output["results"])
    if options.output:
        write_json(options.output, {**output, **describe()})


if __name__ == "__main__":
    main()
