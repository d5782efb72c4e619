"""What a search may choose from: a format is a whole configuration, and each layer gets one of them or stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detent.algorithms.registry import handler_of, whole
from detent.config import QuantizeAlgorithmConfig, QuantizeConfig, Scheme, parse_scheme, presets, quant_cfg_for
from detent.config.base import ConfigField, ConfigModel, nearest, shown
from detent.errors import DetentError
from detent.formats import Format

#: The option of staying in floating point.
NONE = "none"


@dataclass(frozen=True)
class Option:
    """One way of quantizing a layer.

    Attributes:
        name: what results call it.
        config: rules for quantizers and the algorithm; None for floating point.
    """

    name: str
    config: QuantizeConfig | None

    @property
    def algorithm(self) -> list[QuantizeAlgorithmConfig]:
        return [] if self.config is None else self.config.algorithm


class SearchSpace(ConfigModel):
    """What some layers may become: an entry of `module_search_spaces`.

    Attributes:
        module_name_patterns: wildcards on the names of their modules, or a single one.
        quantization_formats: as for `auto_quantize`.
        allow_no_quant: whether they may stay in floating point.
    """

    module_name_patterns: str | list[str] = ConfigField(min_length=1)
    quantization_formats: Any = ConfigField()
    allow_no_quant: bool = ConfigField(True)

    @property
    def options(self) -> list[Option]:
        found = parse_options(self.quantization_formats, "module_search_spaces: quantization_formats")
        return [*found, Option(NONE, None)] if self.allow_no_quant else found

    def holds(self, name: str) -> bool:
        """Whether it is for a module."""
        return matched(name, self.module_name_patterns)


def parse_option(given: Any, number: int = 1) -> Option:
    """The option that a user names.

    Args:
        given: a configuration, the name of a preset or of a scheme, a `Scheme`, a `Format` of weights, a width of
            integers (2 to 8, in groups of 128), or None for floating point.
        number: of it in the list, for configurations without a name.

    Raises:
        DetentError: none of these, or its algorithm changes the model as a whole.

    Example:
        >>> from detent.search.options import parse_option
        >>> [parse_option(given).name for given in ("NVFP4_DEFAULT_CFG", "w_fp8_a_fp8", 4, None)]
        ['NVFP4_DEFAULT_CFG', 'w_fp8_a_fp8', 'w_int4_per_group_sym', 'none']
    """
    if given is None or given == NONE:
        return Option(NONE, None)
    if isinstance(given, bool) or (isinstance(given, int) and not 2 <= given <= 8):
        raise DetentError(f"quantization_formats: integers have 2 to 8 bits, not {given}")
    if isinstance(given, int):
        given = f"w_int{given}_per_group_sym"
    if isinstance(given, str):
        option = _named(given)
    elif isinstance(given, Scheme):
        option = Option(given.name, QuantizeConfig(quant_cfg=quant_cfg_for(given)))
    elif isinstance(given, Format):
        option = Option(str(given), QuantizeConfig(quant_cfg={"*weight_quantizer": {"format": given}}))
    else:
        same = (name for name in sorted(presets.choices) if getattr(presets, name) == given)
        option = Option(next(same, f"format {number}"), QuantizeConfig.of(given))
    for step in whole(option.algorithm):
        if handler_of(step).scope not in ("weight", "site"):
            raise DetentError(
                f"{option.name}: its algorithm {step.method} changes the model as a whole, so it can't serve some"
                " layers alone; run it on the model first"
            )
    return option


def _named(name: str) -> Option:
    if name in presets.choices:
        return Option(name, QuantizeConfig.of(getattr(presets, name)))
    if name.endswith(("_CFG", "_CONFIG")):
        close = nearest(name, sorted(presets.choices))
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DetentError(f"quantization_formats: unknown preset {shown(name)}{hint}")
    scheme = parse_scheme(name)
    return Option(name, QuantizeConfig(quant_cfg=quant_cfg_for(scheme)))


def parse_options(given: Any, name: str = "quantization_formats") -> list[Option]:
    """The options of a list, each once. Raises DetentError as `parse_option` does."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence) or not given:
        raise DetentError(f"{name}: a list of configurations or names, not {shown(given)}")
    found: dict[str, Option] = {}
    for number, one in enumerate(given, 1):
        option = parse_option(one, number)
        found.setdefault(option.name, option)
    return list(found.values())


def matched(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a module's name matches one of the wildcards."""
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
