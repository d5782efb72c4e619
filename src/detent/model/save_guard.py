"""`save_pretrained` of a quantized transformers model, which would write a float model without saying so.

transformers knows nothing of quantizers: it writes the float weights along with the quantizers' ranges, and the result
loads as a float model. So a converted model gets its own `save_pretrained`, an attribute of the instance, which is
copied and pickled with it and undone with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from detent.errors import DetentError
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.notices import notify

_NAME = "save_pretrained"


def guard_save_pretrained(model: nn.Module) -> None:
    """Let every part of a converted model that transformers could save refuse to be saved as if it were float."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__.setdefault(_NAME, partial(_save_pretrained, module))


def _save_pretrained(module: nn.Module, *args: Any, **options: Any) -> Any:
    """transformers' own, where it writes what the model computes with, or what was asked for.

    With `state_dict` given, the caller decides what is written: transformers' Trainer does for its checkpoints,
    which it loads again with `load_state_dict`. peft writes only adapters.
    """
    if _is_quantized(module) and not _saves_adapters(module):
        name = type(module).__name__
        if "state_dict" not in options:
            raise DetentError(
                f"{name} is quantized, but save_pretrained would write a float model; write it with"
                " detent.save(model, file) and read it with detent.restore(), or make a checkpoint that other engines"
                " load with detent.runs.quantize.quantize_checkpoint or `detent quantize`; to write the float weights"
                " anyway, pass state_dict=model.state_dict()"
            )
        notify(
            f"{name}: save_pretrained wrote float weights and the ranges of quantizers; they are for load_state_dict of"
            " a model that is quantized alike"
        )
    return getattr(type(module), _NAME)(module, *args, **options)


def _is_quantized(model: nn.Module) -> bool:
    """Whether the model computes something else than its float weights would."""
    return any(
        (isinstance(module, TensorQuantizer) and (module.transforms or module.svdquant_lora_a is not None))
        or (isinstance(module, QuantWeightBase) and module.is_packed)
        for module in model.modules()
    )


def _saves_adapters(module: Any) -> bool:
    """Whether the module is peft's, or transformers' with adapters loaded, which write these and nothing else."""
    return hasattr(type(module), "get_base_model") or bool(getattr(module, "_hf_peft_config_loaded", False))
