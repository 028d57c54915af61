"""A question about a document, with the document read and with its prompt cache loaded.

    python benchmarks/prompt_cache.py FILE... [--model M] [--engine E] [--mode M] [--rounds 5]

Every round answers the same prompt both ways in turn. Times are to the first token, loading the
file included, and the tokens of both answers are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from river_llm import RiverLM

QUESTIONS = ("What is this text about?", "Which files does it name?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--river", help="the folder of a saved river")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--mode", default="river")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    text = "\n".join(path.read_text(encoding="utf-8") for path in options.documents)
    first, second = (f"{text}\n{question}" for question in QUESTIONS)
    lm = RiverLM.from_pretrained(options.model, options.river, engine=options.engine)
    settings = {"mode": options.mode, "max_new_tokens": 32}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "prompt.safetensors"
        answer = lm.generate(first, **{**settings, "max_new_tokens": 1})
        start = time.perf_counter()
        kept = lm.save_prompt_cache(path, answer.prompt_tokens)
        seconds = time.perf_counter() - start
        size = path.stat().st_size
        print(f"{kept} tokens kept in {size / 2**20:.0f} MiB, written in {seconds:.2f} s")
        read, loaded, ratios, differ = [], [], [], 0
        for number in range(-1, options.rounds):  # one to warm up
            whole = lm.generate(second, **settings)
            start = time.perf_counter()
            lm.load_prompt_cache(path, options.mode)
            seconds = time.perf_counter() - start
            result = lm.generate(second, reuse_cache=True, **settings)
            seconds += result.time_to_first_token
            differ += result.tokens != whole.tokens
            if number >= 0:
                read.append(whole.time_to_first_token)
                loaded.append(seconds)
                ratios.append(whole.time_to_first_token / seconds)
    print(f"{result.cached_prompt_tokens} of {result.prompt_tokens} prompt tokens from the file")
    for name, values, unit in (
        ("document read", read, " s"),
        ("prompt cache loaded", loaded, " s"),
        ("ratio", ratios, ""),
    ):
        middle = statistics.median(values)
        print(f"{name}: {middle:.3g}{unit} [{min(values):.3g} - {max(values):.3g}]")
    print(f"{differ} of {options.rounds + 1} answers differ")


if __name__ == "__main__":
    main()
