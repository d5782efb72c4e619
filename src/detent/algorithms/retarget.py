"""Re-targeting: the weight under which a layer, fed what the quantized blocks before it give, comes nearest to the
outputs of the float model.

With x the inputs at hand and r those of the float model for the same tokens, ``||x T^T - r W^T||^2`` is least for
``T = W C (G + damping)^-1``, where ``G = sum x x^T`` and ``C = sum r x^T`` (least squares; GPTAQ, arXiv 2504.02692, has
the same error term). Damping pulls T towards W: what is solved for is ``T - W = W (C - G) (G + damping)^-1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detent.errors import DetentError


def retarget(weight: Tensor, moment: Tensor, cross_moment: Tensor, *, damping: float = 0.05) -> Tensor:
    """T, float32 [out, in].

    Args:
        weight: W, float [out, in].
        moment: G, float32 [in, in].
        cross_moment: C, float32 [in, in].
        damping: share of G's mean diagonal that is added to its diagonal.

    Raises:
        DetentError: G isn't positive definite in spite of damping.
    """
    g = moment.double()
    mean = g.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(g + damping * mean * torch.eye(len(g), dtype=g.dtype, device=g.device))
    if int(failed):
        raise DetentError("retarget: the second moment isn't positive definite; raise retarget_damping")
    w = weight.detach().double()
    shift = torch.cholesky_solve((w @ (cross_moment.double() - g)).T, factor).T
    return (w + shift).float()
