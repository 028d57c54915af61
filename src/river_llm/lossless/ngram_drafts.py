"""Drafts for nothing: what followed the last tokens where they stood in the text before."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST_MATCH = 2
LONGEST_MATCH = 12  # beyond this, a longer match tells nothing more


class NgramIndex:
    """Where each pair of tokens stood last in one text; follows the text as it grows."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}  # pair -> the place after it
        self._indexed = 0

    def continuation(self, token_ids: Sequence[int], most: int) -> tuple[int, list[int]]:
        """What followed the end of `token_ids` the last time that it occurred.

        Args:
            token_ids: the text, which begins with the text of the calls before.
            most: tokens at most.

        Returns:
            (length of the match, its continuation); (0, []) where there is none. Where the
            continuation runs into the text's end it goes on from its own beginning, as a text that
            repeats itself does.
        """
        end = len(token_ids)
        for place in range(max(self._indexed, SHORTEST_MATCH), end):
            self._last[(token_ids[place - 2], token_ids[place - 1])] = place
        self._indexed = max(self._indexed, end)
        if end < SHORTEST_MATCH or most < 1:
            return 0, []
        pair = (token_ids[-2], token_ids[-1])
        if pair not in self._last:
            return 0, []
        place = self._last[pair]
        length = SHORTEST_MATCH
        while (
            length < LONGEST_MATCH
            and place > length
            and token_ids[place - 1 - length] == token_ids[end - 1 - length]
        ):
            length += 1
        period = end - place
        return length, [token_ids[place + i % period] for i in range(most)]
