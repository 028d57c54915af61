"""GPTQ (Frantar et al. 2022, algorithm 1) on grids that are searched for each group.

A matrix W meets inputs X, `[in_features, tokens]`. What counts isn't the error of its weights but
that of its products, ``||W X - Q X||^2``, whose second derivative is ``H = X X^T`` for every output
row. So the columns are rounded one after the other, and what a column loses is made up for by those
that are not rounded yet:

    error  =  (w_j - q_j) / U_jj
    W_k   -=  error * U_jk        for every column k > j,     where  H^-1 = U^T U

Scales and zeros are chosen beforehand, with each column's error weighted by ``H_jj``, and rounded
to bfloat16 before any code is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_llm.errors import ConfigError
from river_llm.river.bit_packing import pack_codes
from river_llm.river.quantize import BLOCK_ELEMENTS, SMALLEST_SCALE, QuantizedMatrix

_DAMPINGS = (0.01, 0.1, 1.0)  # of H's mean diagonal, added to it: H may be singular
_BLOCK_COLUMNS = 64  # rounded between two updates of all columns behind them
_RANGES = 16  # each from a group's whole range down to half of it
_REFITS = 2  # least-squares fits of scale and zero to the codes, for each range


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> QuantizedMatrix:
    """Quantise a weight `[out_features, in_features]` for the inputs that `hessian` sums up.

    Args:
        hessian: float32 `[in_features, in_features]`, the sum of ``x x^T`` over the inputs x. It is
            overwritten.

    Raises:
        ConfigError: weights or inputs are not finite, or the inputs too few and alike.
    """
    weight = weight.detach().float()
    rows, columns = weight.shape
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("the weight holds values that are not finite; check the model's file")
    if not bool(torch.isfinite(diagonal).all()):
        raise ConfigError("the inputs that it was calibrated on are not finite")
    scales, zeros = _searched_grids(weight, diagonal.clone(), bits, group_size)
    middle, largest = 2 ** (bits - 1), 2**bits - 1
    factor = _inverse_factor(hessian)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scale_of, zero_of = scales.float().T.contiguous(), zeros.float().T.contiguous()
    transposed = weight.T.clone(memory_format=torch.contiguous_format)  # columns are lines
    for start in range(0, columns, _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, columns)
        block = transposed[start:end]
        errors = torch.empty_like(block)
        for j, column in enumerate(range(start, end)):
            scale, zero = scale_of[column // group_size], zero_of[column // group_size]
            code = ((block[j] - zero) / scale + middle).round_().clamp_(0, largest)
            codes[:, column] = code
            rounded = (code - middle) * scale + zero
            errors[j] = (block[j] - rounded) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        transposed[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return QuantizedMatrix(pack_codes(codes, bits), scales, zeros, bits, group_size)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with ``H^-1 = U^T U``; a column without inputs counts as one."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    undamped, mean = diagonal.clone(), diagonal.mean()
    for damping in _DAMPINGS:
        diagonal.copy_(undamped + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            continue
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return factor
    raise ConfigError("its inputs are too much alike; calibrate on more text, of more kinds")


def _searched_grids(
    weight: Tensor, importance: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros, bfloat16 `[out_features, in_features / group_size]`."""
    rows, columns = weight.shape
    num_groups = columns // group_size
    scales = torch.empty(rows, num_groups, dtype=torch.bfloat16, device=weight.device)
    zeros = torch.empty_like(scales)
    importance = importance.view(1, num_groups, group_size) + 1e-12
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, block_rows):
        block = slice(start, min(start + block_rows, rows))
        groups = weight[block].view(-1, num_groups, group_size)
        scale, zero_point = _searched_grid(groups, importance, bits)
        scales[block] = scale.squeeze(-1)
        zeros[block] = (
            (2 ** (bits - 1) - zero_point) * scales[block].float().unsqueeze(-1)
        ).squeeze(-1)
    return scales, zeros


def _searched_grid(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[rows, groups, 1]` of the least weighted squared error among ranges
    from the whole to half, each refined by least squares.

    Shapes: groups `[rows, groups, group_size]`; importance `[1, groups, group_size]`.
    """
    largest = 2**bits - 1
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    high = groups.amax(-1, keepdim=True).clamp_(min=0)
    total = importance.sum(-1, keepdim=True)
    mean_weight = (groups * importance).sum(-1, keepdim=True) / total
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(_RANGES):
        part = 1 - 0.5 * step / _RANGES
        scale = ((high - low) * (part / largest)).clamp_(min=SMALLEST_SCALE)
        zero_point = (-low * part / scale).round_()
        for refit in range(_REFITS + 1):
            code = (groups / scale + zero_point).round_().clamp_(0, largest)
            error = (code - zero_point).mul_(scale).sub_(groups).square_().mul_(importance)
            error = error.sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
            if refit == _REFITS:
                break
            mean_code = (code * importance).sum(-1, keepdim=True) / total
            deviation = code.sub_(mean_code)
            weighted = deviation * importance
            variance = (weighted * deviation).sum(-1, keepdim=True)
            covariance = (weighted * groups).sum(-1, keepdim=True)
            slope = (covariance / variance.clamp(min=1e-30)).abs_()
            scale = torch.where(variance > 0, slope, scale).clamp_(min=SMALLEST_SCALE)
            zero_point = mean_code - mean_weight / scale
    return best_scale, best_zero
