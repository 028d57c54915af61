"""Drafts: tokens that the exit layers guess, for the backbone to verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# (sequence, tokens of its draft so far, logits [V]) -> (token, its margin)
Choose = Callable[[int, list[int], Tensor], tuple[int, float]]


@dataclass(frozen=True, slots=True)
class DraftRule:
    """Which layers draft, and when a draft ends.

    The margin of a token is 1 - p2 / p1, with the probabilities of the likeliest token and of the
    second. `chances` says how likely a token of some margin is what the backbone would choose too,
    and a draft ends with the token at which the product of its chances falls below the least one
    wanted: the uncertain token is still drafted.

    Attributes:
        exit_layer: backbone layers that a drafted token runs before it leaves.
        lm_head_bits: of the LM head, one of the engine's `draft_head_bits`.
        vocabulary: drafted tokens are among the first so many; None: among all.
        least_chances: in [0, 1]; 0 ends no draft. The first counts while one sequence of a batch
            drafts, the second while two do, and so on; the last one counts for more, too.
        chances: of margins in equal parts of [0, 1].
        stop_tokens: end a draft.
    """

    exit_layer: int = 0
    lm_head_bits: int = 16
    vocabulary: int | None = None
    least_chances: tuple[float, ...] = (0.0,)
    chances: tuple[float, ...] = (1.0,)
    stop_tokens: frozenset[int] = frozenset()

    def chance(self, margin: float) -> float:
        """Of a token with this margin."""
        return self.chances[margin_class(margin, len(self.chances))]


def margin_class(margin: float, parts: int) -> int:
    """Into which of so many equal parts of [0, 1] a margin falls; one that is no number, into the
    first."""
    if math.isnan(margin):
        return 0
    return int(min(max(margin, 0.0) * parts, parts - 1))


@dataclass(slots=True)
class Draft:
    """What was drafted for one sequence.

    Attributes:
        tokens: the guessed tokens.
        margins: of each.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def likeliest_with_margin(sequence: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
    """The token of the largest logit, a `Choose`."""
    del sequence, drafted
    (first, second), tokens = logits.float().topk(2)
    return int(tokens[0]), 1 - float((second - first).exp())


def draft_step_by_step(
    decode: Callable[[list[int], list[int]], Tensor],
    token_ids: Sequence[int],
    most: Sequence[int],
    rule: DraftRule,
    choose: Choose,
) -> list[Draft]:
    """Drafts made one step at a time.

    Args:
        decode: (sequences, the next token of each) -> logits `[sequences, V]`, or of the rule's
            vocabulary; one step of these sequences through the layers that draft.
    """
    drafts = [Draft() for _ in token_ids]
    chances = [1.0] * len(drafts)
    going = [i for i, count in enumerate(most) if count > 0]
    while going:
        last = [(drafts[i].tokens or [token_ids[i]])[-1] for i in going]
        logits = decode(going, last)
        for i, row in zip(going, logits, strict=True):
            token, margin = choose(i, drafts[i].tokens, row)
            drafts[i].tokens.append(token)
            drafts[i].margins.append(margin)
            chances[i] *= rule.chance(margin)
        least = rule.least_chances[min(len(going), len(rule.least_chances)) - 1]
        going = [
            i
            for i in going
            if len(drafts[i].tokens) < most[i]
            and chances[i] >= least
            and drafts[i].tokens[-1] not in rule.stop_tokens
        ]
    return drafts
