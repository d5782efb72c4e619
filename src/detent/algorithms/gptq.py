"""`gptq`: round one input column after the other, and let the columns that are still free make up for the error.

Objective: ``tr((W - W^) G (W - W^)^T)``, G the second moment of the layer's inputs (GPTQ, arXiv 2210.17323; its H is
2G/n). Scales are fixed beforehand and belong to the columns' own places, so columns may be taken in any order ("static
groups"): here by falling diagonal of G, and no index has to be stored. Updates are applied lazily in blocks of columns.
A channel that never carries a value (zero diagonal) costs nothing, so its weights are rounded plainly.

If the result has a larger objective than plain rounding under the same scales, row by row, that row keeps plain
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detent.algorithms.objective import check_elementwise, nearest_values, requantize, rows_error, spread
from detent.errors import DetentError
from detent.formats import Format, Scales

#: Damping, as a share of G's mean diagonal, from which on a second moment counts as unusable.
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid.

    Attributes:
        weight: float32 [out, in], every value one that a code stands for: encoding it under the same scales is exact.
        before, after: the objective with plain rounding, and of `weight`.
        energy: the objective of a weight of zeros.
        damping: the share of the mean diagonal that was added to G to invert it.
        kept_rows: rows that keep plain rounding, since the algorithm would have made them worse.
    """

    weight: Tensor
    before: float
    after: float
    energy: float
    damping: float
    kept_rows: int


def gptq(
    weight: Tensor,
    moment: Tensor,
    fmt: Format,
    scales: Scales,
    *,
    target: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
) -> Rounded:
    """Round a weight so that the layer's outputs change least.

    Args:
        weight: float [out, in].
        moment: G, float32 [in, in], symmetric and positive semi-definite.
        fmt: a format whose codes are chosen one by one (not MX4/6/9, not progressive).
        scales: the scales to round under, in the shape of the format's grid.
        target: float [out, in], what to come near instead of `weight` (see `retarget`); the objective is then
            ``tr((T - W^) G (T - W^)^T)``. Plain rounding stays that of `weight`.
        block_size: columns between two updates of all later columns.
        damping: share of the mean diagonal added to G's diagonal; raised tenfold until G can be inverted.
        act_order: take columns by falling diagonal of G.

    Raises:
        DetentError: shapes don't fit, the format can't be served, or G isn't positive definite under any damping.
    """
    check_elementwise(fmt, "gptq")
    out, width = weight.shape
    if moment.shape != (width, width):
        raise DetentError(f"gptq: a weight of {out} x {width} needs a second moment of {width} x {width}")
    weight = weight.detach().to(torch.float32)
    target = weight if target is None else target.detach().to(torch.float32)
    plain = requantize(weight, fmt, scales)
    unit, zero_point = spread(fmt, scales, (out, width))
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(width, device=weight.device)
    factor, used = inverse_factor(moment, dead, order, damping)
    columns = _round_columns(
        target.T[order].contiguous(),
        factor,
        fmt,
        unit.T[order].contiguous(),
        None if zero_point is None else zero_point.T[order].contiguous(),
        block_size,
    )
    result = torch.empty_like(columns)
    result[order] = columns
    result = result.T.contiguous()
    result[:, dead] = plain[:, dead]
    return keep_better_rows(target, plain, result, moment, used)


def inverse_factor(moment: Tensor, dead: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U with G^-1 = U^T U, upper triangular, in the order of the columns; the damping that was needed).

    G = R R^T with R upper triangular is the Cholesky factorisation with rows and columns counted from the end, and
    U = R^-1.
    """
    g = moment.double()
    g = torch.where(dead[:, None] | dead[None, :], 0.0, g)
    mean = float(g.diagonal().sum() / max(1, int((~dead).sum())))
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    g = g + torch.diag(dead.double() * (mean or 1.0))
    g = g[order][:, order].flip(0, 1)
    share = damping
    while share < max(_MOST_DAMPING, 2 * damping):
        lower, failed = torch.linalg.cholesky_ex(g + share * mean * eye)
        if not int(failed):
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper.float(), share
        share = max(share * 10, 1e-4)
    raise DetentError(
        "gptq: the second moment isn't positive definite under any damping; is the calibration data sane?"
    )


def _round_columns(
    work: Tensor, inverse: Tensor, fmt: Format, unit: Tensor, zero_point: Tensor | None, block_size: int
) -> Tensor:
    """Column by column: round, and take the error times U_ij / U_ii off the later columns j (GPTQ, algorithm 1).

    All matrices are transposed, [in, out], so that a column of the weight lies in one piece; `work` is overwritten.
    """
    out = torch.empty_like(work)
    width = work.shape[0]
    diagonal = inverse.diagonal().tolist()
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        errors = torch.empty_like(work[start:stop])
        block, factor = work[start:stop], inverse[start:stop, start:stop]
        for i in range(stop - start):
            zero = None if zero_point is None else zero_point[start + i]
            value = nearest_values(block[i], fmt, unit[start + i], zero)
            out[start + i] = value
            torch.sub(block[i], value, out=errors[i])
            errors[i] /= diagonal[start + i]
            if i + 1 < stop - start:
                block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        if stop < width:
            work[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    return out


def keep_better_rows(target: Tensor, plain: Tensor, result: Tensor, moment: Tensor, damping: float) -> Rounded:
    """`result`, but plain rounding in the rows where that has the smaller objective."""
    before = rows_error(target - plain, moment, exact=True)
    after = rows_error(target - result, moment, exact=True)
    worse = after > before
    return Rounded(
        torch.where(worse[:, None], plain, result),
        float(before.sum()),
        float(torch.minimum(before, after).sum()),
        float(rows_error(target, moment).sum()),
        damping,
        int(worse.sum()),
    )
