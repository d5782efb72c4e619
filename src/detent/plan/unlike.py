"""Layers that engines join into one matrix, or run as one, and so need in one format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from detent.checkpoints import LayerFormats
from detent.errors import DetentError
from detent.structure import Structure


def check_fused(structure: Structure, layers: Mapping[str, LayerFormats], linears: Iterable[str]) -> None:
    """Refuse different formats, or formats and floating point, among layers that engines fuse.

    Args:
        structure: of the model.
        layers: the formats of those that are quantized, by module name.
        linears: names of all linear layers.

    Raises:
        DetentError: query, key and value; gate and up; or the experts of a mixture differ.
    """
    fates = {name: _fate(layers.get(name)) for name in linears}
    for group in [*structure.fused_groups, *(mixture.weights for mixture in structure.mixtures)]:
        known = [name for name in group if name in fates]
        other = next((name for name in known if fates[name] != fates[known[0]]), None)
        if other is not None:
            raise DetentError(
                f"engines run {', '.join(known[:3])}{', ...' * (len(known) > 3)} as one, which needs one format, but"
                f" {known[0]} is {_say(fates[known[0]])} and {other} is {_say(fates[other])}; treat them alike, or"
                " allow layers that engines can't fuse"
            )


def _fate(formats: LayerFormats | None) -> LayerFormats | None:
    """The formats without the shape, in which fused layers may differ."""
    return None if formats is None else replace(formats, shape=())


def _say(fate: LayerFormats | None) -> str:
    if fate is None:
        return "left in floating point"
    parts = [f"{side} {fmt}" for side in ("weight", "input", "output") if (fmt := getattr(fate, side)) is not None]
    return ", ".join(parts)
