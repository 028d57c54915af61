"""A question about a document, with the document read and with its prompt cache loaded.

    python experiments/prompt_cache.py docs/architecture.md docs/lossless.md -o prompt_cache.json

Every round answers the same prompt both ways. Times are to the first token, loading the file
included, and the tokens of both answers are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from output import describe, print_table, write_json

from river_llm import RiverLM
from river_llm.config import PolicyConfig
from river_llm.measure.rounds import Spread

QUESTIONS = ("What is this text about?", "Which files does it name?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("documents", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--river", help="the folder of a saved river")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threshold", type=float, help="river mode; by default lossless")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    text = "\n".join(path.read_text(encoding="utf-8") for path in options.documents)
    first, second = (f"{text}\n{question}" for question in QUESTIONS)
    policy = PolicyConfig(threshold=options.threshold).exit_policy()
    lm = RiverLM.from_pretrained(options.model, options.river, policy, engine=options.engine)
    differ, whole_seconds, loaded_seconds = 0, [], []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "prompt.safetensors"
        answer = lm.generate(first, max_new_tokens=1)
        start = time.perf_counter()
        kept = lm.save_prompt_cache(path, answer.prompt_tokens)
        written, size = time.perf_counter() - start, path.stat().st_size
        print(f"{kept} tokens kept in {size / 2**20:.0f} MiB, written in {written:.2f} s")
        for number in range(-1, options.rounds):  # one to warm up
            whole = lm.generate(second, max_new_tokens=32)
            start = time.perf_counter()
            lm.load_prompt_cache(path)
            loading = time.perf_counter() - start
            result = lm.generate(second, reuse_cache=True, max_new_tokens=32)
            differ += result.tokens != whole.tokens
            if number >= 0:
                whole_seconds.append(whole.time_to_first_token)
                loaded_seconds.append(loading + result.time_to_first_token)
    print(f"{result.cached_prompt_tokens} of {result.prompt_tokens} prompt tokens from the file")
    ratios = [whole / loaded for whole, loaded in zip(whole_seconds, loaded_seconds, strict=True)]
    columns = {"document read, s": whole_seconds, "file loaded, s": loaded_seconds, "ratio": ratios}
    spreads = {name: Spread.of(values) for name, values in columns.items()}
    rows = [
        [name, *(f"{x:.3g}" for x in (spread.median, spread.lowest, spread.highest))]
        for name, spread in spreads.items()
    ]
    print_table(("to the first token", "median", "lowest", "highest"), rows)
    print(f"{differ} of {options.rounds + 1} answers differ")
    if options.output:
        found = {"tokens": kept, "bytes": size, "seconds_written": written, "differ": differ}
        write_json(options.output, {**describe(), **found, "rounds": columns})


if __name__ == "__main__":
    main()
