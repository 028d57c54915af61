"""Which tokens of the running pass are still in the backbone, and which are in the river.

One `ExitRouter` accompanies a model. It is told by which rule the tokens of a pass leave, and what
each layer made of its input; every linear layer asks it which weights to use for which row. A row
is one token of one sequence: row `b * T + t` of a pass over `[B, T]` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from river_llm.errors import ConfigError
from river_llm.river.policy import ExitPolicy

Phase = Literal["prefill", "decode"]


class Route(Enum):
    """Where the rows of the running layer go."""

    BACKBONE = 0  # all of them through the backbone's weights
    RIVER = 1  # all of them through the exit layer's
    BOTH = 2  # some here, some there


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """By what the tokens `[B, T]` of one pass leave the backbone. All tensors are on the CPU.

    Attributes:
        thresholds: float32 `[L]` for all tokens, or `[B, T, L]`: a token leaves after l layers
            where its similarity exceeds entry l; see `ExitPolicy.thresholds`.
        is_real: bool `[B, T]`, false for padding and for tokens that only fill a row up, which have
            no say in where others go; None where all are real.
        mean_groups: int64 `[B, T]`, tokens of one group are compared by their mean similarity.
        minimum_groups: int64 `[B, T]`, and then by the smallest of their group. Groups are numbered
            from 0; tokens that left, or are not real, have no part in their group.
        record_similarities: whether the router keeps them.
    """

    thresholds: Tensor
    is_real: Tensor | None = None
    mean_groups: Tensor | None = None
    minimum_groups: Tensor | None = None
    record_similarities: bool = False

    @classmethod
    def of_policy(
        cls, policy: ExitPolicy, num_layers: int, phase: Phase, is_real: Tensor
    ) -> RoutingRule:
        """What a policy says of a pass over tokens `[B, T]` that is all prefill or all decoding."""
        prefills = phase == "prefill"
        thresholds = (policy.prefill_thresholds if prefills else policy.thresholds)(num_layers)
        sequences = torch.arange(len(is_real)).unsqueeze(1).expand_as(is_real)
        leaves_whole = prefills and policy.prefill == "sequence"
        if leaves_whole:
            together = torch.zeros_like(sequences)
        else:  # those of one column
            together = torch.arange(is_real.shape[1]).expand_as(is_real)
        return cls(
            torch.tensor(thresholds),
            None if bool(is_real.all()) else is_real,
            mean_groups=sequences if leaves_whole else None,
            minimum_groups=together if policy.batch == "minimum" else None,
        )


class ExitRouter:
    """The exit decision of every token, pass by pass.

    Attributes:
        route: where the rows of the layer that runs now go.
        backbone_rows, river_rows: the row indices of either side, while `route` is BOTH.
        in_backbone: bool `[B, T]`, which tokens of the running pass haven't left.
        exit_layers: int64 `[B, T]`, how many backbone layers each token of the last pass ran; of
            no meaning for tokens that aren't real.
        depth_limit: tokens still in the backbone after so many layers leave there, from the next
            pass on; None: no limit.
        depth_capped: real tokens of all passes so far that left by the depth limit alone.
        record_similarities: whether to keep those of passes whose rules don't ask for it.
        similarities: float32 `[L, B, T]` of the last pass, NaN where a token had left before;
            None unless they were recorded.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._depth_limit: int | None = None
        self.depth_capped = 0
        self.record_similarities = False
        self.route = Route.BACKBONE
        self.backbone_rows = self.river_rows = torch.empty(0, dtype=torch.long)
        self.in_backbone = torch.empty(0, 0, dtype=torch.bool)
        self.exit_layers = torch.empty(0, 0, dtype=torch.long)
        self.similarities: Tensor | None = None

    @property
    def depth_limit(self) -> int | None:
        return self._depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        """
        Raises:
            ConfigError: the model has fewer layers.
        """
        check_depth_limit(limit, self.num_layers)
        self._depth_limit = limit

    def begin_pass(self, batch: int, num_tokens: int, rule: RoutingRule) -> None:
        """Start a pass over `[batch, num_tokens]` tokens."""
        self._rule = rule
        self._limit = self.num_layers if self.depth_limit is None else self.depth_limit
        thresholds = rule.thresholds.float()
        columns = thresholds.reshape(-1, self.num_layers)  # of the real tokens
        if rule.is_real is not None and thresholds.ndim == 3:
            columns = thresholds[rule.is_real]
        self._thresholds = thresholds.expand(batch, num_tokens, self.num_layers)
        self._are_finite = columns.isfinite().any(0).tolist()
        self._may_leave = (columns < math.inf).any(0).tolist()
        self._capped = 0  # in this pass
        self.in_backbone = torch.ones(batch, num_tokens, dtype=torch.bool)
        self.exit_layers = torch.full((batch, num_tokens), self.num_layers)
        self.route = Route.BACKBONE
        self.similarities = None
        if rule.record_similarities or self.record_similarities:
            self.similarities = torch.full((self.num_layers, batch, num_tokens), math.nan)
        self._let_leave(0, None)

    def after_layer(self, layers_run: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Let tokens leave after `layers_run` layers.

        Args:
            layer_input, layer_output: hidden states `[B, T, C]` before and after the last layer.
        """
        if self.route is Route.RIVER:
            return
        decides = layers_run < self.num_layers and self._are_finite[layers_run]
        similarity = None
        if decides or self.similarities is not None:
            # s[b,t,l] = cos(h[b,t,l-1], h[b,t,l]), in float32: [B, T]
            similarity = F.cosine_similarity(layer_input.float(), layer_output.float(), dim=-1)
            similarity = similarity.cpu()
            if self.similarities is not None:
                self.similarities[layers_run - 1] = similarity.where(self.in_backbone, math.nan)
        if layers_run < self.num_layers:
            self._let_leave(layers_run, similarity if decides else None)

    def end_pass(self) -> None:
        """The pass came to its end."""
        self.route = Route.BACKBONE
        self.depth_capped += self._capped

    def _let_leave(self, layers_run: int, similarity: Tensor | None) -> None:
        """Apply rule and limit; `similarity` is `[B, T]`, or None where it decides nothing."""
        leaving = torch.zeros_like(self.in_backbone)
        if self._may_leave[layers_run]:
            threshold = self._thresholds[..., layers_run]
            leaving = threshold == -math.inf
            if similarity is not None:
                leaving = leaving | (self._joined(similarity) > threshold)
            leaving = leaving & self.in_backbone
        if layers_run == self._limit:
            self._capped += int(self._counting(self.in_backbone & ~leaving).sum())
            leaving = self.in_backbone
        if bool(leaving.any()):
            self._leave(leaving, after=layers_run)

    def _counting(self, tokens: Tensor) -> Tensor:
        """The real ones of the tokens, bool `[B, T]`."""
        return tokens if self._rule.is_real is None else tokens & self._rule.is_real

    def _joined(self, similarity: Tensor) -> Tensor:
        """What is held against the thresholds, from similarities `[B, T]`: of their groups."""
        counting = self._counting(self.in_backbone)
        groups = self._rule.mean_groups
        if groups is not None:
            sums = similarity.new_zeros(int(groups.max()) + 1)
            counts = sums.index_add(0, groups[counting], torch.ones(int(counting.sum())))
            sums = sums.index_add(0, groups[counting], similarity[counting])
            similarity = (sums / counts)[groups]
        groups = self._rule.minimum_groups
        if groups is not None:
            # a row that is no number says nothing of its neighbours
            least = torch.full((int(groups.max()) + 1,), math.inf).scatter_reduce(
                0, groups[counting], similarity[counting].nan_to_num(math.inf), "amin"
            )
            similarity = least.where(least.isfinite(), math.nan)[groups]
        return similarity

    def _leave(self, leaving: Tensor, after: int) -> None:
        """Let the tokens `leaving`, bool `[B, T]`, leave the backbone after `after` layers."""
        self.exit_layers[leaving] = after
        self.in_backbone = self.in_backbone & ~leaving
        if not bool(self._counting(self.in_backbone).any()):
            self.route = Route.RIVER
            return
        rows = self.in_backbone.flatten()
        if self._rule.is_real is not None:  # others go where it costs no second product
            rows = rows | ~self._rule.is_real.flatten()
        if bool(rows.all()):
            return
        self.route = Route.BOTH
        self.backbone_rows = rows.nonzero().flatten()
        self.river_rows = (~rows).nonzero().flatten()


def check_depth_limit(limit: int | None, num_layers: int) -> None:
    """Validate the depth limit of a model of so many layers.

    Raises:
        ConfigError: it has fewer layers.
    """
    if limit is not None and not 0 <= limit <= num_layers:
        raise ConfigError(
            f"the depth limit is {limit}, but the model has {num_layers} layers; "
            f"choose 0 to {num_layers}"
        )
