"""What each layer of a model may become, from everything that the user says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from detent.config.base import shown
from detent.errors import DetentError
from detent.search.candidates import Candidate
from detent.search.options import NONE, Option, Space, matched, parse_option, parse_options, parse_spaces
from detent.search.units import Unit

#: Formats where none are given.
DEFAULT_FORMATS = ("NVFP4_AWQ_LITE_CFG", "FP8_DEFAULT_CFG")


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
    spaces: list[Space]
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
        found, inside = parse_spaces(spaces) if spaces else ([], [])
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
        options = {option.name: option for option in [Option(NONE, None), *usual, *inside]}
        return Choices(list(options.values()), tuple(names), found, baseline, tuple(disabled))

    def of_unit(self, modules: Sequence[str], candidates: Mapping[str, Candidate]) -> Unit:
        """The unit of some layers: each option once, where two come to the same."""
        space = next((s for s in self.spaces if any(matched(name, s.patterns) for name in modules)), None)
        names = self.usual if space is None else space.options
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
            if not any(matched(name, space.patterns) for name in candidates):
                raise DetentError(
                    f"module_search_spaces: {shown(list(space.patterns))} matches no layer that can be quantized, such"
                    f" as {next(iter(candidates))}"
                )
