"""The list of schemes with what each costs and which checkpoint format holds it."""

from __future__ import annotations

from typing import Any

import torch

from detent.config import all_schemes, parse_scheme
from detent.plan.plan import with_scale_dtype
from detent.report.formats import SHAPE, held_by


def scheme_rows() -> list[dict[str, Any]]:
    """One dictionary a scheme: ``name``, ``aliases``, ``weight`` and ``activations`` (formats in words),
    ``bits_per_weight``, and ``held_by``: the checkpoint formats that can hold it, the one that is written first.
    """
    rows = []
    for name in all_schemes():
        scheme = with_scale_dtype(parse_scheme(name), torch.bfloat16)
        weight = scheme.weight
        quantizes = weight is not None or scheme.input is not None
        held = [name for name, found in held_by(scheme).items() if "engines" in found] if quantizes else []
        rows.append(
            {
                "name": name,
                "aliases": list(scheme.aliases),
                "weight": None if weight is None else str(weight),
                "activations": "; ".join(str(f) for f in (scheme.input, scheme.output) if f is not None),
                "bits_per_weight": None if weight is None else weight.bits_per_element(SHAPE),
                "held_by": held,
            }
        )
    return rows
