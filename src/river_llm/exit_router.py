"""Which tokens of the running pass are still in the backbone, and which are in the river.

One `ExitRouter` accompanies a model. It is told when a pass begins and what each layer made of its
input; it applies the exit policy, and every linear layer asks it which weights to use for which
row. A row is one token of one sequence: row `b * T + t` of a pass over `[B, T]` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from river_llm.errors import ConfigError
from river_llm.exit_policy import ExitPolicy, check_is_policy

Phase = Literal["prefill", "decode"]


class Route(Enum):
    """Where the rows of the running layer go."""

    BACKBONE = 0  # all of them through the backbone's weights
    RIVER = 1  # all of them through the exit layer's
    BOTH = 2  # some here, some there


class ExitRouter:
    """The exit decision of every token, pass by pass.

    Attributes:
        route: where the rows of the layer that runs now go.
        backbone_rows, river_rows: the row indices of either side, while `route` is BOTH.
        in_backbone: bool `[B, T]`, which tokens of the running pass haven't left.
        exit_layers: int64 `[B, T]`, how many backbone layers each token of the last pass ran.
        depth_limit: tokens still in the backbone after so many layers leave there, from the next
            pass on; None: no limit.
        held_back: tokens of all passes so far that left by the depth limit and not by the policy;
            padding doesn't count.
        least_depth, most_depth: layers that tokens of the running pass run in the backbone by
            policy and limit, whatever their similarities: the deepest one surely and at most.
        similarities: float32 `[L, B, T]` of the last pass, NaN where a token had left before;
            None unless `record_similarities` is set.
    """

    def __init__(self, policy: ExitPolicy, num_layers: int) -> None:
        self.num_layers = num_layers
        self.record_similarities = False
        self.depth_limit = None
        self.held_back = 0
        self.least_depth = self.most_depth = num_layers
        self.route = Route.BACKBONE
        self.backbone_rows = self.river_rows = torch.empty(0, dtype=torch.long)
        self.in_backbone = torch.empty(0, 0, dtype=torch.bool)
        self.exit_layers = torch.empty(0, 0, dtype=torch.long)
        self.similarities: Tensor | None = None
        self.set_policy(policy)

    def set_policy(self, policy: ExitPolicy) -> None:
        """Use `policy` from the next pass on.

        Raises:
            ConfigError: it is none, or names more layers than the model has.
        """
        check_is_policy(policy)
        self.thresholds = policy.thresholds(self.num_layers)
        self.policy = policy

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

    def begin_pass(
        self, batch: int, num_tokens: int, phase: Phase, is_real: Tensor | None = None
    ) -> None:
        """Start a pass over `[batch, num_tokens]` tokens.

        Args:
            is_real: bool `[batch, num_tokens]`, false for padding and for tokens that only fill a
                row up, which have no say in another token's exit; None where all are real.
        """
        rule = self.policy.prefill if phase == "prefill" else "token"
        if rule == "backbone":
            self._pass_thresholds = (math.inf,) * self.num_layers
        elif rule == "river":
            self._pass_thresholds = (-math.inf,) * self.num_layers
        else:
            self._pass_thresholds = self.thresholds
        self._pass_limit = self.num_layers if self.depth_limit is None else self.depth_limit
        self.least_depth, self.most_depth = _depths(self._pass_thresholds, self._pass_limit)
        self._held_back = 0  # in this pass
        self._leave_by_sequence = rule == "sequence"
        self._leave_together = self.policy.batch == "minimum"
        self._is_real = is_real
        self.in_backbone = torch.ones(batch, num_tokens, dtype=torch.bool)
        self.exit_layers = torch.full((batch, num_tokens), self.num_layers)
        self.route = Route.BACKBONE
        self.similarities = (
            torch.full((self.num_layers, batch, num_tokens), math.nan)
            if self.record_similarities
            else None
        )
        if self.most_depth == 0:
            if self._pass_thresholds[0] > -math.inf:
                self._hold_back(self.in_backbone)
            self.leave(self.in_backbone, after=0)

    def after_layer(self, layers_run: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Let tokens leave after `layers_run` layers.

        Args:
            layer_input, layer_output: hidden states `[B, T, C]` before and after the last layer.
        """
        if self.route is Route.RIVER:
            return
        is_last = layers_run == self.num_layers
        threshold = math.inf if is_last else self._pass_thresholds[layers_run]
        is_limit = layers_run == self._pass_limit and not is_last
        if threshold == math.inf and self.similarities is None and not is_limit:
            return
        leaving = self.in_backbone & (threshold < math.inf)
        if math.isfinite(threshold) or self.similarities is not None:
            # s[t,b,l] = cos(h[t,b,l-1], h[t,b,l]), in float32: [B, T]
            similarity = F.cosine_similarity(layer_input.float(), layer_output.float(), dim=-1)
            similarity = similarity.cpu()
            if self.similarities is not None:
                self.similarities[layers_run - 1] = similarity.where(self.in_backbone, math.nan)
            if math.isfinite(threshold):
                leaving = (self._join(similarity) > threshold) & self.in_backbone
        if is_limit:
            self._hold_back(self.in_backbone & ~leaving)
            leaving = self.in_backbone
        self.leave(leaving, after=layers_run)

    def end_pass(self) -> None:
        """The pass came to its end."""
        self.route = Route.BACKBONE
        self.held_back += self._held_back

    def _join(self, similarity: Tensor) -> Tensor:
        """What is held against the threshold: `[B or 1, T or 1]`, from similarities `[B, T]`."""
        if self._leave_by_sequence:
            if self._is_real is None:
                similarity = similarity.mean(1, keepdim=True)
            else:
                of_real = similarity.where(self._is_real, 0.0).sum(1, keepdim=True)
                similarity = of_real / self._is_real.sum(1, keepdim=True)
        if self._leave_together:
            counts = self.in_backbone if self._is_real is None else self.in_backbone & self._is_real
            if self._leave_by_sequence:
                counts = counts.any(1, keepdim=True)
            similarity = similarity.where(counts, math.inf).amin(0, keepdim=True)
        return similarity

    def _hold_back(self, tokens: Tensor) -> None:
        """Count the tokens, bool `[B, T]`, that leave by the depth limit alone."""
        if self._is_real is not None:
            tokens = tokens & self._is_real
        self._held_back += int(tokens.sum())

    def leave(self, leaving: Tensor, after: int) -> None:
        """Let the tokens `leaving`, bool `[B, T]`, leave the backbone after `after` layers."""
        if not bool(leaving.any()):
            return
        self.exit_layers[leaving] = after
        self.in_backbone = self.in_backbone & ~leaving
        rows = self.in_backbone.flatten()
        if not bool(rows.any()):
            self.route = Route.RIVER
            return
        self.route = Route.BOTH
        self.backbone_rows = rows.nonzero().flatten()
        self.river_rows = (~rows).nonzero().flatten()


def check_depth_limit(limit: int | None, num_layers: int) -> None:
    """See that a model of so many layers can have this limit.

    Raises:
        ConfigError: it has fewer layers.
    """
    if limit is not None and not 0 <= limit <= num_layers:
        raise ConfigError(
            f"the depth limit is {limit}, but the model has {num_layers} layers; "
            f"choose 0 to {num_layers}"
        )


def _depths(thresholds: Sequence[float], limit: int) -> tuple[int, int]:
    """How many layers the deepest token runs in the backbone: surely, and at most."""
    most = least = min(limit, len(thresholds))
    for depth in range(most - 1, -1, -1):
        if thresholds[depth] == -math.inf:
            most = least = depth
        elif depth > 0 and thresholds[depth] < math.inf:  # before the first layer it says nothing
            least = depth
    return least, most
