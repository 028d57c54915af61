"""Drafts for nothing: what followed the last tokens where they stood in the text before.

Prompt look-up decoding (Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST_MATCH = 2
LONGEST_MATCH = 12  # beyond this, a longer match tells nothing more


class NgramIndex:
    """Where each pair of tokens stood last in one text; follows the text as it grows."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}  # pair -> the place after it
        self._indexed = 0

    def continuation(self, tokens: Sequence[int], most: int) -> tuple[int, list[int]]:
        """What followed the end of a text the last time that it occurred.

        Args:
            tokens: the text, which begins with the text of the calls before.
            most: tokens of the continuation at most.

        Returns:
            (length of the match, its continuation); (0, []) where there is none. Where the
            continuation runs into the text's end it goes on from its own beginning, as a text that
            repeats itself does.
        """
        end = len(tokens)
        for place in range(max(self._indexed, SHORTEST_MATCH), end):
            self._last[(tokens[place - 2], tokens[place - 1])] = place
        self._indexed = max(self._indexed, end)
        place = self._last.get((tokens[-2], tokens[-1]), 0) if end >= SHORTEST_MATCH else 0
        if place == 0 or most < 1:
            return 0, []
        length = SHORTEST_MATCH
        while (
            length < min(LONGEST_MATCH, place)
            and tokens[place - 1 - length] == tokens[end - 1 - length]
        ):
            length += 1
        period = end - place
        return length, [tokens[place + i % period] for i in range(most)]
