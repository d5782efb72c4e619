"""What each layer of a model may become, from everything that the user says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from detent.config.base import as_keywords, shown
from detent.errors import DetentError
from detent.search.candidates import Candidate
from detent.search.options import NONE, Option, SearchSpace, matched, parse_option, parse_options
from detent.search.units import Unit

#: Formats where none are given.
DEFAULT_FORMATS = ("NVFP4_AWQ_LITE_CFG", "FP8_DEFAULT_CFG")


def _space(given: Any) -> SearchSpace:
    if not isinstance(given, Mapping):
        raise DetentError(f"module_search_spaces: a list of dictionaries, not one with {shown(given)}")
    return SearchSpace(**as_keywords(given))


@dataclass(frozen=True)
class Choices:
    """What layers may become.

    Attributes:
        options: everything that a layer may become, floating point first.
        usual: names of what a layer may become that no space matches.
        spaces: for others.
        fixed: the option of all that no space matches; it then has its own algorithm and quantizers.
        disabled: wildcards of layers that stay.
    """

    options: list[Option]
    usual: tuple[str, ...]
    spaces: list[SearchSpace]
    fixed: Option | None
    disabled: tuple[str, ...]

    @staticmethod
    def of(formats: Any, spaces: Any, fixed: Any, disabled: Any) -> Choices:
        """Raises DetentError: an argument isn't valid."""
        if fixed is not None and (formats is not None or not spaces):
            raise DetentError(
                "fixed_quantization_config is for what no entry of module_search_spaces matches: give those, and leave"
                " out quantization_formats"
            )
        found = [_space(space) for space in spaces or ()]
        usual = [] if fixed is not None else parse_options(DEFAULT_FORMATS if formats is None else formats)
        baseline = None
        if fixed is not None:
            baseline = parse_option(fixed)
            baseline = Option(baseline.name if isinstance(fixed, str) else "fixed", baseline.config)
            usual = [baseline]
        names = [option.name for option in usual]
        if baseline is None and NONE not in names:
            names.append(NONE)
        disabled = [disabled] if isinstance(disabled, str) else list(disabled or ())
        if not all(isinstance(pattern, str) for pattern in disabled):
            raise DetentError(f"disabled_layers: wildcards on names of modules, not {shown(disabled)}")
        options = {
            option.name: option
            for option in [Option(NONE, None), *usual, *(o for space in found for o in space.options)]
        }
        return Choices(list(options.values()), tuple(names), found, baseline, tuple(disabled))

    def of_unit(self, modules: Sequence[str], candidates: Mapping[str, Candidate]) -> Unit:
        """The unit of some layers: each option once, where two come to the same."""
        space = next((space for space in self.spaces if any(map(space.holds, modules))), None)
        names = self.usual if space is None else tuple(option.name for option in space.options)
        if any(matched(name, self.disabled) for name in modules):
            names = (NONE,)
        steps = {option.name: option.algorithm for option in self.options}
        distinct: list[tuple[Any, str]] = []
        for name in names:
            settings = [candidates[module].settings.get(name, {}) for module in modules]
            what = (settings, steps[name] if any(settings) else [])
            if not any(what == other for other, _ in distinct):
                distinct.append((what, name if any(settings) else NONE))
        return Unit(tuple(modules), tuple(name for _, name in distinct))

    def check(self, model: nn.Module, candidates: Mapping[str, Candidate]) -> None:
        """Raises DetentError: a pattern of disabled layers or of a space matches nothing."""
        for pattern in self.disabled:
            if not any(matched(name, [pattern]) for name, _ in model.named_modules()):
                raise DetentError(f"disabled_layers: {shown(pattern)} matches no module of {type(model).__name__}")
        for space in self.spaces:
            if not any(map(space.holds, candidates)):
                raise DetentError(
                    f"module_search_spaces: {shown(space.module_name_patterns)} matches no layer that can be quantized,"
                    f" such as {next(iter(candidates))}"
                )
