"""What may come from a file: everything that `encode` writes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from detent import formats as f
from detent.errors import DetentError
from detent.formats import Format, QTensor, Scales, encode
from detent.formats.stored import check_codes, check_scales, check_stored

FORMATS = [
    f.integer(4, f.per_group(32)),
    f.integer(4, f.per_group(32), signed=False),
    f.integer(3, f.per_channel(0), symmetric=False),
    f.integer(8, f.per_tensor(), symmetric=False, float_zero_point=True),
    f.fp8(),
    f.fp8("e5m2", f.per_channel(0)),
    f.nf4(),
    f.nvfp4(),
    f.nvfp4(four_over_six=True),
    f.mx("e2m1"),
    f.mx("int8"),
    f.bfp16(),
    f.micro_exponent(6),
    f.progressive(),
]
EXTREMES = [1.0, 0.0, 1e-38, 3e38]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("size", EXTREMES)
def test_whatever_is_written_may_be_read(fmt: Format, size: float) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
    q = encode(x, fmt)
    assert check_stored(q, "w") is q


FMT = f.integer(4, f.per_group(32), symmetric=False)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["scale", "outer_scale"])
def test_scales(value: float, field: str) -> None:
    fmt = f.progressive()
    good = encode(torch.randn(4, 64), fmt)
    bad = getattr(good, field).clone()
    bad.view(-1)[-1] = value
    with pytest.raises(DetentError, match="m.q: (outer )?scales from .* positive and finite"):
        check_scales(fmt, Scales(**{**vars(good.scales), field: bad}), "m.q")


def test_a_weights_scales_may_be_negative_where_algorithms_choose_so() -> None:
    """Integers with one code more below zero than above; nobody else's scales, and no activation's."""
    turned = encode(torch.randn(4, 64), f.integer(4, f.per_group(32)))
    turned.scale.neg_()
    assert check_stored(turned, "w") is turned
    with pytest.raises(DetentError, match="positive and finite"):
        check_scales(turned.format, turned.scales, "m.q")
    fp8 = encode(torch.randn(4, 64), f.fp8())
    with pytest.raises(DetentError, match="positive and finite"):
        check_scales(fp8.format, Scales(-fp8.scale), "m.q", of_weight=True)


@pytest.mark.parametrize("value", [-9, 8, 1 << 30])
def test_zero_points(value: int) -> None:
    good = encode(torch.randn(4, 64), FMT)
    assert good.zero_point is not None
    with pytest.raises(DetentError, match="zero points from .*int4 takes -8 to 7"):
        check_scales(FMT, Scales(good.scale, good.zero_point.fill_(value)), "m.q")


def test_exponents() -> None:
    bad = torch.tensor([[1, 255]], dtype=torch.uint8)
    with pytest.raises(DetentError, match="byte 255"):
        check_scales(f.mx("e2m1"), Scales(bad), "m.q")
    check_scales(f.bfp16(), Scales(bad), "m.q")  # 2^128, which its rule can give


@pytest.mark.parametrize(
    ("fmt", "code"),
    [(FMT, 8), (FMT, -9), (f.nf4(), 16), (f.fp8(), 0x7F), (f.fp8(), -1), (f.fp8("e5m2"), 0x7C), (f.fp8("e5m2"), 0x7E)],
    ids=str,
)
def test_codes(fmt: Format, code: int) -> None:
    codes = torch.zeros(2, 64, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(DetentError, match=r"m\.q: "):
        check_codes(fmt, codes.view(fmt.element.storage_dtype), "m.q")
    check_codes(fmt, torch.zeros(0, dtype=fmt.element.storage_dtype), "m.q")


def test_shapes_and_dtypes() -> None:
    q = encode(torch.randn(4, 64), FMT)
    for change in (
        {"scale": q.scale.half()},
        {"scale": q.scale[:3]},
        {"zero_point": None},
        {"codes": q.codes[:, :63]},
        {"outer_scale": torch.ones(())},
        {"shape": (4, 32)},
    ):
        with pytest.raises(DetentError, match=r"m\.q: "):
            check_stored(QTensor(**{**vars(q), **change}), "m.q")
