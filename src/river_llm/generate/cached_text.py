"""A text whose keys and values are in the engine, and how much of it another prompt may take over.

The keys and values of a token depend on the tokens before it, on the thresholds by which those and
itself left the backbone, and on the rotary angles, which in some models change with the text's
length. Where all of that is the same, they are those that reading a prompt in one go would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from river_llm.engines.native_model import RopeBoundary
from river_llm.river.policy import ExitPolicy

Thresholds = tuple[float, ...]  # [L], see `exit_policy`


@dataclass(frozen=True, slots=True)
class CachedText:
    """One sequence in an engine's KV cache.

    Attributes:
        sequence: its number there.
        tokens: the first ones of the cache, as reading them in one go gives them.
        thresholds: by which they left, each on its own.
        positions: of the text whose rotary angles they have.
    """

    sequence: int
    tokens: list[int]
    thresholds: Thresholds
    positions: int

    def usable(
        self,
        prompt: Sequence[int],
        policy: ExitPolicy | None,
        num_layers: int,
        boundary: RopeBoundary | None,
    ) -> int:
        """How many of its first tokens are a prompt's, and may stand for them. At least one token
        of the prompt has to run, to give the first logits."""
        is_alike = prompt_thresholds(policy, num_layers) == self.thresholds
        if not is_alike or not _shares_angles(boundary, self.positions, len(prompt)):
            return 0
        return common_prefix(prompt[:-1], self.tokens)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common before they differ."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def prompt_thresholds(policy: ExitPolicy | None, num_layers: int) -> Thresholds | None:
    """The thresholds by which each token of a prompt leaves; None where the prompt leaves as a
    whole, so that none of its tokens is what it would be in another prompt."""
    if policy is not None and policy.prefill == "sequence":
        return None
    return (policy or ExitPolicy.never()).prefill_thresholds(num_layers)


def text_of_answer(
    sequence: int,
    tokens: list[int],
    prompt_length: int,
    policy: ExitPolicy | None,
    num_layers: int,
    boundary: RopeBoundary | None,
) -> CachedText | None:
    """What a sequence offers to other prompts after an answer: the prompt, and the answer as well
    if a prompt would read it likewise.

    Args:
        tokens: of prompt and answer that are in the cache.
        policy: by which they left; None: in lossless mode, never.
    """
    thresholds = prompt_thresholds(policy, num_layers)
    if thresholds is None:
        return None
    is_alike = policy is None or policy.treats_alike(num_layers)
    if not (is_alike and _shares_angles(boundary, prompt_length, len(tokens))):
        tokens = tokens[:prompt_length]
    may_look = policy is not None and policy.second_look is not None and min(thresholds) < math.inf
    if may_look:  # as another prompt's tokens don't, but for the last
        tokens = tokens[: prompt_length - 1]
    return CachedText(sequence, tokens, thresholds, prompt_length) if tokens else None


def _shares_angles(boundary: RopeBoundary | None, first: int, second: int) -> bool:
    return boundary is None or boundary.is_shared_by(first, second)
