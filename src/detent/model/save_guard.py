"""`save_pretrained` of a quantized transformers model: the model as it is, with its quantizers.

transformers knows nothing of quantizers: it would write the float weights along with the quantizers' ranges, and the
result would load as a float model. So a converted model gets its own `save_pretrained`, an attribute of the instance,
which is copied and pickled with it and undone with it. What it writes `from_pretrained` reads: see
`detent.runs.hf_quantizer`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from detent.errors import DetentError
from detent.external.files import user_path
from detent.external.model_folder import CONFIG_NAME
from detent.nn import QuantWeightBase, TensorQuantizer
from detent.notices import notify

_NAME = "save_pretrained"
#: The "quant_method" of what is written here, and the file that holds the weights and the state of quantizers.
STATE_METHOD = "detent_state"
WEIGHTS_NAME = "model.safetensors"
#: Options of `save_pretrained` that change nothing here: there is one file, of safetensors.
_LEFT_TO_DETENT = {"is_main_process", "max_shard_size", "safe_serialization", "save_original_format", "push_to_hub"}


def guard_save_pretrained(model: nn.Module) -> None:
    """Let every part of a converted model that transformers could save refuse to be saved as if it were float."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)):
            module.__dict__.setdefault(_NAME, partial(_save_pretrained, module))


def _save_pretrained(module: Any, save_directory: str | Path, *args: Any, **options: Any) -> Any:
    """transformers' own where it writes what the model computes with, or what was asked for; else `_save_with_state`.

    With `state_dict` given, the caller decides what is written: transformers' Trainer does for its checkpoints,
    which it loads again with `load_state_dict`. peft writes only adapters.
    """
    if _is_quantized(module) and not _saves_adapters(module):
        if "state_dict" not in options:
            return _save_with_state(module, user_path(save_directory), options)
        notify(
            f"{type(module).__name__}: save_pretrained wrote float weights and the ranges of quantizers; they are for"
            " load_state_dict of a model that is quantized alike"
        )
    return getattr(type(module), _NAME)(module, save_directory, *args, **options)


def _save_with_state(model: Any, folder: Path, options: dict[str, Any]) -> None:
    """What `save_pretrained` writes besides weights, and in place of these what `detent.save` does."""
    from detent.model.state import save  # which imports this module, in the end

    unknown = options.keys() - _LEFT_TO_DETENT
    if unknown or options.get("push_to_hub"):
        raise DetentError(
            f"save_pretrained of a quantized model takes no {min(unknown or ['push_to_hub'])}; save it to a folder"
        )
    if not options.get("is_main_process", True):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            made = Path(name)
            getattr(type(model), _NAME)(model, made, state_dict={})
            for empty in made.glob("*.safetensors*"):
                empty.unlink()
            config = made / CONFIG_NAME
            content = json.loads(config.read_text()) | {"quantization_config": {"quant_method": STATE_METHOD}}
            config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            save(model, made / WEIGHTS_NAME)
            for stale in folder.glob("model*.safetensors*"):
                stale.unlink()
            for path in sorted(made.iterdir(), key=lambda path: path.name == WEIGHTS_NAME):
                path.replace(folder / path.name)
    except OSError as error:
        raise DetentError(f"{folder}: cannot be written: {error}") from error


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
