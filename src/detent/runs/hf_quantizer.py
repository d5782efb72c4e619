"""Detent's checkpoints in the hands of transformers: ``AutoModelForCausalLM.from_pretrained(folder)``.

Importing this module registers two quantizers; `detent` has it imported when transformers' own are. Both hand back the
model that Detent simulates, with the module classes and the quantizers of a model that was quantized in memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from detent.errors import DetentError
from detent.external.model_folder import read_config
from detent.model.save_guard import STATE_METHOD, guard_save_pretrained


class StoredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says under "quantization_config", as it is."""

    def __init__(self, quant_method: str, **content: Any) -> None:
        self.quant_method = quant_method
        self.__dict__.update(content)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)


register_quantization_config("detent")(StoredConfig)
register_quantization_config(STATE_METHOD)(StoredConfig)


class _Loader(HfQuantizer):  # type: ignore[misc]
    """What both have in common."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        files = [Path(file) for file in options.get("checkpoint_files") or ()]
        if not files:
            raise DetentError("the weights of a quantized checkpoint are read from its folder, not from a state_dict")
        self.files, self.dtype = files, model.dtype
        self.device = _one_device(options.get("device_map"))
        # What is in the files is checked strictly, later: transformers' report would list all codes as unexpected.
        model._keys_to_ignore_on_load_unexpected = model._keys_to_ignore_on_load_missing = {".*"}

    def is_serializable(self) -> bool:
        """`detent.model.save_guard` writes the model, adapters aside."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters, or the model itself where its weights are floats, can be trained."""
        return True


@register_quantizer("detent")
class CheckpointLoader(_Loader):
    """Loads Detent's own layout."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        # transformers gives memory to all that it finds in the model: nothing, until the weights are decoded.
        model._modules, model.all_tied_weights_keys = {}, {}

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        from detent.runs.load import load_quantized

        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        own_code = type(model).is_remote_code()
        made: Any = load_quantized(
            self.files[0].parent,
            config=config,
            cut=False,
            dtype=self.dtype,
            device=self.device,
            attention=config._attn_implementation,
            trust_remote_code=own_code,
        )
        if not isinstance(made, type(model)):
            made = getattr(made, made.base_model_prefix, made)
        if not isinstance(made, type(model)):
            raise DetentError(
                f"{self.files[0].parent} is a quantized {type(made).__name__}, which {type(model).__name__} can't load"
            )
        for part in ("_modules", "_parameters", "_buffers"):
            setattr(model, part, getattr(made, part))
        model.config, model.all_tied_weights_keys = made.config, made.all_tied_weights_keys
        guard_save_pretrained(model)
        self.remove_quantization_config(
            model
        )  # the weights are decoded: what is saved of it is told by what it is then
        return model


@register_quantizer(STATE_METHOD)
class StateLoader(_Loader):
    """Restores what `save_pretrained` of a model with quantizers wrote."""

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        from detent.model.state import restore

        saved = read_config(self.files[0].parent).get("dtype")
        if saved is not None and saved != str(self.dtype).removeprefix("torch."):
            raise DetentError(
                f'{self.files[0].parent} was saved in {saved}; load it with dtype="auto", and cast it then'
            )
        restore(model, self.files[0])
        self.remove_quantization_config(model)
        return model


def enable_huggingface_checkpointing() -> None:
    """Nothing that hasn't been done: with `detent` imported, ``save_pretrained`` of a quantized model keeps its
    quantizers and ``from_pretrained`` brings them back. It is for code that calls ModelOpt's function of that name.

    Example:
        >>> import detent
        >>> detent.enable_huggingface_checkpointing()
    """


def _one_device(device_map: Any) -> str:
    """The device of a ``device_map``. Raises DetentError where it names several."""
    import torch

    if device_map is None:
        return "cpu"
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
    if len(devices) > 1:
        raise DetentError(
            f"a quantized checkpoint of Detent is loaded to one device, not to {', '.join(sorted(devices))}; pass one,"
            ' such as device_map="cuda:0"'
        )
    (device,) = devices
    return f"cuda:{device}" if device.isdigit() else device
