"""A weight held in memory as densely packed codes and their scales.

Invariant: ``unpack_codes(pack_codes(q), ...) == q``, bit for bit; int4 codes take four bits, MX6 codes five and their
micro-exponents one for every two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from detent.formats import Format, QTensor
from detent.formats.packing import pack, unpack
from detent.formats.stored import stored_layout


def pack_codes(q: QTensor) -> dict[str, Tensor]:
    """The tensors of `q` by field name; codes of less than 8 bits as uint8 [rows, bytes], rows being the first axis."""
    tensors = {name: tensor.contiguous() for name, tensor in q.tensors().items()}
    if q.format.bits < 8:
        tensors["codes"] = pack(_rows(q.codes), q.format.bits)
    if q.micro is not None:
        tensors["micro"] = pack(_rows(q.micro), 1)
    return tensors


def packed_layout(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor that `pack_codes` makes of a weight of this format and shape."""
    layout = stored_layout(fmt, shape)
    for name, bits in (("codes", fmt.bits), ("micro", 1)):
        if name in layout and bits < 8:
            whole = layout[name][0]
            layout[name] = ((whole[0], -(-math.prod(whole[1:]) * bits // 8)), torch.uint8)
    return layout


def unpack_codes(tensors: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
    """The inverse of `pack_codes`."""
    fields: dict[str, Any] = dict(tensors)
    if fmt.bits < 8:
        n = math.prod(shape[1:])
        fields["codes"] = unpack(fields["codes"], fmt.bits, n, fmt.element.storage_dtype).reshape(shape)
    if "micro" in fields:
        run = getattr(fmt.scale, "micro", 1)
        runs = (*shape[:-1], -(-shape[-1] // run))
        fields["micro"] = unpack(fields["micro"], 1, math.prod(runs[1:]), torch.uint8).reshape(runs)
    return QTensor(fmt, shape, **fields)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
