"""The list of schemes with what each costs and which checkpoint format holds it."""

from __future__ import annotations

from typing import Any

import torch

from detent.checkpoints import LayerFormats, ModelFormats, layouts
from detent.checkpoints.records import exported_format
from detent.config import all_schemes, parse_scheme
from detent.plan.plan import with_scale_dtype

#: The weight that bits are counted for.
SHAPE = (4096, 4096)


def scheme_rows() -> list[dict[str, Any]]:
    """One dictionary a scheme: ``name``, ``aliases``, ``weight`` and ``activations`` (formats in words),
    ``bits_per_weight``, and ``held_by``: the checkpoint formats that can hold it, the one that is written first.
    """
    rows = []
    for name in all_schemes():
        scheme = with_scale_dtype(parse_scheme(name), torch.bfloat16)
        weight = scheme.weight
        input_, output = (None if f is None else exported_format(f) for f in (scheme.input, scheme.output))
        held = []
        if weight is not None or input_ is not None:
            formats = ModelFormats({"model.layers.0.mlp.up_proj": LayerFormats(SHAPE, weight, input_, output)})
            held = [layout.name for layout in layouts.values() if layout.can_hold(formats) is None]
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
