"""Grids and rounding against ml_dtypes: every code, and every number that two neighbours enclose."""

from __future__ import annotations

import statistics
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from detent import formats as df
from detent.errors import DetentError
from detent.formats.elements import Element, Float, Integer, float_element
from formats.cases import bits

FLOATS: list[tuple[Float, Any]] = [
    (df.E4M3, ml_dtypes.float8_e4m3fn),
    (df.E5M2, ml_dtypes.float8_e5m2),
    (df.E3M2, ml_dtypes.float6_e3m2fn),
    (df.E2M3, ml_dtypes.float6_e2m3fn),
    (df.E2M1, ml_dtypes.float4_e2m1fn),
]
#: Floats without an ml_dtypes type, which configurations can name.
OTHERS: list[Element] = [df.UE5M3, Float(1, 2), Float(0, 3), Float(3, 0), Float(3, 1), Float(2, 5), df.NF4]
INTEGERS: list[Element] = [
    *(Integer(b, s) for b in range(2, 9) for s in (True, False)),
    *(Integer(b, narrow=True) for b in range(2, 9)),
]
every_float = pytest.mark.parametrize(("element", "dtype"), FLOATS, ids=lambda p: getattr(p, "name", ""))


def grid_of(element: Element) -> list[float]:
    """All values of an element, negative zero included."""
    if isinstance(element, Integer):
        return [float(i) for i in range(int(element.minimum), int(element.maximum) + 1)]
    if isinstance(element, Float):
        return [v for v in element.values() if element.minimum <= v <= element.maximum]
    return list(element.entries)


@every_float
def test_codes_mean_what_ml_dtypes_says(element: Float, dtype: Any) -> None:
    codes = np.arange(2**element.bits, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    stored = torch.from_numpy(codes[finite]).view(element.storage_dtype)
    np.testing.assert_array_equal(bits(element.decode(stored)), values[finite].view(np.uint32))
    np.testing.assert_array_equal(
        bits(element.encode(torch.from_numpy(values[finite].astype(np.float64)))), codes[finite]
    )
    assert element.maximum == values[finite].max()
    assert element.minimum == values[finite].min()
    assert element.max_exponent == int(np.floor(np.log2(element.maximum)))


@every_float
def test_rounding_equals_the_cast_of_ml_dtypes(element: Float, dtype: Any) -> None:
    """Over all bfloat16 numbers in range, the middles between neighbours, and one float32 step beside those."""
    grid = np.array(sorted({abs(v) for v in grid_of(element)}), np.float32)
    middles = (grid[1:] + grid[:-1]) / np.float32(2)
    every_bf16 = np.arange(2**15, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = np.concatenate([grid, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9), every_bf16])
    x = x[x <= element.maximum].astype(np.float32)
    x = np.concatenate([x, -x])
    got = element.nearest(torch.from_numpy(x.astype(np.float64))).to(torch.float32)
    np.testing.assert_array_equal(bits(got), x.astype(dtype).astype(np.float32).view(np.uint32))
    top = torch.tensor([element.maximum * 1.01, 1e300, -1e300], dtype=torch.float64)
    assert element.nearest(top).tolist() == [element.maximum, element.maximum, -element.maximum]


@pytest.mark.parametrize("element", [*(e for e, _ in FLOATS), *OTHERS, *INTEGERS], ids=lambda e: e.name)
def test_grid_values_stay_and_middles_go_to_a_neighbour(element: Element) -> None:
    grid = torch.tensor(grid_of(element), dtype=torch.float64)
    assert torch.equal(bits_of(element.nearest(grid)), bits_of(grid))
    assert torch.equal(bits_of(element.decode(element.encode(grid)).double()), bits_of(grid))
    ascending = grid.unique()
    assert len(ascending) >= 2 ** (element.bits - 1)
    below, above = ascending[:-1], ascending[1:]
    middle = (below + above) / 2
    assert torch.equal(element.nearest(torch.nextafter(middle, below)), below)
    assert torch.equal(element.nearest(torch.nextafter(middle, above)), above)
    tie = element.nearest(middle)
    assert ((tie == below) | (tie == above)).all()
    if not (isinstance(element, Float) and element.mantissa_bits == 0):
        assert (element.encode(tie).view(torch.uint8) % 2 == 0).all(), "a tie goes to the even code"


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int64)


def test_float_without_mantissa_rounds_ties_up() -> None:
    """IEEE 754-2019 4.3.1: with one digit both neighbours of a tie are odd, and the larger magnitude is taken."""
    element = float_element(3, 0)
    assert element.nearest(torch.tensor([1.5, 3.0, -6.0, 0.125], dtype=torch.float64)).tolist() == [2.0, 4.0, -8.0, 0.0]


def test_nf4_entries_are_the_quantiles_of_its_paper() -> None:
    """QLoRA's construction: 8 and 9 quantiles of the two halves, an exact zero, scaled to [-1, 1]."""
    quantile, offset = statistics.NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    np.testing.assert_allclose(df.NF4.entries, expected, atol=2e-6)
    assert all(np.float32(v) == v for v in df.NF4.entries)


def test_impossible_elements_are_refused() -> None:
    for bits_ in (1, 9, 0, -1):
        with pytest.raises(DetentError, match="2 to 8 bits"):
            Integer(bits_)
    with pytest.raises(DetentError, match="narrow"):
        Integer(8, signed=False, narrow=True)
    for e, m in [(0, 0), (-1, 3), (4, 4), (8, 0), (5, 3)]:
        with pytest.raises(DetentError, match="float element"):
            Float(e, m)
    assert Float(5, 3, signed=False).bits == 8
