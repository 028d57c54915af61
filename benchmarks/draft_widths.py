"""Lossless mode with rivers of several widths, and each river alone.

    python benchmarks/draft_widths.py --prompts mt_bench.jsonl

Every prompt is answered in all ways, in turn. "x" is all tokens over all time, against the
backbone's; in brackets the quartiles of single prompts. What a run learns about drafts is not kept.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from river_llm import DraftConfig, ExitPolicy, GenerationResult, River, RiverConfig, RiverLM
from river_llm.cli.check_exact import read_prompts
from river_llm.load.model import load_backbone


@dataclass
class Arm:
    """One way to answer, and what it took so far."""

    name: str
    lm: RiverLM
    policy: ExitPolicy
    drafts: DraftConfig | None = None
    tokens: int = 0  # after each answer's first
    seconds: float = 0.0
    speeds: list[float] = field(default_factory=list)  # of single prompts, tokens a second
    verifications: int = 0
    draft_seconds: float = 0.0

    def answer(self, prompt: str | list[dict[str, str]], max_new_tokens: int) -> GenerationResult:
        """Answer a prompt, and count what it took."""
        self.lm.policy = self.policy
        result = self.lm.generate(
            prompt,
            mode="river" if self.drafts is None else "lossless",
            drafts=self.drafts,
            max_new_tokens=max_new_tokens,
        )
        decoded, speed = len(result.tokens) - 1, result.decode_tokens_per_second or 0.0
        self.speeds.append(speed)
        if speed:
            self.tokens += decoded
            self.seconds += decoded / speed
        if result.lossless is not None:
            self.verifications += result.lossless.verifications
            self.draft_seconds += result.lossless.draft_seconds
        return result


def make_arms(model: str, widths: list[int], ngram: bool) -> list[Arm]:
    """The backbone first, then each river in lossless mode and alone."""
    arms: list[Arm] = []
    backbone = load_backbone(model)[0]
    for bits in widths:
        river = River.build(backbone, RiverConfig(bits))
        lm = RiverLM.from_pretrained(model, river, ExitPolicy.never())
        name = f"{bits} bits"
        if not arms:
            arms.append(Arm("backbone", lm, ExitPolicy.never()))
        arms.append(Arm(f"{name}, lossless", lm, ExitPolicy.never(), DraftConfig(ngram=ngram)))
        arms.append(Arm(f"{name}, full river", lm, ExitPolicy.always()))
    return arms


def times_as_fast(arm: Arm, other: Arm) -> str:
    """All tokens over all time against another arm's, and the quartiles of single prompts."""
    ratio = arm.tokens / arm.seconds / (other.tokens / other.seconds)
    ratios = [a / b for a, b in zip(arm.speeds, other.speeds, strict=True) if b]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{ratio:.3f}x [{low:.2f} - {high:.2f}]"


def line(arm: Arm, backbone: Arm) -> str:
    """An arm's figures."""
    speed = arm.tokens / arm.seconds
    text = f"{arm.name:18} {speed:6.1f} tokens/s  {times_as_fast(arm, backbone)}"
    if arm.drafts is not None:
        text += (
            f"  {arm.tokens / max(1, arm.verifications):.2f} tokens a verification, "
            f"{arm.draft_seconds / arm.seconds:.0%} of the time in drafting"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, required=True, help="as of river-llm check-exact")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8], help="of the rivers")
    parser.add_argument("--limit", type=int, default=40, help="the first so many, two or more")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--no-ngram", action="store_true", help="no drafts out of the text itself")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)[: options.limit]
    arms = make_arms(options.model, options.bits, not options.no_ngram)
    differ = 0
    for number, prompt in enumerate(prompts):
        first = number % len(arms)  # none is always the first
        answers = {
            arm.name: arm.answer(prompt, options.max_new_tokens).tokens
            for arm in arms[first:] + arms[:first]
        }
        for arm in arms:
            differ += arm.drafts is not None and answers[arm.name] != answers["backbone"]
    for arm in arms:
        print(line(arm, arms[0]))
    first_width, *others = (arm for arm in arms if arm.drafts is not None)
    for arm in others:
        pairs = list(zip(arm.speeds, first_width.speeds, strict=True))
        print(
            f"{arm.name} against {first_width.name}: {times_as_fast(arm, first_width)}, faster for "
            f"{sum(a > b for a, b in pairs)} of {len(pairs)} prompts"
        )
    print(f"{differ} answers of lossless mode differ from the backbone's")


if __name__ == "__main__":
    main()
