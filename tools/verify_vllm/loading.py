"""What vLLM makes of a checkpoint, up to the point where a kernel would start: its model, with the weights loaded.

vLLM reads the configuration, picks a scheme class for every layer, creates that class's parameters and loads the
file's tensors into them; all of this is its own code. Two things are faked, because they ask for a GPU:

- the compute capability, which is that of an H100 (9.0) while the model is built;
- the kernels: whatever a scheme class asks vLLM's selection functions for, it gets a stand-in that can't compute.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

CAPABILITY = DeviceCapability(9, 0)
#: Parameters that vLLM gives every attention layer, with defaults for files that have none.
_OPTIONAL = tuple(f".attn.{which}_{what}" for which in "qkv" for what in ("scale", "zero_point"))


@dataclass(frozen=True)
class Verdict:
    """What vLLM did with a checkpoint.

    Attributes:
        schemes: the names of the scheme classes of its quantized layers, sorted.
        refusal: vLLM's own words where it took the configuration or the tensors not; else None.
    """

    schemes: tuple[str, ...] = ()
    refusal: str | None = None


class _NoKernel:
    """Stands where a kernel would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def input_quant_key() -> None:
        """vLLM asks kernels which inputs they take quantized already."""


@contextmanager
def _faked_gpu() -> Iterator[None]:
    patches = [mock.patch.object(type(current_platform), "get_device_capability", return_value=CAPABILITY)]
    for name, module in list(sys.modules.items()):
        if name.startswith(schemes.__name__):
            patches += [
                mock.patch.object(module, function, return_value=_NoKernel)
                for function in vars(module)
                if function.startswith(("init_", "choose_")) and function.endswith("_kernel")
            ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def start(source: Path, scratch: Path) -> VllmConfig:
    """vLLM's configuration of an unquantized checkpoint, for one process."""
    config = EngineArgs(str(source), dtype="bfloat16", enforce_eager=True, max_model_len=64).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{scratch / 'rendezvous'}", 0, backend="gloo")
        initialize_model_parallel()
    return config


def load(config: VllmConfig, folder: Path, quantization_config: dict[str, Any]) -> Verdict:
    """Let vLLM build the model of a checkpoint and load its tensors.

    Args:
        config: from `start`, of the same architecture.
        folder: the checkpoint.
        quantization_config: what its config.json says.
    """
    config = copy.copy(config)
    config.compilation_config.static_forward_context.clear()  # where vLLM registers attention layers by name
    try:
        arch = config.model_config.model_arch_config  # as vLLM adds it to what it reads of config.json
        heads = {"total_num_heads": arch.total_num_attention_heads, "total_num_kv_heads": arch.total_num_kv_heads}
        config.quant_config = CompressedTensorsConfig.from_config({**quantization_config, **heads})
        with set_current_vllm_config(config), _faked_gpu():
            model = initialize_model(vllm_config=config)
        tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        loaded = model.load_weights(iter(tensors.items()))
    except Exception as error:  # whatever vLLM raises is what this tool reports
        return Verdict(refusal=f"{type(error).__name__}: {error}")
    kinds = {type(m.scheme).__name__ for m in model.modules() if getattr(m, "scheme", None) is not None}
    left = [n for n, _ in model.named_parameters() if n not in loaded and not n.endswith(_OPTIONAL)]
    if left:
        return Verdict(refusal=f"not in the file, and so left with random values: {', '.join(left)}")
    return Verdict(tuple(sorted(kinds)))
