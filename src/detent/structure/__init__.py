"""What a model's structure says about quantizing it: found by running it, not listed per model."""

from detent.structure.discovery import find_structure
from detent.structure.site import (
    Fold,
    Mixture,
    Norm,
    Reader,
    Site,
    Stream,
    Structure,
    fold_scale,
    scale_columns,
    tie_scale,
    weight_parameter,
)

__all__ = [
    "Fold",
    "Mixture",
    "Norm",
    "Reader",
    "Site",
    "Stream",
    "Structure",
    "find_structure",
    "fold_scale",
    "scale_columns",
    "tie_scale",
    "weight_parameter",
]
