"""The folder of a model: whether it is one, what it is instead, and its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detent.errors import DetentError
from detent.external.files import check_as, is_file, is_folder, names_in, read_as, read_json, status, user_path
from detent.external.schemas import AdapterConfig, ModelConfig

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"


def local_folder(model_dir: str) -> Path | None:
    """The path that a user means by `model_dir`, or None where it is a name on the hub, ``organisation/name``.

    Raises:
        DetentError: as `user_path` and `status`.
    """
    path = user_path(model_dir)
    if status(path) is not None or model_dir.count("/") != 1 or model_dir.startswith((".", "/", "~")):
        return path
    return None


def check_folder(path: Path) -> None:
    """Raise DetentError unless a folder with files is at `path`; the message says what it is instead, if known."""
    if status(path) is None:
        raise DetentError(f"{path}: there is no such folder; give the folder of a downloaded checkpoint")
    if path.suffix.lower() == ".gguf":
        raise is_gguf(path)
    if not is_folder(path):
        raise DetentError(f"{path} is a file; give the folder that holds config.json and the safetensors files")
    if not names_in(path):
        raise DetentError(f"{path} is empty; a checkpoint has config.json and safetensors files")


def is_gguf(path: Path) -> DetentError:
    """The refusal of a GGUF file, or of a folder that holds one."""
    return DetentError(
        f"{path} holds a model as GGUF, which counts as quantized; give the folder of the original checkpoint in"
        " Hugging Face layout (config.json and safetensors files)"
    )


def _why_no_config(folder: Path) -> DetentError:
    """What a folder without config.json is."""
    names = names_in(folder)
    if ADAPTER_NAME in names:
        base = read_as(AdapterConfig, folder / ADAPTER_NAME).base_model_name_or_path or "its base model"
        return DetentError(
            f"{folder} is a LoRA adapter of {base}, not a model; merge the two (peft: merge_and_unload, then"
            " save_pretrained) and give the folder of the merged model"
        )
    if any(name.lower().endswith(".gguf") for name in names):
        return is_gguf(folder)
    snapshots = folder / "snapshots"
    if is_folder(snapshots) and (found := names_in(snapshots)):
        return DetentError(
            f"{folder} is a model in the hub's cache, which keeps each version in its own folder; give one of"
            f" them: {', '.join(str(snapshots / name) for name in found[:3])}"
        )
    if "hub" in names and is_folder(folder / "hub"):
        folder, names = folder / "hub", names_in(folder / "hub")
    if models := [name for name in names if name.startswith("models--")]:
        ids = [name.removeprefix("models--").replace("--", "/") for name in models]
        return DetentError(f"{folder} is the hub's cache; give the name of a model in it: {', '.join(ids[:3])}")
    return DetentError(f"{folder} has no {CONFIG_NAME}; a Hugging Face checkpoint has one next to its weights")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        DetentError: there is none, or it isn't the configuration of a model; there is an adapter next to it.
    """
    path = folder / CONFIG_NAME
    if status(path) is None:
        raise _why_no_config(folder)
    config = read_json(path)
    if not isinstance(config, dict):
        raise DetentError(f"{path} holds {type(config).__name__} where a JSON object is expected")
    if not config.get("model_type"):
        raise DetentError(f'{path} has no "model_type" (such as "llama"), so the model\'s architecture is unknown')
    check_as(ModelConfig, config, str(path))
    if is_file(folder / ADAPTER_NAME):
        raise DetentError(
            f"{folder} holds a LoRA adapter ({ADAPTER_NAME}) next to the model, which would be left out; merge the two"
            " (peft: merge_and_unload, then save_pretrained), or move the adapter's files away"
        )
    return config
