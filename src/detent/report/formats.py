"""Which checkpoint format holds which scheme, and which engine loads it then, with what."""

from __future__ import annotations

from typing import Any

import torch

from detent.checkpoints import LayerFormats, ModelFormats, layouts
from detent.checkpoints.records import exported_format
from detent.config import Scheme, all_schemes, parse_scheme
from detent.errors import DetentError
from detent.plan.plan import with_scale_dtype

#: The weight of the layer that formats are asked about.
SHAPE = (4096, 4096)
_LAYER = "model.layers.0.mlp.up_proj"


def format_rows(name: str | None = None) -> list[dict[str, Any]]:
    """One dictionary a scheme: ``scheme``, and ``formats``: for each checkpoint format either ``engines``, what each of
    them needs ("" for nothing more), or the ``reason`` why it can't hold the scheme.

    Args:
        name: of one scheme, in any spelling; None for all.

    Raises:
        DetentError: an unknown scheme.
    """
    names = all_schemes() if name is None else [name]
    if name is not None and parse_scheme(name) == parse_scheme("no_quant"):
        raise DetentError(f"scheme {name!r} quantizes nothing, so every float checkpoint holds it")
    schemes = [with_scale_dtype(parse_scheme(each), torch.bfloat16) for each in names]
    return [{"scheme": s.name, "formats": held_by(s)} for s in schemes if s.weight is not None or s.input is not None]


def held_by(scheme: Scheme) -> dict[str, dict[str, Any]]:
    """{name of a checkpoint format: as in `format_rows`} of a scheme whose scales have the dtype of a model."""
    found: dict[str, dict[str, Any]] = {}
    for layout in layouts.values():
        stored = layout.adapt(scheme)
        input_, output = (None if f is None else exported_format(f) for f in (stored.input, stored.output))
        formats = ModelFormats({_LAYER: LayerFormats(SHAPE, stored.weight, input_, output)})
        reason = layout.can_hold(formats)
        reason = None if reason is None else reason.replace(_LAYER, "it")
        found[layout.name] = {"engines": layout.needs(formats)} if reason is None else {"reason": reason}
    return found
