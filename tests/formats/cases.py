"""What the format tests run over: every family beside its definition in `oracle`, and inputs that try to break them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detent import formats as df
from detent.formats import Format, Granularity, QTensor
from formats import oracle
from formats.oracle import GRIDS, Spec, integers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A family: Detent's format for a granularity, and its definition. `block`: its own block length, if it has one."""

    name: str
    make: Callable[[Granularity], Format]
    spec: Spec
    block: int | None = None

    def native(self) -> tuple[Format, Callable[[tuple[int, ...]], tuple[int, ...]]]:
        """The format with its usual granularity, and the tile shape that belongs to it."""
        if self.block is None:
            return self.make(df.per_channel(0)), lambda shape: (1, *shape[1:])
        return self.make(df.per_group(self.block)), per_group_lengths(self.block)


def per_group_lengths(size: int) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    return lambda shape: (*(1 for _ in shape[:-1]), size)


def _integer(bits: int, *, scale_dtype: Any = "float32", **options: Any) -> Case:
    signed, narrow = options.get("signed", True), options.get("narrow", False)
    grid = integers(bits, signed, narrow)
    symmetric, rule = options.get("symmetric", True), options.get("rule", "half_range")
    kind = "symmetric" if signed else "midpoint"
    if not symmetric:
        kind = "float" if options.get("float_zero_point") else "int"
    half = 2 ** (bits - 1)
    divisor = half - 1 if rule == "qmax" or narrow else half - 0.5
    name = f"{'int' if signed else 'uint'}{bits}" + "".join(
        f"_{key}" if value is True else f"_{value}" if isinstance(value, str) else f"_not_{key}"
        for key, value in options.items()
        if key != "signed"
    )
    name += "" if scale_dtype == "float32" else f"_{scale_dtype}"
    return Case(
        name,
        lambda g: df.integer(bits, g, **options).with_scale_dtype(scale_dtype),
        Spec(grid, kind, divisor, scale_dtype),
    )


def _float(kind: str, scale_dtype: Any = "float32") -> Case:
    def make(granularity: Granularity) -> Format:
        return df.small_float(kind, granularity, scale_dtype=scale_dtype)

    grid = GRIDS[kind]
    return Case(f"{kind}_{scale_dtype}", make, Spec(grid, "symmetric", grid.largest, scale_dtype))


def _mx(kind: str, rule: Any) -> Case:
    spec = (
        Spec(integers(8, narrow=True), "mx", rule=rule, unit=-6)
        if kind == "int8"
        else Spec(GRIDS[kind], "mx", rule=rule)
    )
    return Case(f"mx_{kind}_{rule}", lambda g: df.mx(kind, rounding=rule).with_granularity(g), spec, 32)


def _micro(bits: int, mantissa: int) -> Case:
    spec = Spec(integers(mantissa + 1, narrow=True), "micro", mantissa=mantissa)
    return Case(f"mx{bits}", lambda g: df.micro_exponent(bits).with_granularity(g), spec, 16)


def _two_stage(four_over_six: bool) -> Case:
    targets, largest = ((6.0, 4.0), 256.0) if four_over_six else ((6.0,), 448.0)
    spec = Spec(GRIDS["e2m1"], "two_stage", targets=targets, largest_scale=largest)
    name = "nvfp4_four_over_six" if four_over_six else "nvfp4"
    return Case(name, lambda g: df.nvfp4(four_over_six=four_over_six).with_granularity(g), spec, 16)


def _progressive(bits: int) -> Case:
    base = Spec(GRIDS["e4m3"], "symmetric", 448.0)
    spec = Spec(integers(bits), "symmetric", 2 ** (bits - 1) - 0.5, base=base)
    return Case(f"progressive{bits}", lambda g: df.progressive(bits).with_granularity(g), spec)


CASES = [
    *(_integer(bits) for bits in range(2, 9)),
    *(_integer(bits, signed=False) for bits in range(2, 9)),
    *(_integer(bits, rule="qmax") for bits in (2, 4, 8)),
    *(_integer(bits, signed=False, rule="qmax") for bits in (2, 4, 8)),
    *(_integer(bits, narrow=True) for bits in (2, 4, 8)),
    *(_integer(bits, signed=signed, symmetric=False) for bits in range(2, 9) for signed in (True, False)),
    _integer(4, symmetric=False, narrow=True),
    *(_integer(bits, signed=s, symmetric=False, float_zero_point=True) for bits in (2, 4, 8) for s in (True, False)),
    _integer(4, scale_dtype="bfloat16"),
    _integer(4, scale_dtype="float16"),
    _integer(4, signed=False, symmetric=False, scale_dtype="bfloat16"),
    _integer(4, signed=False, symmetric=False, scale_dtype="float16"),
    _integer(4, signed=False, symmetric=False, float_zero_point=True, scale_dtype="bfloat16"),
    *(_float(kind) for kind in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")),
    _float("e2m1", "e4m3"),
    _float("e3m2", "bfloat16"),
    Case("nf4", lambda g: df.nf4(g), Spec(GRIDS["nf4"], "symmetric", 1.0), 64),
    *(_mx(k, r) for k in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8") for r in ("even", "floor", "ceil", "fit")),
    _two_stage(False),
    _two_stage(True),
    Case("bfp16", lambda g: df.bfp16().with_granularity(g), Spec(integers(8), "bfp"), 8),
    _micro(4, 2),
    _micro(6, 4),
    _micro(9, 7),
    _progressive(4),
    _progressive(3),
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)

#: (name, granularity, shape, tile lengths): last groups that are short, blocks that don't divide, every rank and axis.
GRANULARITIES: list[tuple[str, Granularity, tuple[int, ...], tuple[int, ...]]] = [
    ("tensor-0d", df.per_tensor(), (), ()),
    ("tensor-1d", df.per_tensor(), (17,), (17,)),
    ("tensor-3d", df.per_tensor(), (3, 4, 5), (3, 4, 5)),
    ("channel0", df.per_channel(0), (5, 14), (1, 14)),
    ("channel1", df.per_channel(1), (5, 14), (5, 1)),
    ("channel-1", df.per_channel(-1), (3, 4, 6), (3, 4, 1)),
    ("channel1of4", df.per_channel(1), (2, 3, 4, 5), (2, 1, 4, 5)),
    ("channel0and2", df.per_channel(0, 2), (3, 4, 5), (1, 4, 1)),
    ("channel-1d", df.per_channel(0), (6,), (1,)),
    ("group1", df.per_group(1), (2, 5), (1, 1)),
    ("group16", df.per_group(16), (4, 48), (1, 16)),
    ("group16-short", df.per_group(16), (3, 37), (1, 16)),
    ("group16-tiny", df.per_group(16), (3, 5), (1, 16)),
    ("group6-3d", df.per_group(6), (2, 3, 13), (1, 1, 6)),
    ("group-1d", df.per_group(4), (10,), (4,)),
    ("block2d", df.per_block({0: 4, 1: 6}), (9, 13), (4, 6)),
    ("block2d-last", df.per_block({-2: 2, -1: 3}), (3, 5, 7), (1, 2, 3)),
    ("block-axis0", df.per_block({0: 3}), (7, 4), (3, 1)),
    ("block-whole", df.per_block({0: 2, 1: None}), (5, 6), (2, 6)),
    ("token-1d", df.per_token(), (9,), (9,)),
    ("token-2d", df.per_token(), (4, 9), (1, 9)),
    ("token-3d", df.per_token(), (2, 3, 7), (1, 1, 7)),
    ("token-4d", df.per_token(), (2, 2, 3, 5), (1, 1, 1, 5)),
]


def bits(x: Tensor) -> np.ndarray:
    """The bit patterns of a tensor, so that a comparison sees the sign of zero."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.element_size()]
    return x.detach().cpu().contiguous().view(width).numpy().view(unsigned)


def widened(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def adversarial(case: Case, dtype: str) -> dict[str, Tensor]:
    """Tensors [rows, 40] by name. Rows differ in magnitude, so that every block of a row meets the same trouble."""
    kind, info = DTYPES[dtype], torch.finfo(DTYPES[dtype])
    generator = np.random.default_rng(7)
    n = 40

    def tensor(values: Any) -> Tensor:
        wide = torch.from_numpy(np.asarray(values, np.float64)).clamp(-info.max, info.max)
        return wide.to(torch.float32).to(kind)

    def neighbours(x: Tensor) -> Tensor:
        """Each value, and the next number of its dtype below and above."""
        up = torch.nextafter(x, torch.full_like(x, info.max))
        down = torch.nextafter(x, torch.full_like(x, -info.max))
        return torch.cat([x, up, down])

    sign = generator.choice([-1.0, 1.0], size=(12, n))
    # The exponents of the dtype, from the middle of its subnormals to the top.
    lowest, highest = np.log2(float(info.smallest_normal)) - 6, np.log2(float(info.max))
    magnitudes = 2.0 ** generator.uniform(lowest, highest, size=(12, n))
    rows_of_scale = 2.0 ** np.linspace(lowest, highest - 2, 12)[:, None]
    subnormal = float(info.smallest_normal) * 2.0**-6
    # Values just between two codes under a scale that is a power of two; the largest fixes the scale.
    table = np.array(case.spec.grid.values)
    middles = (table[1:] + table[:-1]) / 2
    chosen = generator.choice(middles, size=(6, n)) * generator.choice([-1.0, 1.0], size=(6, n))
    top = case.spec.divisor if case.spec.kind in ("symmetric", "midpoint") else case.spec.grid.largest
    chosen[:, ::8] = top
    ties = chosen * 2.0 ** np.array([[0], [-3], [5], [-9], [1], [-1]])
    # The largest magnitudes at which a power-of-two exponent moves, one to a row.
    edges = [1.0, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.99609375, 127 / 64, 127.5 / 64, 7 / 4]
    rows = neighbours(tensor([*edges, *(-e for e in edges)]))
    thresholds = tensor(generator.uniform(-0.9, 0.9, size=(len(rows), n)))
    thresholds[:, ::8] = rows[:, None]
    outlier = generator.normal(size=(3, n))
    outlier[1, 17] = 3e4
    return {
        "ties": tensor(ties),
        "near ties": neighbours(tensor(ties)),
        "thresholds": thresholds,
        "any exponent": tensor(sign * magnitudes),
        "row by row": tensor(generator.normal(size=(12, n)) * rows_of_scale),
        "zeros": torch.zeros(2, n, dtype=kind),
        "negative zeros": -torch.zeros(2, n, dtype=kind),
        "both zeros and a one": tensor(np.where(np.arange(2 * n).reshape(2, n) % 11 == 0, 1.0, sign[:2] * 0.0)),
        "subnormals": tensor(generator.integers(-64, 64, size=(4, n)) * subnormal),
        "few subnormals": tensor(generator.integers(-2, 3, size=(4, n)) * float(info.smallest_normal) * info.eps),
        "huge": tensor(sign[:4] * float(info.max) * generator.uniform(0.2, 1.0, size=(4, n))),
        "largest": tensor(sign[:2] * float(info.max)),
        "outlier": tensor(outlier),
        "constant": tensor(np.full((2, n), 0.7)),
        "negative constant": tensor(np.full((2, n), -1e-3)),
        "far from zero": tensor(generator.uniform(100, 101, size=(2, n))),
        "one element": tensor([[0.3]]),
    }


def assert_equals_definition(x: Tensor, fmt: Format, spec: Spec, lengths: tuple[int, ...], what: str) -> None:
    """Scales, codes, decoded and simulated values of `x`, bit for bit; and that codes survive the way out and back."""
    dtype = {v: k for k, v in DTYPES.items()}[x.dtype]
    if x.dim() == 0:
        expected = oracle.quantize(widened(x).reshape(1), spec, (1,))
    else:
        expected = oracle.quantize(widened(x), spec, lengths)
    q = df.encode(x, fmt)

    def same(name: str, got: np.ndarray, want: np.ndarray) -> None:
        np.testing.assert_array_equal(got, want.reshape(got.shape), err_msg=f"{what}: {name}")

    if isinstance(fmt.scale, df.PowerOfTwoScale):
        same("scale", q.scale.numpy().astype(np.int64), expected.scale.astype(np.int64))
    else:
        same("scale", q.scale.to(torch.float64).numpy(), expected.scale)
    if expected.outer is not None:
        assert q.outer_scale is not None
        same("outer scale", q.outer_scale.numpy(), np.asarray(expected.outer))
    if expected.zero_point is not None:
        assert q.zero_point is not None
        same("zero point", q.zero_point.double().numpy(), expected.zero_point)
    if expected.micro is not None:
        assert q.micro is not None
        same("micro-exponents", q.micro.long().numpy(), expected.micro)
    codes = q.codes if q.codes.dtype in (torch.int8, torch.uint8) else q.codes.view(torch.uint8)
    same("codes", codes.long().numpy(), expected.codes)
    for out in DTYPES:
        same(f"decoded to {out}", bits(df.decode(q, DTYPES[out])), oracle.cast(expected.values, out))
    same("simulated", bits(df.fake_quantize(x, fmt)), oracle.cast(expected.values, dtype))
    same("simulated with its own scales", bits(df.fake_quantize(x, fmt, q.scales)), oracle.cast(expected.values, dtype))
    # A float zero point far from zero leaves too few bits of (code - zero point) to find the code again.
    far = fmt.zero_point == "float" and bool(
        (expected.zero_point is not None) and (abs(expected.zero_point) > 2**20).any()
    )
    if fmt.base is None and not far:
        assert_same_codes(df.encode(df.decode(q), fmt, q.scales), q, what)


def assert_same_codes(a: QTensor, b: QTensor, what: str) -> None:
    assert a.format == b.format
    assert a.shape == b.shape
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        np.testing.assert_array_equal(bits(value), bits(theirs[name]), err_msg=f"{what}: {name}")
