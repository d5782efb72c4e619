"""Whether a checkpoint and the model of its config.json belong together, from headers alone.

Whatever is read later, block by block or weight by weight, was seen here first: a damaged last block is found before
hours are spent on those before it, and tensors that no run reads can't be carried into a wrong output.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from detent.checkpoints import Source
from detent.errors import DetentError
from detent.pretrained.names import CheckpointNames

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_fits(source: Source, model: nn.Module, names: CheckpointNames) -> None:
    """Refuse tensors that can't be the parameters that they are for, and a checkpoint that lacks some.

    Args:
        source: the checkpoint.
        model: its model on the meta device, without quantizers.
        names: of the two.

    Raises:
        DetentError: naming the tensor, and what config.json calls for.
    """
    known = {**model.state_dict(), **dict(model.named_parameters(remove_duplicate=False))}
    for group in names.groups:
        parameters = [known[name] for name in group.parameters if name in known]
        for tensor in group.tensors:
            info = source.info(tensor)
            if any(p.is_floating_point() for p in parameters) and info.dtype not in _FLOATS:
                raise DetentError(
                    f"{source.path / info.file}: {tensor} is stored as {info.dtype}, not as floating-point numbers; if"
                    " the checkpoint is quantized, its config.json doesn't say how"
                )
        if group.pieces or len(parameters) != len(group.parameters) or not parameters:
            continue
        found = [source.info(tensor).shape for tensor in group.tensors]
        wanted = [tuple(p.shape) for p in parameters]
        # Rules of transformers merge, split and transpose; none adds or drops a number.
        if found != wanted if group.is_one else sum(map(math.prod, found)) != sum(map(math.prod, wanted)):
            first = group.tensors[0]
            merged = "" if group.is_one else f" ({len(found)} tensors make {group.parameters[0]})"
            raise DetentError(
                f"{source.path / source.info(first).file}: {first} has shape {found[0]}{merged}, but config.json calls"
                f" for {wanted[0]}; one of the two belongs to another model"
            )
    _check_complete(source, model, names, known)


def _check_complete(source: Source, model: nn.Module, names: CheckpointNames, known: dict[str, Any]) -> None:
    net: Any = model
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    twins = {**{there: here for here, there in tied.items()}, **tied}
    optional = [re.compile(pattern) for pattern in getattr(net, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name in known
        if names.of_parameter(name) is None
        and names.of_parameter(twins.get(name, name)) is None
        and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        raise DetentError(
            f"{source.path}: the checkpoint lacks {len(missing)} of the weights that its config.json calls for, for"
            f" instance {missing[0]}"
        )
