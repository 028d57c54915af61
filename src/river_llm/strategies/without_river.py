"""The verbs of an `Engine` that an engine without a river has to refuse, or answers without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from river_llm.config import Strategy
from river_llm.engines.drafting import Choose, Draft, DraftRule
from river_llm.engines.engine import StepResult
from river_llm.errors import ConfigError, PromptCacheError
from river_llm.residency import OffloadStatistics


class WithoutRiver:
    """Nothing drafts, all of the backbone stays in memory, and prompt caches are not kept.

    Attributes:
        strategy, num_layers: see `Engine`.
    """

    strategy: Strategy
    num_layers: int
    kv_bits = 16
    draft_head_bits: tuple[int, ...] = ()

    @property
    def depth_limit(self) -> int | None:
        return None

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        if limit is not None:
            self._refuse_offloading()

    @property
    def resident_layers(self) -> int:
        return self.num_layers

    @property
    def offload_statistics(self) -> OffloadStatistics:
        return OffloadStatistics(self.num_layers)

    def keep_layers(self, count: int) -> None:
        del count
        self._refuse_offloading()

    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        self._refuse_drafts()

    def prepare_drafts(self, lm_head_bits: int) -> None:
        self._refuse_drafts()

    def draft(
        self,
        token_ids: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        self._refuse_drafts()

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        self._refuse_prompt_cache()

    def read_cache(self, length: int) -> dict[str, Tensor]:
        self._refuse_prompt_cache()

    def write_cache(self, tensors: Mapping[str, Tensor], length: int) -> None:
        self._refuse_prompt_cache()

    def _refuse_drafts(self) -> NoReturn:
        raise ConfigError(
            f"the strategy {self.strategy} has no river, so nothing drafts and lossless mode is "
            "not to be had; take the strategy river"
        )

    def _refuse_offloading(self) -> NoReturn:
        raise ConfigError(refused_offloading(self.strategy))

    def _refuse_prompt_cache(self) -> NoReturn:
        raise PromptCacheError(
            f"the strategy {self.strategy} keeps no prompt caches; take the strategy river"
        )


def refused_offloading(strategy: str) -> str:
    """Why layers can't be evicted."""
    return (
        f"the strategy {strategy} has no river to leave for, so all of the backbone stays in "
        "memory; offloading goes with the strategy river"
    )
