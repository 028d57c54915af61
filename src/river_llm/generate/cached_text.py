"""A text whose keys and values are in the engine, and how much of it another prompt may take over.

The keys and values of a token depend on the tokens before it, on the thresholds by which those and
itself left the backbone, and on the rotary angles, which in some models change with the text's
length. Where all of that is the same, they are those that reading a prompt in one go would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from river_llm.engines.native_model import RopeBoundary
from river_llm.river.policy import ExitPolicy

Thresholds = tuple[float, ...]  # [L], see `exit_policy`


@dataclass(frozen=True, slots=True)
class CachedText:
    """One sequence in an engine's KV cache.

    Attributes:
        sequence: its number there.
        tokens: of the cache, in their order.
        exact: the first so many are as reading them in one go gives; after those, answers have left
            by other thresholds than prompts do.
        thresholds: by which the exact ones left, each on its own.
        positions: of the text whose rotary angles they have.
        is_loaded: they were read from a file, so that nothing but the exact ones may be taken over.
    """

    sequence: int
    tokens: list[int]
    exact: int
    thresholds: Thresholds
    positions: int
    is_loaded: bool = False

    def usable(
        self,
        prompt: Sequence[int],
        policy: ExitPolicy | None,
        num_layers: int,
        boundary: RopeBoundary | None,
    ) -> int:
        """How many of its first tokens are a prompt's, and may stand for them: in lossless mode
        (None for the policy) and after loading only such as reading the prompt would give. At least
        one token of the prompt has to run, to give the first logits."""
        if not _shares_angles(boundary, self.positions, len(prompt)):
            return 0
        common = common_prefix(prompt[:-1], self.tokens)
        if policy is not None and not self.is_loaded:
            return common
        is_alike = prompt_thresholds(policy, num_layers) == self.thresholds
        return min(common, self.exact) if is_alike else 0

    def first(self, count: int) -> CachedText:
        """Its first so many tokens."""
        return replace(self, tokens=self.tokens[:count], exact=min(count, self.exact))


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
    taken_over: CachedText | None = None,
) -> CachedText:
    """The text in a sequence after an answer.

    Args:
        tokens: of prompt and answer that are in the cache.
        policy: by which they left; None: in lossless mode, never.
        taken_over: the tokens that the prompt has taken over, of another text.
    """
    thresholds = prompt_thresholds(policy, num_layers)
    if taken_over is not None and (
        thresholds != taken_over.thresholds or taken_over.exact < len(taken_over.tokens)
    ):  # what came after stands on tokens that a prompt would read otherwise
        return replace(taken_over, tokens=tokens, is_loaded=False)
    if thresholds is None:
        return CachedText(sequence, tokens, 0, (), prompt_length)
    exact = min(prompt_length, len(tokens))
    leaves_alike = thresholds == (policy or ExitPolicy.never()).thresholds(num_layers)
    if leaves_alike and _shares_angles(boundary, prompt_length, len(tokens)):
        exact = len(tokens)
    return CachedText(sequence, tokens, exact, thresholds, prompt_length)


def _shares_angles(boundary: RopeBoundary | None, first: int, second: int) -> bool:
    return boundary is None or boundary.is_shared_by(first, second)
