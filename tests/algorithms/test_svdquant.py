"""`svdquant` against dense singular value decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detent.algorithms.svdquant import LowRank, svdquant
from detent.errors import DetentError
from detent.formats import Format, fake_quantize
from detent.formats.format import fp8, integer, mx, nvfp4
from detent.formats.granularity import per_channel, per_group

FORMATS = [integer(4, per_group(16)), integer(4, per_channel(0)), integer(2, per_group(32)), nvfp4(), mx("e2m1")]


def layer(out: int = 40, width: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with outlier columns, and the second moment of correlated inputs of very different sizes."""
    torch.manual_seed(0)
    weight = torch.randn(out, width)
    weight[:, ::17] *= 8
    x = torch.randn(300, width) @ (torch.eye(width) + 0.3 * torch.randn(width, width)) * torch.linspace(0.1, 5, width)
    return weight, x.T @ x


def trace(difference: Tensor, moment: Tensor | None) -> float:
    d = difference.double()
    g = torch.eye(d.shape[1], dtype=torch.float64) if moment is None else moment.double()
    return float(torch.trace(d @ (torch.diag(g) if g.dim() == 1 else g) @ d.T))


def remaining(weight: Tensor, fmt: Format, split: LowRank) -> Tensor:
    return weight.double() - split.b.double() @ split.a.double() - fake_quantize(split.rest, fmt).double()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_objective_is_what_it_says_and_falls(fmt: Format, kind: str) -> None:
    weight, full = layer()
    moment = {"none": None, "diagonal": full.diagonal(), "full": full}[kind]
    split = svdquant(weight, fmt, 4, moment=moment)
    assert split is not None
    assert split.a.shape == (4, 64)
    assert split.b.shape == (40, 4)
    assert split.before == pytest.approx(trace(weight - fake_quantize(weight, fmt), moment), rel=1e-4)
    assert split.after == pytest.approx(trace(remaining(weight, fmt, split), moment), rel=1e-3)
    assert split.energy == pytest.approx(trace(weight, moment), rel=1e-4)
    assert split.after < split.before


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_branch_and_rest_are_the_weight_and_nearly_as_good_as_can_be(fmt: Format) -> None:
    """With a Cholesky factor L of G, no rank-r branch leaves less than the tail singular values of (W - Q) L."""
    weight, moment = layer()
    split = svdquant(weight, fmt, 4, moment=moment)
    assert split is not None
    torch.testing.assert_close(split.rest + split.b @ split.a, weight, rtol=1e-5, atol=1e-5)
    error = weight.double() - fake_quantize(split.rest, fmt).double()
    least = float(torch.linalg.svdvals(error @ torch.linalg.cholesky(moment.double()))[4:].pow(2).sum())
    assert least <= split.after <= 1.5 * least


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_better_than_removing_the_leading_part_alone(fmt: Format) -> None:
    """The published method: the leading singular vectors of W in full precision, the rest rounded."""
    weight, _ = layer()
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    leading = (u[:, :4] * s[:4]) @ v[:4]
    rest = (weight - leading).float()
    published = trace(rest - fake_quantize(rest, fmt), None)
    split = svdquant(weight, fmt, 4)
    assert split is not None
    assert split.after <= published


def test_wide_layers_use_subspaces_that_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = layer(400, 96)
    fmt = integer(4, per_group(32))
    fast = svdquant(weight, fmt, 8, moment=moment)
    monkeypatch.setattr("detent.algorithms.svdquant._EXACT", 400)
    exact = svdquant(weight, fmt, 8, moment=moment)
    assert fast is not None
    assert exact is not None
    assert fast.after <= 1.05 * exact.after


def test_singular_moment_and_low_precision() -> None:
    weight, _ = layer()
    x = torch.randn(5, 64)
    split = svdquant(weight.bfloat16(), nvfp4(), 4, moment=x.T @ x)
    assert split is not None
    assert split.a.dtype == split.b.dtype == split.rest.dtype == torch.bfloat16
    assert split.after < 0.2 * split.before  # 5 directions, 4 of them in the branch


def test_rank_is_at_most_the_smaller_side() -> None:
    weight, _ = layer(8, 16)
    split = svdquant(weight, integer(2, per_group(8)), 32)
    assert split is not None
    assert split.rank == 8
    assert split.after < 1e-8 * split.before


def test_nothing_to_gain_gives_none() -> None:
    weight = torch.randint(-7, 8, (16, 16)).float()
    weight[:, 0] = 7  # on the grid of amax / 7
    assert svdquant(weight, integer(4, per_channel(0), rule="qmax"), 2) is None
    assert svdquant(torch.zeros(4, 8), fp8(), 2) is None


def test_own_rounding_is_used() -> None:
    weight, _ = layer()
    split = svdquant(weight, integer(4), 4, quantize=torch.round)
    assert split is not None
    after = trace(weight.double() - split.b.double() @ split.a.double() - split.rest.round().double(), None)
    assert split.after == pytest.approx(after, rel=1e-3)


def test_what_is_refused() -> None:
    weight, moment = layer()
    with pytest.raises(DetentError, match=r"needs a weight \[out, in\]"):
        svdquant(torch.zeros(2, 3, 4), fp8())
    with pytest.raises(DetentError, match="at least 1"):
        svdquant(weight, fp8(), 0)
    with pytest.raises(DetentError, match="64 inputs needs a moment of the same size"):
        svdquant(weight, fp8(), moment=moment[:3, :3])
