"""What an engine's KV cache holds of one text, and how much of it another prompt may take over.

The keys and values of a token depend on the tokens before it, on the thresholds by which those and
itself left the backbone, and on the rotary angles, which in some models change with the text's
length. Where all of that is the same, they are those that reading a prompt in one go would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from river_llm.engines.native_model import AngleLimit
from river_llm.exit_policy import ExitPolicy

Thresholds = tuple[float, ...]  # [L], see `exit_policy`


@dataclass(frozen=True, slots=True)
class CachedText:
    """One sequence in a KV cache.

    Attributes:
        tokens: of the cache, in their order.
        exact: the first so many are as reading them in one go gives; after those, answers have left
            by other thresholds than prompts do.
        thresholds: by which the exact ones left, each on its own.
        positions: of the text whose rotary angles they have.
        is_loaded: they were read from a file, so that nothing but the exact ones may be taken over.
    """

    tokens: list[int]
    exact: int
    thresholds: Thresholds
    positions: int
    is_loaded: bool = False

    def beginning(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt, without its last one, are the text's beginning: at least one
        token has to run, to give the first logits."""
        return common_beginning(prompt[:-1], self.tokens)

    def exact_beginning(
        self, prompt: Sequence[int], thresholds: Thresholds | None, limit: AngleLimit | None
    ) -> int:
        """How many of them are as reading the whole prompt in one go gives, by `thresholds`."""
        if thresholds != self.thresholds or not _shares_angles(limit, self.positions, len(prompt)):
            return 0
        return min(self.exact, self.beginning(prompt))

    def first(self, count: int) -> CachedText:
        """Its first so many tokens."""
        return replace(self, tokens=self.tokens[:count], exact=min(count, self.exact))


def common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common before they differ."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def prefill_thresholds(policy: ExitPolicy, num_layers: int) -> Thresholds | None:
    """The thresholds by which each token of a prompt leaves; None where the prompt leaves as a
    whole, so that none of its tokens is what it would be in another prompt."""
    if policy.prefill == "sequence":
        return None
    if policy.prefill == "token":
        return policy.thresholds(num_layers)
    return (math.inf if policy.prefill == "backbone" else -math.inf,) * num_layers


def text_of_answer(
    tokens: list[int],
    prompt_length: int,
    policy: ExitPolicy,
    num_layers: int,
    limit: AngleLimit | None,
    before: CachedText | None = None,
    kept: int = 0,
) -> CachedText:
    """The text in the cache after an answer.

    Args:
        tokens: of prompt and answer that are in the cache.
        policy: by which they left; in lossless mode, never.
        before: the text whose first `kept` tokens the prompt has taken over.
    """
    thresholds = prefill_thresholds(policy, num_layers)
    if kept > 0:
        assert before is not None
        if before.exact_beginning(tokens[:prompt_length], thresholds, limit) < kept:
            # what came after stands on tokens that a prompt would read otherwise
            return replace(before, tokens=tokens, exact=min(kept, before.exact), is_loaded=False)
    if thresholds is None:
        return CachedText(tokens, 0, (), prompt_length)
    exact = min(prompt_length, len(tokens))
    leave_alike = policy.has_thresholds and thresholds == policy.thresholds(num_layers)
    if leave_alike and _shares_angles(limit, prompt_length, len(tokens)):
        exact = len(tokens)
    return CachedText(tokens, exact, thresholds, prompt_length)


def _shares_angles(limit: AngleLimit | None, first: int, second: int) -> bool:
    return limit is None or limit.is_shared_by(first, second)
