"""The structure of a checkpoint's model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from detent.external.mistakes import as_detent_error, first_line
from detent.nn.experts_layout import take_experts_apart
from detent.pretrained.loading import load_config, model_on_meta, resolve_folder
from detent.structure import Structure, find_structure


def structure_of_folder(
    folder: str, *, trust_remote_code: bool = False, overrides: str | Path | None = None
) -> tuple[str, Structure]:
    """The class name of the model that a folder's config.json describes, and its structure. Reads no weights.

    Args:
        folder: in Hugging Face layout, or the name of a model on the hub.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        overrides: a JSON file, as for `find_structure`.

    Raises:
        DetentError: there is no config.json, its architecture is unknown, or its model can't be run without inputs that
            only its user knows.
    """
    path = resolve_folder(folder)
    config = load_config(path, trust_remote_code=trust_remote_code)
    model = _model(config, trust_remote_code)
    take_experts_apart(model)
    return type(model).__name__, find_structure(model, overrides=overrides)


def _model(config: Any, trust_remote_code: bool) -> nn.Module:
    """The model on the meta device: of the class that the configuration names, or a causal language model."""
    import transformers

    name = next(iter(getattr(config, "architectures", None) or ()), "")
    kind: Any = getattr(transformers, name, None)
    if kind is None or not hasattr(kind, "_from_config"):
        return model_on_meta(config, trust_remote_code=trust_remote_code).eval()
    with (
        torch.device("meta"),
        as_detent_error(lambda error: f"cannot build a {name} from its config.json: {first_line(error)}"),
    ):
        model: nn.Module = kind._from_config(config)
    return model.eval()
