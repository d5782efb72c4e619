"""Hugging Face models and tokenizers from a folder, with a user's mistakes as one clear message each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.errors import DetentError

_log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

#: What a checkpoint on the hub is downloaded with: everything but weights in formats that Detent doesn't read.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py", "*.jinja", "*.md", "LICENSE*"]


def resolve_folder(model_dir: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: `model_dir` itself, or a hub model ``organisation/name`` in the local cache.

    Raises:
        DetentError: neither a folder nor a model that the hub or its cache holds.
    """
    path = Path(model_dir).expanduser()
    if path.exists() or model_dir.count("/") != 1 or model_dir.startswith((".", "/", "~")):
        return path  # a folder, or something that opening it as one explains
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_dir, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DetentError(
            f"{model_dir!r} is no folder here, and the hub doesn't give it: {reason}. Pass --model_dir the path of a"
            " checkpoint folder"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' progress bars and load reports are left out: Detent reports what matters itself."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_config(folder: Path, *, trust_remote_code: bool = False, values: dict[str, Any] | None = None) -> Any:
    """The transformers configuration of a folder, or of `values` (the content of a config.json).

    Raises:
        DetentError: transformers doesn't know the architecture, or the model needs code of its own that isn't trusted.
    """
    from transformers import AutoConfig

    try:
        with _quiet():
            if values is None or "auto_map" in values:
                return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            return AutoConfig.for_model(**values)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise DetentError(f"{folder}: {_first_line(error, trust_remote_code)}") from error


def model_on_meta(config: Any, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a configuration without memory for its weights.

    Raises:
        DetentError: the architecture is no causal language model, or cannot be built from its configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), _quiet():
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, dtype=dtype or torch.float32
            )
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise DetentError(
            f"cannot build a {getattr(config, 'model_type', '?')} language model from its config.json:"
            f" {_first_line(error, trust_remote_code)}"
        ) from error


def load_model(
    folder: Path,
    *,
    data_type: str = "auto",
    device: str = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
    config: Any = None,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """The model of a checkpoint folder in eval mode, its weights frozen.

    Args:
        folder: the checkpoint.
        data_type: ``auto`` (what config.json says), or float16, bfloat16, float32.
        device: where the weights go.
        attention: an attention implementation by name; None leaves the choice to transformers.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        config, state_dict: where given, the model is built from these instead of from the folder's files.

    Raises:
        DetentError: the architecture is unknown; weights are missing or have the wrong shape.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    dtype = "auto" if data_type == "auto" else DTYPES[data_type]
    try:
        with _quiet():
            if state_dict is None:
                model, info = AutoModelForCausalLM.from_pretrained(
                    str(folder),
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
            else:
                kind = type(model_on_meta(config, trust_remote_code=trust_remote_code))
                wanted = _config_dtype(config) if dtype == "auto" else dtype
                model, info = kind.from_pretrained(  # type: ignore[attr-defined]
                    None, config=config, state_dict=state_dict, dtype=wanted, output_loading_info=True, **options
                )
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise DetentError(f"{folder}: {_first_line(error, trust_remote_code)}") from error
    _check_complete(folder, info)
    model.requires_grad_(False)
    return model.to(device).eval()


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """A weight that the checkpoint lacks would be random numbers."""
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys") or [])
    if missing:
        raise DetentError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of its model, for instance {missing[0]}"
        )
    if mismatched:
        raise DetentError(f"{folder}: {mismatched[0]} has another shape than config.json calls for")
    for name in sorted(info.get("unexpected_keys") or []):
        _log.info("%s: the model has no place for %s; it is carried along unchanged", folder, name)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises DetentError where there is none."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        raise DetentError(f"{folder}: no usable tokenizer: {_first_line(error, trust_remote_code)}") from error


def _first_line(error: BaseException, trusted: bool) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error) and not trusted:
        return "this model comes with Python code of its own; pass --trust_remote_code if you trust it to run here"
    return text
