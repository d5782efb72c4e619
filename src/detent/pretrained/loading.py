"""Hugging Face models and tokenizers from a folder, with a user's mistakes as one clear message each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import Source, gguf_file
from detent.errors import DetentError
from detent.external.files import is_file, read_as
from detent.external.mistakes import as_detent_error, first_line
from detent.external.model_folder import CONFIG_NAME, check_folder, local_folder, read_config
from detent.external.schemas import TokenizerConfig, hub_kernels
from detent.formats.checks import all_finite
from detent.progress import track

_log = logging.getLogger(__name__)

#: What `--data_type` takes besides ``auto``.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_COMPUTED = (*DTYPES.values(), torch.float64)

#: What a checkpoint on the hub is downloaded with: everything but weights in formats that Detent doesn't read.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py", "*.jinja", "*.md", "LICENSE*"]


def resolve_folder(model_dir: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: `model_dir` itself, or a hub model ``organisation/name`` in the local cache.

    Raises:
        DetentError: neither a folder nor a model that the hub or its cache holds.
    """
    path = local_folder(model_dir)
    if path is not None:
        return path  # a folder, or something that opening it as one explains
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_dir, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DetentError(
            f"{model_dir!r} is not a local folder and could not be downloaded from the hub: {reason};"
            " give model_dir the path of a checkpoint folder"
        ) from error


@contextmanager
def quiet_transformers(start: str, trusted: bool = False) -> Iterator[None]:
    """Call transformers: its progress bars and load reports are left out, since Detent reports what matters itself, and
    what it raises over files and values that it cannot use becomes one DetentError, its text after `start`."""
    from huggingface_hub import errors
    from transformers.utils import logging as hf_logging

    kind = getattr(errors, "StrictDataclassError", None)  # about a value of the wrong type in a configuration
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with as_detent_error(
            lambda error: f"{start}: {_kind(error)}{_told(error, trusted)}",
            more=(*([kind] if kind else []), *([SystemExit] if trusted else [])),  # code of its own may exit
            but=(torch.OutOfMemoryError,),
        ):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder: that of the float model, also where the checkpoint is quantized.

    Raises:
        DetentError: transformers doesn't know the architecture; the model needs code of its own, or its attention is
            code on the hub, that isn't trusted.
    """
    from transformers import AutoConfig

    file = gguf_file(folder)
    folder = folder if file is None else file.parent
    if file is not None and not is_file(folder / CONFIG_NAME):
        with quiet_transformers(str(file)):
            return AutoConfig.from_pretrained(str(folder), gguf_file=file.name)
    check_folder(folder)
    content = read_config(folder)
    if not trust_remote_code and (kernels := hub_kernels(content)):
        place, value = kernels[0]
        raise DetentError(
            f"{folder / CONFIG_NAME}: {place} is {value!r}, code on the hub that transformers would download and run;"
            " pass trust_remote_code if you trust it, or take the entry out"
        )
    with quiet_transformers(f"{folder / CONFIG_NAME}{_own_code(content, trust_remote_code)}", trust_remote_code):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    vars(config).pop("quantization_config", None)  # weights are decoded by Detent, not by transformers
    return config


def model_on_meta(config: Any, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a configuration without memory for its weights.

    Raises:
        DetentError: the architecture is no language model, of text alone or of text with images or sound, or cannot be
            built from its configuration.
    """
    own = _own_code(vars(config), trust_remote_code)
    start = f"cannot build a {getattr(config, 'model_type', '?')} language model from its config.json{own}"
    with torch.device("meta"), quiet_transformers(start, trust_remote_code):
        model: nn.Module = auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code, dtype=dtype or torch.float32
        )
    return model


def _own_code(config: Mapping[str, Any], trusted: bool) -> str:
    """Where the Python code of a checkpoint is, for the start of a message; "" where none runs."""
    own = config.get("auto_map") if trusted else None
    return f" (with the code of its own that auto_map names: {', '.join(map(str, own.values()))})" if own else ""


#: transformers' doors to models that give logits for the next token, in the order in which they are tried.
_DOORS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


def auto_class(config: Any) -> Any:
    """The door to the class that config.json names, or else the first that the architecture has.

    Raises:
        DetentError: there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind, named = getattr(config, "model_type", ""), getattr(config, "architectures", None) or ()
    own = getattr(config, "auto_map", None) or {}
    known = {door: getattr(modeling_auto, names, {}).get(kind) for door, names in _DOORS.items()}
    doors = [door for door in _DOORS if known[door] or door in own]
    if not doors:
        raise DetentError(
            f"transformers has no language model of type {kind!r}, and config.json names no code of its own for one"
            " (auto_map); give the folder of a language model"
        )
    return getattr(transformers, next((door for door in doors if known[door] in named), doors[0]))


def model_dtype(data_type: str, config: Any, source: Source) -> torch.dtype:
    """The dtype that a model is held in.

    Args:
        data_type: a key of `DTYPES`, or ``auto``: what config.json says, or else the dtype of the first floating-point
            tensor in the checkpoint.
        config: the transformers configuration.
        source: the checkpoint.

    Raises:
        DetentError: config.json names a dtype that no model is computed in.
    """
    if data_type != "auto":
        return DTYPES[data_type]
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = {str(known).removeprefix("torch."): known for known in _COMPUTED}.get(dtype, dtype)
    if dtype is None:
        stored = [info.dtype for info in source.tensors.values() if info.dtype in _COMPUTED]
        return stored[0] if stored else torch.float32
    if dtype not in _COMPUTED:
        raise DetentError(
            f"{source.path}: config.json gives the dtype {dtype}, in which models cannot compute; pass data_type, one"
            f" of {', '.join(DTYPES)}"
        )
    return dtype


def read_tensor(source: Source, name: str, read: Callable[[str], Tensor] | None = None) -> Tensor:
    """A tensor of a checkpoint. `read` reads it, in place of the source.

    Raises:
        DetentError: it can't be read, or holds NaN or infinity.
    """
    value = (read or source.tensor)(name)
    if value.dtype in _COMPUTED and not all_finite(value):
        raise damaged(source, name)
    return value


def damaged(source: Source, name: str) -> DetentError:
    """The error for a tensor of a checkpoint that holds NaN or infinity."""
    return DetentError(
        f"{source.path / source.info(name).file}: {name} holds NaN or infinity, so the model is damaged; download or"
        " train it again"
    )


def too_large_for_float16(source: Source, name: str) -> DetentError:
    """The error for a parameter of which a value has no float16."""
    return DetentError(
        f"{source.path}: {name} has a value too large for float16 (at most 65504); keep the model in bfloat16 or"
        " float32"
    )


def load_model(
    source: Source,
    config: Any,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] = _log.warning,
) -> nn.Module:
    """The model of a checkpoint in eval mode, its weights frozen.

    Args:
        source: the checkpoint.
        config: its transformers configuration.
        dtype: of its floating-point weights.
        device: where they go.
        attention: an attention implementation by name; None leaves the choice to transformers.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        notify: called with a notice about tensors that the model has no place for.

    Raises:
        DetentError: the architecture is unknown; weights are damaged, missing or have the wrong shape.
    """
    expected = model_on_meta(config, trust_remote_code=trust_remote_code)
    kind: Any = type(expected)
    state = {name: read_tensor(source, name) for name in track(source, "Reading weights", len(source.tensors))}
    for name, parameter in expected.named_parameters():
        check_floating(source.path, name, state.get(name, parameter), parameter)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    with quiet_transformers(str(source.path), trust_remote_code):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_complete(source.path, info)
    if dtype == torch.float16:  # its range is the narrowest by far
        for name, parameter in model.named_parameters():
            if not all_finite(parameter):
                raise too_large_for_float16(source, name)
    unused = sorted(info.get("unexpected_keys") or [])
    if unused:
        notify(f"{len(unused)} tensors of the checkpoint have no place in the model and are ignored: {unused[0]}, ...")
    net: nn.Module = model.requires_grad_(False).to(device).eval()
    check_runs(source.path, net)
    return net


def check_floating(folder: Path, name: str, value: Tensor, parameter: Tensor) -> None:
    """Refuse codes in the place of floating-point numbers. Raises DetentError."""
    if parameter.is_floating_point() and value.dtype not in _COMPUTED:
        raise DetentError(
            f"{folder}: {name} is stored as {value.dtype}, not as floating-point numbers; if the checkpoint"
            " is quantized, its config.json doesn't say how"
        )


@torch.no_grad()
def check_runs(folder: Path, model: Any) -> None:
    """A config.json with wrong numbers may build a model that takes all weights and yet cannot run."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with as_detent_error(
        lambda error: (
            f"{folder}: the model cannot run ({type(error).__name__}: {_told(error, True)}); check its config.json"
        ),
        but=(torch.OutOfMemoryError,),
    ):
        model(input_ids=ids, use_cache=False)


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """A weight that the checkpoint lacks would be random numbers."""
    mismatched = sorted(info.get("mismatched_keys") or [])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise DetentError(
            f"{folder}: {name} has shape {tuple(stored)}, but config.json calls for {tuple(expected)}; one of the two"
            " belongs to another model"
        )
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise DetentError(
            f"{folder}: the checkpoint lacks {len(missing)} of the weights that its config.json calls for, for instance"
            f" {missing[0]}"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises DetentError where there is none."""
    from transformers import AutoTokenizer

    file = gguf_file(folder)
    folder = folder if file is None else file.parent
    if file is not None and not is_file(folder / "tokenizer.json"):
        with quiet_transformers(f"{file}: no usable tokenizer, which calibration and evaluation need"):
            return AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    if is_file(folder / "tokenizer_config.json"):
        read_as(TokenizerConfig, folder / "tokenizer_config.json")
    start = f"{folder}: no usable tokenizer, which calibration and evaluation need"
    with quiet_transformers(start, trust_remote_code):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def _kind(error: BaseException) -> str:
    """The class of an error whose text alone says little."""
    plain = isinstance(error, (ImportError, NameError, SyntaxError, SystemExit))
    return f"{type(error).__name__}: " if plain else ""


def _told(error: BaseException, trusted: bool) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2])[:400] if lines and lines[0].endswith(":") else first_line(error)
    if isinstance(error, KeyError):
        text = f"unknown value or missing key {text}"
    if "does not recognize this architecture" in text:
        text = (
            f"{text.partition(' This could')[0]} Update transformers, or get the checkpoint with the code of its own"
            " that config.json names (auto_map)"
        )
    if "trust_remote_code" in str(error) and not trusted:
        return "this model comes with Python code of its own; pass trust_remote_code if you trust it to run here"
    return text
