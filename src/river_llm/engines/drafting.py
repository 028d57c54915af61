"""Drafts: tokens that the exit layers guess, for the backbone to verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# (which of the drafted sequences, the tokens of its draft so far, logits [V]) -> (token, margin)
Choose = Callable[[int, list[int], Tensor], tuple[int, float]]


@dataclass(frozen=True, slots=True)
class DraftRule:
    """Which layers draft, and when a draft ends.

    The margin of a token is 1 - p2 / p1, with the probabilities of the most likely token and of the
    second. A draft ends with the first token whose margin is small: that one is still drafted.

    Attributes:
        exit_layer: backbone layers that a drafted token runs before it leaves.
        lm_head_bits: of the LM head, one of the engine's `draft_head_bits`.
        least_margin: a margin below it ends the draft, one that is NaN too; 0 ends none.
        stop_tokens: end a draft.
    """

    exit_layer: int = 0
    lm_head_bits: int = 16
    least_margin: float = 0.0
    stop_tokens: frozenset[int] = frozenset()

    def ends_with(self, token: int, margin: float) -> bool:
        """Whether a draft ends with this token."""
        return not margin >= self.least_margin or token in self.stop_tokens


@dataclass(slots=True)
class Draft:
    """What was drafted for one sequence.

    Attributes:
        tokens: the guessed tokens.
        margins: of each.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def argmax_with_margin(sequence: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
    """The token of the largest logit, a `Choose`."""
    del sequence, drafted
    (first, second), tokens = logits.float().topk(2)
    return int(tokens[0]), 1 - float((second - first).exp())


def draft_step_by_step(
    decode: Callable[[list[int], list[int]], Tensor],
    tokens: Sequence[int],
    most: Sequence[int],
    rule: DraftRule,
    choose: Choose = argmax_with_margin,
) -> list[Draft]:
    """Drafts made one step at a time.

    Args:
        decode: (which of the sequences, the next token of each) -> logits `[sequences, V]`; one
            step of these sequences through the layers that draft.
        tokens: the token after which each sequence is drafted.
        most: drafted tokens of each at most.
    """
    drafts = [Draft() for _ in tokens]
    last = list(tokens)
    going = [i for i, count in enumerate(most) if count > 0]
    while going:
        for i, logits in zip(going, decode(going, [last[i] for i in going]), strict=True):
            last[i], margin = choose(i, drafts[i].tokens, logits)
            drafts[i].tokens.append(last[i])
            drafts[i].margins.append(margin)
        going = [
            i
            for i in going
            if len(drafts[i].tokens) < most[i]
            and not rule.ends_with(last[i], drafts[i].margins[-1])
        ]
    return drafts
