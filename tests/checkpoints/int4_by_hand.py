"""Integer weights as AutoAWQ, GPTQ and MLX store them, packed and unpacked with Python's own integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints.quantized_by_hand import Stored

#: The column of which the i-th four bits of a word of AutoAWQ are.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Sequence[int], bits: int) -> list[int]:
    """One long number, lowest code first, in pieces of 32 bits."""
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


def codes_of(line: Sequence[int], bits: int, count: int) -> list[int]:
    """The inverse of `words`, of int32 numbers."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(line))
    return [(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


def packed(codes: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Each row as words."""
    rows = [words(row, bits) for row in codes.tolist()]
    signed = [[word - (1 << 32) if dtype == torch.int32 and word >> 31 else word for word in row] for row in rows]
    return torch.tensor(signed, dtype=dtype)


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    return torch.tensor([codes_of(row, bits, count) for row in stored.tolist()], dtype=torch.float64)


def _reordered(codes: Tensor, order: Sequence[int]) -> Tensor:
    return codes[:, [8 * (n // 8) + order[n % 8] for n in range(codes.shape[1])]]


def awq_values(tensors: dict[str, Tensor], module: str, group: int) -> Tensor:
    """What AutoAWQ's tensors of a layer stand for, float64 [out, in]."""
    back = [AWQ_ORDER.index(n) for n in range(8)]
    qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"].double()
    rows, out = scales.shape
    codes = _reordered(unpacked(qweight, 4, out), back)
    zeros = _reordered(unpacked(tensors[f"{module}.qzeros"], 4, out), back)
    at = torch.arange(len(qweight)) // (group if group > 0 else len(qweight))
    assert int(at[-1]) == rows - 1
    return ((codes - zeros[at]) * scales[at]).T


def gptq_values(tensors: dict[str, Tensor], module: str, bits: int, less_one: bool) -> Tensor:
    """What GPTQ's tensors of a layer stand for, float64 [out, in]."""
    scales, at = tensors[f"{module}.scales"].double(), tensors[f"{module}.g_idx"].long()
    codes = unpacked(tensors[f"{module}.qweight"].T, bits, len(at)).T
    zeros = unpacked(tensors[f"{module}.qzeros"], bits, scales.shape[1]) + int(less_one)
    return ((codes - zeros[at]) * scales[at]).T


def random_codes(out: int, width: int, groups: int, bits: int, *, symmetric: bool = False) -> tuple[Tensor, ...]:
    """(codes [in, out], zero points [groups, out], scales [groups, out])."""
    codes, zeros = (torch.randint(0, 1 << bits, (n, out)) for n in (width, groups))
    if symmetric:
        zeros = torch.full((groups, out), 1 << (bits - 1))
    return codes, zeros, (torch.rand(groups, out) * 0.05 + 0.01).half()


def awq(name: str, out: int, width: int, group: int, *, symmetric: bool = False) -> Stored:
    module, groups = name.removesuffix(".weight"), width // group
    codes, zeros, scales = random_codes(out, width, groups, 4, symmetric=symmetric)
    stored = {
        f"{module}.qweight": packed(_reordered(codes, AWQ_ORDER), 4),
        f"{module}.qzeros": packed(_reordered(zeros, AWQ_ORDER), 4),
        f"{module}.scales": scales,
    }
    at = torch.arange(width) // group
    return stored, ((codes - zeros[at]).double() * scales.double()[at]).T.contiguous()


def gptq(
    name: str,
    out: int,
    width: int,
    group: int,
    bits: int,
    *,
    less_one: bool = True,
    symmetric: bool = False,
    order: Tensor | None = None,
    index: bool = True,
) -> Stored:
    """`order`: the group of each column; `index`: whether it is stored."""
    module = name.removesuffix(".weight")
    at = torch.arange(width) // group if order is None else order
    codes, zeros, scales = random_codes(out, width, int(at.max()) + 1, bits, symmetric=symmetric)
    stored = {
        f"{module}.qweight": packed(codes.T, bits).T.contiguous(),
        f"{module}.qzeros": packed((zeros - int(less_one)) % (1 << bits), bits),
        f"{module}.scales": scales,
    }
    if index:
        stored[f"{module}.g_idx"] = at.to(torch.int32)
    return stored, ((codes - zeros[at]).double() * scales.double()[at]).T.contiguous()


def mlx_values(tensors: dict[str, Tensor], module: str, bits: int, group: int) -> Tensor:
    """What MLX's tensors of a layer stand for, float64 [out, in]."""
    scales, biases = (tensors[f"{module}.{part}"].double() for part in ("scales", "biases"))
    codes = unpacked(tensors[f"{module}.weight"].to(torch.int64), bits, scales.shape[1] * group)
    return codes * scales.repeat_interleave(group, 1) + biases.repeat_interleave(group, 1)


def mlx(name: str, out: int, width: int, group: int, bits: int, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """Scales and biases of either sign."""
    module, groups = name.removesuffix(".weight"), width // group
    stored = {
        f"{module}.weight": packed(torch.randint(0, 1 << bits, (out, width)), bits, torch.uint32),
        f"{module}.scales": (torch.randn(out, groups) * 0.02).to(dtype),
        f"{module}.biases": torch.randn(out, groups).to(dtype),
    }
    return stored, mlx_values(stored, module, bits, group)
