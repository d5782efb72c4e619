"""Hadamard matrices in integers, and the transform against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch

from detent.errors import DetentError
from detent.nn.hadamard import hadamard_transform, random_signs, rotation_block
from detent.nn.hadamard_matrices import first_column, hadamard_factors, hadamard_matrix, largest_block

#: Multiples of 4 whose Hadamard matrices are known to mathematics, but need other constructions.
NOT_REACHED = {188, 236, 268, 324, 356, 376, 404, 412, 428, 436, 452, 472}


@pytest.mark.parametrize("order", [1, 2, *range(4, 500, 4), 1372 + 4, 172 * 8, 752])
def test_rows_are_orthogonal_in_integers(order: int) -> None:
    if order in NOT_REACHED:
        assert hadamard_factors(order) is None
        return
    h = hadamard_matrix(order)
    assert h.dtype == torch.int8
    assert bool((h.abs() == 1).all())
    exact = h.double() @ h.double().T  # sums of up to 1376 ones are exact
    assert torch.equal(exact, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172])
@pytest.mark.parametrize("twos", [1, 8, 64])
def test_orders_that_others_tabulate_are_there(order: int, twos: int) -> None:
    factors = hadamard_factors(order * twos)
    assert factors is not None
    assert torch.tensor(factors).prod() == order * twos
    assert sum(factors) <= order + 64


@pytest.mark.parametrize("order", [1, 8, 12, 172, 344, 960])
def test_first_column(order: int) -> None:
    assert torch.equal(first_column(order), hadamard_matrix(order)[:, 0])


def test_powers_of_two_are_sylvesters() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    for order in (1, 2, 8, 256):
        assert torch.equal(hadamard_matrix(order).long(), torch.tensor(scipy_linalg.hadamard(order)).long())


@pytest.mark.parametrize(
    ("width", "block"), [(64, 64), (172, 172), (11008, 11008), (344, 344), (86, 2), (6, 2), (94, 2)]
)
def test_largest_block(width: int, block: int) -> None:
    assert largest_block(width) == rotation_block(width) == block
    assert width % block == 0
    assert hadamard_factors(block) is not None


def test_largest_block_beats_every_other_divisor() -> None:
    for width in (188, 1128, 3760, 4 * 59 * 3):
        divisors = [d for d in range(1, width + 1) if width % d == 0 and hadamard_factors(d) is not None]
        assert largest_block(width) == max(divisors)


@pytest.mark.parametrize(
    ("width", "block"), [(8, None), (172, None), (344, None), (960, None), (64, 16), (60, 20), (188, None)]
)
def test_transform_is_the_dense_matrix(width: int, block: int | None) -> None:
    size = rotation_block(width, block)
    dense = torch.block_diag(*([hadamard_matrix(size).double() / size**0.5] * (width // size)))
    x = torch.randn(2, 3, width, dtype=torch.float64)
    y = hadamard_transform(x, block)
    torch.testing.assert_close(y, x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(y, block, inverse=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5, 688).to(dtype)
    exact = (x.double() @ hadamard_matrix(688).double() / 688**0.5).to(torch.float32)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=4e-6)


def test_gradient_is_the_inverse_transform() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    with torch.inference_mode():
        hadamard_transform(torch.randn(4, 12))
    g = torch.randn(4, 12)
    hadamard_transform(x).backward(g)
    torch.testing.assert_close(x.grad, hadamard_transform(g, inverse=True))


@pytest.mark.parametrize(
    ("width", "block", "words"),
    [
        (7, None, "no Hadamard matrix exists for a width of 7"),
        (1, None, "cannot be rotated"),
        (64, 48, "doesn't divide it; the largest block that can be used is 64"),
        (64, 0, "doesn't divide it"),
        (188, 188, "has no Hadamard matrix; the largest block that can be used is 4"),
        (12, 6, "has no Hadamard matrix"),
    ],
)
def test_refused_widths(width: int, block: int | None, words: str) -> None:
    with pytest.raises(DetentError, match=words):
        hadamard_transform(torch.randn(2, width), block)


def test_matrix_without_construction_is_refused() -> None:
    with pytest.raises(DetentError, match="order 188 is known to Detent; the largest for blocks of it has order 4"):
        hadamard_matrix(188)
    with pytest.raises(DetentError, match="positive order"):
        hadamard_factors(0)


def test_random_signs_repeat() -> None:
    signs = random_signs(1000, 3)
    assert set(signs.tolist()) == {1.0, -1.0}
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))
    assert abs(float(signs.mean())) < 0.15
