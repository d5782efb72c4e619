"""Coordinate descent: codes are changed one column at a time as long as that lowers ``tr((T - W^) G (T - W^)^T)``.

With all other columns fixed, the objective is a parabola in column j of W^, whose minimum lies at
``W^_j + ((T - W^) G)_j / G_jj``; the code nearest to it is the best one (rows don't interact, so a column's codes are
chosen all at once). Each change lowers the objective or leaves it: the result is never worse than what was handed in.
`gptq` looks at every column once; this looks again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detent.algorithms.objective import check_elementwise, nearest_values, rows_error, spread
from detent.formats import Format, Scales


@torch.no_grad()
def descend(
    target: Tensor, rounded: Tensor, moment: Tensor, fmt: Format, scales: Scales, *, sweeps: int = 2, block: int = 64
) -> Tensor:
    """A rounded weight with better codes, float32 [out, in], under the same scales.

    Args:
        target: float [out, in], T: the weight to come near.
        rounded: float [out, in], values on the grid of `scales`.
        moment: G, float32 [in, in].
        fmt: a format whose codes are chosen one by one.
        scales: of `rounded`, in the shape of the format's grid.
        sweeps: how often every column is looked at; it ends sooner when nothing changes.
        block: columns between two updates of all others' gradients.

    Raises:
        DetentError: the format chooses codes together.
    """
    check_elementwise(fmt, "coordinate descent")
    unit, zero_point = spread(fmt, scales, tuple(target.shape))
    target = target.detach().to(torch.float32)
    # Columns are rows here, so that each lies in one piece of memory.
    values, units = rounded.to(torch.float32).T.contiguous(), unit.T.contiguous()
    zeros = None if zero_point is None else zero_point.T.contiguous()
    diagonal = moment.diagonal()
    for _ in range(sweeps):
        slope = moment @ (target.T - values)
        changed = 0
        for start in range(0, len(values), block):
            part = slice(start, min(start + block, len(values)))
            before = values[part].clone()
            within, local = slope[part].clone(), moment[part, part]
            for j in range(len(before)):
                at = start + j
                if diagonal[at] <= 0:
                    continue
                wish = values[at] + within[j] / diagonal[at]
                new = nearest_values(wish, fmt, units[at], None if zeros is None else zeros[at])
                within -= torch.outer(local[:, j], new - values[at])
                values[at] = new
            step = values[part] - before
            changed += int((step != 0).sum())
            slope -= moment[:, part] @ step
        if not changed:
            break
    result = values.T.contiguous()
    worse = rows_error(target - result, moment, exact=True) > rows_error(target - rounded, moment, exact=True)
    return torch.where(worse[:, None], rounded.to(torch.float32), result)
