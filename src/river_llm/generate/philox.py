"""Random numbers by counters: each is a function of its key and counter, and of nothing else.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
Words of 32 bits are held in int64, whose products wrap around as those of unsigned numbers do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_LARGEST = 1 - 2**-24  # below 1 in float32


def philox(counters: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four random words for each counter of four words.

    Args:
        counters: int64 arrays of PyTorch or NumPy that broadcast, below 2**32.
        key: two words.
    """
    a, b, c, d = counters
    first, second = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((right >> 32) ^ b ^ first) & _WORD, right & _WORD
        c, d = ((left >> 32) ^ d ^ second) & _WORD, left & _WORD
        first, second = (first + _KEY_STEPS[0]) & _WORD, (second + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def exponentials(tokens: Tensor, place: int, seed: int, index: int = 0) -> Tensor:
    """Exponential variates, float32 `[N]`: of each token, at a place of a text.

    Args:
        tokens: int64 `[N]`.
        place: of the token in the text.
        seed: below 2**64.
        index: of the text among those of this seed.
    """
    words = _words(tokens >> 2, place, seed, index)
    return _exponentials(words[torch.arange(len(tokens), device=tokens.device), tokens & 3])


def all_exponentials(
    count: int, place: int, seed: int, index: int = 0, device: torch.device | None = None
) -> Tensor:
    """The same of the tokens from 0 to `count` - 1, four of which share a draw."""
    blocks = torch.arange(-(-count // 4), device=device)
    return _exponentials(_words(blocks, place, seed, index).view(-1)[:count])


def _words(blocks: Tensor, place: int, seed: int, index: int) -> Tensor:
    """Random words for the tokens 4b to 4b + 3 of each block b, int64 `[blocks, 4]`."""
    counters: Any = blocks.numpy() if blocks.device.type == "cpu" else blocks  # NumPy starts sooner
    zeros = counters * 0
    words = philox((counters, zeros + place, zeros + index, zeros), (seed & _WORD, seed >> 32))
    if isinstance(words[0], np.ndarray):
        return torch.from_numpy(np.stack(words, 1))
    return torch.stack(words, 1)


def _exponentials(words: Tensor) -> Tensor:
    uniform = (words.float() + 0.5) * 2**-32
    return -torch.log1p(-uniform.clamp_(max=_LARGEST))
