"""A linear layer that runs with the backbone's weights or the river's, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from river_llm.errors import RiverError
from river_llm.ownership import NotCopied
from river_llm.river.backbone import linear_weight
from river_llm.river.kernels import Kernel
from river_llm.river.router import ExitRouter, Route


class RoutedForward(NotCopied):
    """The forward of a linear layer that takes each row's weights where the router says."""

    def __init__(self, linear: nn.Module, kernel: Kernel, router: ExitRouter) -> None:
        self._backbone: Callable[[Tensor], Tensor] = linear.forward
        self._kernel, self._router = kernel, router
        self._bias = linear.bias
        self._device, self._dtype = device_and_dtype(linear)

    def __call__(self, inputs: Tensor) -> Tensor:
        router = self._router
        if router.route is Route.BACKBONE:
            return self._backbone(inputs)
        if router.route is Route.RIVER:
            return self._river(inputs)
        rows = inputs.reshape(-1, inputs.shape[-1])  # [B * T, in_features]
        backbone_rows = router.backbone_rows.to(rows.device)
        river_rows = router.river_rows.to(rows.device)
        backbone_output = self._backbone(rows[backbone_rows])
        output = backbone_output.new_empty(rows.shape[0], backbone_output.shape[-1])
        output[backbone_rows] = backbone_output
        output[river_rows] = self._river(rows[river_rows])
        return output.view(*inputs.shape[:-1], output.shape[-1])

    def _river(self, inputs: Tensor) -> Tensor:
        if inputs.device != self._device or inputs.dtype != self._dtype:
            raise RiverError(
                f"the river was attached for {self._dtype} on {self._device}, but the inputs are "
                f"{inputs.dtype} on {inputs.device}; detach it, move the model, attach it again"
            )
        output = self._kernel(inputs.reshape(-1, inputs.shape[-1]))
        if isinstance(self._bias, Tensor):
            output = output + self._bias
        return output.view(*inputs.shape[:-1], output.shape[-1])


def device_and_dtype(linear: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of its weight."""
    weight = linear_weight(linear)
    return weight.device, weight.dtype
