"""A checkpoint's weights beside the backbone's: whether they are of the same model, and their form
in the river."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.config import RiverConfig
from river_llm.errors import ModelLoadError
from river_llm.load.quantized.grouped import GroupedWeight
from river_llm.river.quantize import QuantizedMatrix, quantize

REQUANTIZED_BITS = 8  # enough to add nothing that counts to what 6 bits or fewer have lost
_LEAST_COSINE = 0.7  # 2 bits have 0.8, other weights of the same shape next to 0
_LARGEST_GAIN_SPREAD = 1.3  # 2 bits have 1.1
# What another dtype may do to a norm's weight: relative to itself, and to the largest of all.
_ROUNDING, _ROUNDING_OF_ALL = 2**-6, 2**-10


@dataclass(frozen=True, slots=True)
class ImportedMatrix:
    """A checkpoint's weight in the river.

    Attributes:
        matrix: in the river's form.
        is_requantized: the codes are not the checkpoint's.
        cosine: between the checkpoint's weight and the backbone's.
    """

    matrix: QuantizedMatrix
    is_requantized: bool
    cosine: float


def check_norm(weight: Tensor, own: Tensor) -> None:
    """Validate that a norm's weight is the backbone's, but for rounding.

    AWQ and its kin multiply the columns of a weight by factors, and divide the norm before it by
    the same. The river has the backbone's norms, and columns with factors are on no grid of groups.

    Raises:
        ModelLoadError: it isn't.
    """
    weight, own = weight.float(), own.detach().cpu().float()
    if weight.shape != own.shape:
        raise ModelLoadError(
            f"is {list(weight.shape)}, and the backbone's {list(own.shape)}; take a checkpoint of "
            "this very model"
        )
    allowed = _ROUNDING * own.abs() + _ROUNDING_OF_ALL * own.abs().max()
    if not bool(((weight - own).abs() <= allowed).all()):
        raise ModelLoadError(
            "is not the backbone's, as after AWQ, whose factors are folded into norms, which a "
            "river shares with its backbone; take a checkpoint of this very model without them, "
            "or build a better river without --from"
        )


def in_river(weight: GroupedWeight | Tensor, own: Tensor, group_size: int) -> ImportedMatrix:
    """The river's form of a weight.

    Args:
        weight: codes, or float32 values where a checkpoint has none that groups could hold.
        own: the backbone's, `[out_features, in_features]`.
        group_size: the river's.

    Raises:
        ModelLoadError: it is another model's, or not finite.
    """
    values = weight.dequantize() if isinstance(weight, GroupedWeight) else weight
    if not bool(torch.isfinite(values).all()):
        raise ModelLoadError("has values that are not finite; get its files again")
    cosine = _cosine(values, own.float())
    if cosine < _LEAST_COSINE:
        raise ModelLoadError(
            f"is another model's: the cosine between it and the backbone's weight is {cosine:.2f}; "
            "take a checkpoint of this very model"
        )
    if _gain_spread(values, own.float()) > _LARGEST_GAIN_SPREAD:
        raise ModelLoadError(
            "has outputs that are multiples of the backbone's, as after AWQ of values; "
            "take a checkpoint without such factors, or build a better river without "
            "--from"
        )
    if isinstance(weight, GroupedWeight) and weight.group_size % group_size == 0:
        return ImportedMatrix(weight.rounded(group_size), False, cosine)
    config = RiverConfig(REQUANTIZED_BITS, group_size)
    return ImportedMatrix(quantize(values, config), True, cosine)


def _gain_spread(values: Tensor, own: Tensor) -> float:
    """How much more of some rows of `own` there is in those of `values` than of others: the gains'
    ninth decile over their first."""
    gains = (values * own).sum(1) / own.square().sum(1).clamp(min=1e-30)
    low, high = gains.quantile(torch.tensor([0.1, 0.9], device=gains.device)).tolist()
    return float(high / low) if low > 0 else math.inf


def _cosine(values: Tensor, own: Tensor) -> float:
    products = (values * own, values.square(), own.square())
    both, first, second = (float(one.sum(1).double().sum()) for one in products)
    return both / math.sqrt(first * second) if first and second else 0.0
