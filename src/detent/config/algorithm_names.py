"""The algorithms as AMD Quark's command line names them, and the files that configure them.

A file is a JSON object: the fields of the algorithm's configuration, or the names that Quark's files use for them.
Entries of Quark's files that describe a model's structure are not needed: structure is detected. They are accepted, and
a notice says that they have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detent.config.algorithm import ALGORITHMS, QuantizeAlgorithmConfig, parse_algorithm
from detent.config.base import nearest
from detent.config.transforms import STRUCTURE_FIELDS
from detent.errors import DetentError
from detent.external.files import read_json, status, user_path

#: Name on the command line -> the algorithm, with the settings that distinguish it.
_NAMES: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq_full"},
    "gptaq": {"method": "gptq", "retarget": True},
    "smoothquant": {"method": "smoothquant", "alpha": 0.5},
    "quarot": {"method": "rotation"},
    "rotation": {"method": "rotation", "r3": False, "r4": False},
}
#: Quark's name of a field -> Detent's, where they differ.
_FIELDS = {
    "damp_percent": "perc_damp",
    "desc_act": "act_order",
    "iters": "iterations",
    "rank": "lowrank",
}
#: Settings of Quark's algorithms that ask for what Detent's do anyway.
_IMPLIED = ("static_groups", "true_sequential")


def named_algorithms(
    before: Sequence[str], algorithm: str | None, before_file: str | None, file: str | None
) -> tuple[list[QuantizeAlgorithmConfig], list[str]]:
    """The algorithms of a command line, in the order in which they run.

    Args:
        before: names of what prepares a model (``rotation``, ``quarot``, ``smoothquant``, ...).
        algorithm: names of what quantizes it, with commas between.
        before_file, file: JSON files with their settings: of the one algorithm, or of several by name.

    Returns:
        Their configurations, and notices for the user.

    Raises:
        DetentError: an unknown name; a file that doesn't exist, isn't JSON, or has settings that the algorithm doesn't
            take; a file without an algorithm.
    """
    notices: list[str] = []
    steps = _steps([n for name in before for n in _split(name)], before_file, "pre_quantization_optimization", notices)
    steps += _steps(_split(algorithm or ""), file, "quant_algo", notices)
    return steps, notices


def _split(names: str) -> list[str]:
    return [name.strip().lower() for name in names.split(",") if name.strip()]


def _steps(names: list[str], file: str | None, flag: str, notices: list[str]) -> list[QuantizeAlgorithmConfig]:
    file_flag = "pre_optimization_config_file_path" if flag.startswith("pre") else "quant_algo_config_file_path"
    if file is not None and not names:
        raise DetentError(f"--{file_flag} configures an algorithm; name the algorithm with --{flag}")
    settings = {} if file is None else _read(file, file_flag)
    several = any(name in settings and isinstance(settings[name], dict) for name in names)
    if several and (strangers := [key for key in settings if key not in names]):
        raise DetentError(f"--{file_flag} {file}: {strangers[0]!r} is not one of the algorithms named by --{flag}")
    if len(names) > 1 and settings and not several:
        raise DetentError(f"--{file_flag} {file}: with several algorithms, give each its settings under its name")
    steps: list[QuantizeAlgorithmConfig] = []
    for name in names:
        own = settings.get(name, {}) if several else settings
        step = {**_named(name, flag), **_translated(own, f"--{file_flag} {file}", notices)}
        try:
            steps += parse_algorithm(step)
        except DetentError as error:
            raise DetentError(f"--{file_flag} {file}: {error}" if own else f"--{flag} {name}: {error}") from None
    return steps


def _named(name: str, flag: str) -> dict[str, Any]:
    if name in _NAMES:
        return dict(_NAMES[name])
    if name in ALGORITHMS:
        return {"method": name}
    known = [*_NAMES, *(str(method) for method in ALGORITHMS if method and method not in _NAMES)]
    close = nearest(name, known)
    raise DetentError(
        f"--{flag}: unknown algorithm {name!r}"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + f"; known: {', '.join(sorted(known))}"
    )


def _read(file: str, flag: str) -> dict[str, Any]:
    path = user_path(file)
    if status(path) is None:
        raise DetentError(f"--{flag}: there is no file {file}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise DetentError(f"--{flag} {file}: expected a JSON object of settings, found a {type(settings).__name__}")
    return settings


def _translated(settings: dict[str, Any], where: str, notices: list[str]) -> dict[str, Any]:
    ignored = [key for key in settings if key in STRUCTURE_FIELDS]
    if ignored:
        notices.append(
            f"{where}: {', '.join(ignored)} ignored, because the model's structure is detected (see `detent structure`)"
        )
    kept = {key: value for key, value in settings.items() if key not in (*STRUCTURE_FIELDS, *_IMPLIED)}
    return {_FIELDS.get(key, key): value for key, value in kept.items()}
