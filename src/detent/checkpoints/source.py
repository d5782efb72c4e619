"""Reading a Hugging Face checkpoint folder: its config and, lazily, its tensors.

Everything that can be wrong with the folder is found when it is opened, from file headers alone. Only safetensors are
read: pickled weights run code when loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detent.errors import DetentError
from detent.external.files import is_file, names_in, read_as, unreadable, user_path
from detent.external.model_folder import check_folder, is_gguf, read_config
from detent.external.schemas import ShardIndex
from detent.external.weights_only_schemas import OldGptqConfig

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
#: Weights in formats that are never read; most of them are pickles.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

#: Ends of the names that only quantized weights have.
_CODED = (
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight.codes",
    ".qweight",
    ".qzeros",
)

#: Where older versions of ModelOpt say that weights are quantized, in place of config.json.
_MODELOPT_NAME = "hf_quant_config.json"
#: Where versions of AutoGPTQ before transformers knew GPTQ say so, and what their file of weights is called.
_GPTQ_NAME = "quantize_config.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and what the header of its file says about it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Source:
    """An opened checkpoint folder. `open_source` opens a quantized one as the float model that it stands for.

    Args:
        path: the folder.
        quantized: whether a quantized checkpoint is accepted. By default it is an error: quantizing codes again would
            destroy them.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        tensors: `TensorInfo` by tensor name, in the order of the files.
        metadata: the string metadata of all file headers, merged.
        notes: what the user should know about it.

    Raises:
        DetentError: the folder or config.json is missing, empty, unreadable or of another kind; weights are missing,
            pickled, truncated or corrupt; shards and their index disagree; the model is quantized already.
    """

    notes: Sequence[str] = ()

    def __init__(self, path: str | Path, *, quantized: bool = False) -> None:
        self.path = user_path(path)
        check_folder(self.path)
        self.config = read_config(self.path)
        method = quant_method(self.config)
        if method == "mlx":
            self.config |= {"quantization_config": {**self.config["quantization"], "quant_method": method}}
        if method is None and is_file(self.path / _MODELOPT_NAME):
            method = "modelopt"
            self.config |= {"quantization_config": {"quant_method": method}}
        if method is not None and not quantized:
            raise self._quantized_already(method)
        self.metadata: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        old = read_as(OldGptqConfig, self.path / _GPTQ_NAME) if is_file(self.path / _GPTQ_NAME) else None
        self.tensors = self._list_tensors(None if old is None else old.model_file_base_name)
        coded = next((name for name in self.tensors if name.endswith(_CODED)), None)
        if method is None and old is not None and any(name.endswith(".qweight") for name in self.tensors):
            if not quantized:
                raise self._quantized_already("gptq")
            method = "gptq"
            self.config |= {"quantization_config": old.model_dump() | {"quant_method": method}}
        if method is None and coded is not None:
            raise DetentError(
                f"{self.path / self.tensors[coded].file}: {coded} belongs to a quantized weight, but config.json has no"
                " quantization_config that says how; get the checkpoint again, or the original one"
            )

    def _quantized_already(self, method: str) -> DetentError:
        return DetentError(
            f"{self.path} is quantized already ({method}); quantize the original checkpoint instead."
            " What Detent wrote can be read with `detent evaluate`"
        )

    @classmethod
    def of_file(cls, path: Path) -> Source:
        """One safetensors file that is no checkpoint by itself; its `config` is empty.

        Raises:
            DetentError: it is missing, truncated or corrupt.
        """
        source = cls.__new__(cls)
        source.path, source.config, source.metadata, source._open = path.parent, {}, {}, {}
        source.tensors = source._read_headers([path.name])
        return source

    @classmethod
    def imagined(cls, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Source:
        """A checkpoint that would hold `tensors`, by name: shapes and dtypes. None of them can be read.

        Raises:
            DetentError: the folder or its config.json is missing, or the model is quantized already.
        """
        source = cls.__new__(cls)
        source.path, source.config, source.metadata, source._open = user_path(path), read_config(path), {}, {}
        source.tensors = {name: TensorInfo(SINGLE_NAME, *known) for name, known in tensors.items()}
        return source

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, read now.

        Raises:
            DetentError: there is no such tensor, or its file can't be read.
        """
        info = self.info(name)
        try:
            tensor: Tensor = self._file(info.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DetentError(f"{self.path / info.file}: cannot read tensor {name!r} ({error})") from error
        return tensor

    def info(self, name: str) -> TensorInfo:
        """Raises DetentError where there is no such tensor."""
        if name not in self.tensors:
            raise DetentError(f"{self.path} holds no tensor {name!r}, which its config.json calls for")
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def close(self) -> None:
        """Let go of the files; they are opened again when needed."""
        self._open.clear()

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = _open_safetensors(self.path / file)
        return self._open[file]

    def _list_tensors(self, base_name: str | None) -> dict[str, TensorInfo]:
        named = f"{base_name}.safetensors"
        if base_name and Path(named).name == named and is_file(self.path / named):
            tensors = self._read_headers([named])
        elif is_file(self.path / SINGLE_NAME):
            tensors = self._read_headers([SINGLE_NAME])
        elif is_file(self.path / INDEX_NAME):
            weight_map = _read_index(self.path / INDEX_NAME)
            tensors = self._read_headers(sorted(set(weight_map.values())))
            for name in sorted(weight_map.keys() | tensors.keys()):
                listed, found = weight_map.get(name), tensors[name].file if name in tensors else None
                if listed != found:
                    raise DetentError(
                        f"{self.path / (listed or INDEX_NAME)}: tensor {name!r} is missing, though"
                        f" {found or INDEX_NAME} {'holds it' if found else 'lists it'}; the index was not written for"
                        " these shards. Download the checkpoint again"
                    )
        else:
            raise _no_weights(self.path)
        if not tensors:
            raise DetentError(f"{self.path}: its safetensors files hold no tensors")
        return tensors

    def _read_headers(self, files: list[str]) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            handle = self._file(file)
            self.metadata.update(handle.metadata() or {})
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise DetentError(f"{self.path / file}: tensor {name!r} has dtype {code}, which Detent cannot read")
                if name in tensors:
                    raise DetentError(
                        f"{self.path}: tensor {name!r} is both in {tensors[name].file} and in {file}, so which of the"
                        " two is meant is unknown; download the checkpoint again"
                    )
                tensors[name] = TensorInfo(file, tuple(part.get_shape()), _DTYPES[code])
        return tensors


def holds_no_weights(folder: Path) -> bool:
    """Whether a folder has a config.json and no file of weights, of whatever kind."""
    return not any(name.lower().endswith((".safetensors", ".gguf", *PICKLE_SUFFIXES)) for name in names_in(folder))


def quant_method(config: dict[str, Any]) -> str | None:
    """The name of the method that a config.json says its model is quantized with, or None."""
    if isinstance(config.get("quantization"), dict) and "bits" in config["quantization"]:  # MLX names none
        return "mlx"
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            quantization = part.get(key)
            if isinstance(quantization, dict) and quantization:
                return str(quantization.get("quant_method") or "method not named")[:80]
    return None


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_as(ShardIndex, path).weight_map
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in (".", ".."):
            raise DetentError(f"{path} names the shard {file!r}, which is not a plain file name; it is not read")
        if not is_file(path.parent / file):
            raise DetentError(f"{path.parent}: shard {file} is missing, though {path.name} lists it; download it again")
    return weight_map


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise DetentError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors refused."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "only a Git LFS pointer, not the weights; run `git lfs pull` in the checkpoint's repository"
    return f"truncated or corrupt safetensors file ({path.stat().st_size} bytes; {error}); download it again"


def _no_weights(folder: Path) -> DetentError:
    names = names_in(folder)
    if any(name.lower().endswith(".gguf") for name in names):
        return is_gguf(folder)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    stray = [name for name in names if name.endswith(".safetensors")]
    if stray:
        return DetentError(
            f"{folder} holds {', '.join(stray[:3])} but neither {SINGLE_NAME} nor {INDEX_NAME};"
            " the index of a sharded checkpoint is needed: download it too"
        )
    if pickles:
        return DetentError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded and are"
            " not read. Convert them: load the model with transformers and save it with save_pretrained"
        )
    return DetentError(f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
