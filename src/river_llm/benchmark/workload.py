"""What is timed: prompts and decoded tokens, named as llama-bench names them, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from river_llm.errors import ConfigError

SHORT_CONTEXT = 16  # tokens that stand before the first decoded one at depth 0
_SEQUENCE_STRIDE = (
    37  # a batch's sequences begin so many tokens apart, so that none is another's copy
)

# Plain prose, so that a similarity policy meets text like that which models are used on.
PROSE = """\
A river begins where water gathers: in a spring, under a glacier, in a marsh that never dries. It
takes the steepest way down that it can find, and where the ground is soft it carves a bed that
later floods will follow. Stones that came down as blocks arrive at the plain as gravel, and the
gravel arrives at the sea as sand. People settled along such banks because the soil was good and
the road was already there. They built mills, then bridges, then harbours, and they learned, often
too late, that a river keeps the right to move. In dry years the towns upstream and those
downstream quarrel over the same water; in wet years they carry sandbags for each other. Engineers
have straightened long reaches and given them walls, which sends a flood on faster to whoever lives
below. Lately some walls have been taken back, and meadows flood again as they used to, slowly and
without much harm. Fish return first, then the birds that eat them.
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """One test.

    Attributes:
        kind: ``"prompt"``: all tokens in one pass. ``"decode"``: one token for each sequence at a
            time.
        tokens: processed or decoded, for each sequence.
        depth: tokens in the cache before it.
        batch: sequences at once.
    """

    kind: Literal["prompt", "decode"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench has it: ``pp512``, ``tg128 @ d4096``; a batch as ``tg128 b4``."""
        name = f"{'pp' if self.kind == 'prompt' else 'tg'}{self.tokens}"
        if self.batch > 1:
            name += f" b{self.batch}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def context(self) -> int:
        """Tokens of each sequence in the cache when the clock starts."""
        return max(self.depth, SHORT_CONTEXT) if self.kind == "decode" else self.depth

    @property
    def end(self) -> int:
        """Tokens of each sequence in the cache when the clock stops."""
        return self.context + self.tokens


def make_workloads(
    prompt_tokens: Iterable[int],
    new_tokens: Iterable[int],
    depths: Iterable[int] = (0,),
    batches: Iterable[int] = (1,),
) -> list[Workload]:
    """Every test at every depth. Batches are decoded only: B prompts are a prompt of B times the
    length as far as speed goes."""
    depths = list(depths)
    prompts = [Workload("prompt", n, depth) for depth in depths for n in prompt_tokens if n]
    batches = list(batches)
    decodes = [
        Workload("decode", n, depth, batch)
        for depth in depths
        for n in new_tokens
        if n
        for batch in batches
    ]
    return prompts + decodes


def check_fits(workloads: Iterable[Workload], context_length: int | None) -> None:
    """See that the model's context holds every test.

    Raises:
        ConfigError: it doesn't.
    """
    for workload in workloads:
        if context_length is not None and workload.end > context_length:
            raise ConfigError(
                f"{workload.name} needs {workload.end} tokens of context, and the model has "
                f"{context_length}; lower --depth, --prompt-tokens or --new-tokens"
            )


class TokenSource:
    """Token ids to run, the same for every arm: prose over and over, or any ids at all."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)

    @classmethod
    def for_model(cls, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> TokenSource:
        """Prose where there is a tokeniser, else ids spread over the vocabulary."""
        token_ids = [] if tokenizer is None else list(tokenizer(PROSE).input_ids)
        if len(token_ids) < 2 or max(token_ids) >= vocab_size:
            token_ids = [(1 + 7919 * index) % vocab_size for index in range(1009)]
        return cls(token_ids)

    def take(self, batch: int, first: int, count: int) -> Tensor:
        """int64 `[batch, count]`: the tokens at positions `first` to `first + count`."""
        own = torch.tensor(self._token_ids)
        starts = torch.arange(batch).unsqueeze(1) * _SEQUENCE_STRIDE
        return own[(starts + torch.arange(first, first + count)) % len(own)]
