"""The table of algorithms: from a configuration class to its handler.

A handler says what an algorithm wants to be observed, what it refuses, and how it solves one site. Each is at the
end of its algorithm's file and registers itself there; the files of this package are imported at the first look-up.
So an algorithm is added with one file here, and its class in `detent.config.algorithm`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor, nn

import detent.algorithms
from detent.algorithms.layer import Layer
from detent.algorithms.site import Wanted
from detent.config.algorithm import ALGORITHMS, QuantizeAlgorithmConfig
from detent.errors import DetentError
from detent.formats import Format
from detent.nn import SequentialQuantizer, TensorQuantizer
from detent.nn.low_rank import low_rank_of
from detent.nn.own_linear import TRANSPOSED, kind_of

if TYPE_CHECKING:
    from detent.algorithms.block_work import BlockWork
    from detent.algorithms.site_work import SiteWork

C = TypeVar("C", bound=QuantizeAlgorithmConfig)
H = TypeVar("H", bound="type[Handler[Any]]")

#: What an algorithm is handed: the whole ``model``; a ``weight`` by itself; a ``site`` with its statistics; the same
#: and then a ``block``, which it trains; or, in the ``end``, the rounded model, which it trains.
Scope = Literal["model", "weight", "site", "block", "end"]


@dataclass(frozen=True)
class LayerFacts:
    """What refusals are decided by: nothing of a layer but its formats and its kind.

    Attributes:
        weight, input: formats, None where that side isn't quantized.
        kind: the module's kind without ``Quant``, such as ``"Linear"`` or ``"Conv2d"``.
        shape: of the weight, output channels first; () if unknown.
        twice: whether the weight is quantized by several quantizers in sequence.
        branch: whether the layer has a low-rank branch.
        name: the module's, for algorithms that leave some layers out.
    """

    weight: Format | None
    input: Format | None = None
    kind: str = "Linear"
    shape: tuple[int, ...] = ()
    twice: bool = False
    branch: bool = False
    name: str = ""

    @property
    def is_convolution(self) -> bool:
        return self.kind.startswith("Conv") and self.kind != TRANSPOSED

    @staticmethod
    def of(layer: Layer) -> LayerFacts:
        """Those of a layer of a model."""
        quantizer = layer.input_quantizer
        on = isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled
        return LayerFacts(
            layer.format if layer.quantizer.is_enabled else None,
            quantizer.format if on and quantizer is not None else None,
            kind_of(layer.module),
            tuple(layer.weight.shape),
            isinstance(layer.module.weight_quantizer, SequentialQuantizer),
            low_rank_of(layer.module) is not None,
            layer.name,
        )


class HasFormats(Protocol):
    """A layer of a plan, such as `detent.checkpoints.LayerFormats`."""

    @property
    def weight(self) -> Format | None: ...
    @property
    def input(self) -> Format | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class ModelWork(Protocol):
    """What an algorithm of scope ``model`` is handed."""

    model: nn.Module

    def run_mode(self, mode: Any, step: QuantizeAlgorithmConfig) -> None:
        """Run a mode (see `detent.algorithms.modes`)."""

    def rotate(self, step: Any) -> None:
        """Rotate the model."""


class Handler(Generic[C]):
    """What the library asks of an algorithm; the defaults are those of one that is solved site by site.

    Attributes:
        scope: what it is handed; see `Scope`.
        block_by_block: whether it is better off traversing the model block by block.
        from_latents: whether it starts from what weights were before they were rounded.
        finds_ranges: whether weights and activations have ranges after it.
        scales_channels: whether it gives sites channel scales.
    """

    scope: Scope = "site"
    block_by_block: bool = True
    from_latents: bool = False
    finds_ranges: bool = True
    scales_channels: bool = False

    @property
    def learns_from_data(self) -> bool:
        """Whether it can't do without calibration data."""
        return self.scope in ("site", "block", "end")

    @property
    def searches_weights(self) -> bool:
        """Whether it finds ranges from weights alone."""
        return type(self).range_of is not Handler.range_of

    # ---- before anything runs ---------------------------------------------------------------------------------------

    def parts(self, step: C) -> Sequence[QuantizeAlgorithmConfig]:
        """The algorithms that it is composed of."""
        return [step]

    def alone(self, step: C) -> QuantizeAlgorithmConfig:
        """What it is where nothing trains the rounded model after it."""
        return step

    def wants(self, step: C) -> Wanted:
        """The statistics that it needs at each site."""
        return Wanted()

    def refusal(self, step: C, layer: LayerFacts) -> str | None:
        """Why it can't serve a layer whose weight is quantized; None if it can."""
        return None

    def leaves(self, step: C, layer: LayerFacts) -> LayerFacts:
        """The layer after it, for the algorithms that follow."""
        return layer

    def needs_blocks(self, step: C) -> bool:
        """Whether the user has to know if the model can't be traversed block by block."""
        return False

    def sees_quantized(self, step: C, layers: Iterable[LayerFacts]) -> bool:
        """Whether it is better off observing a block on what the quantized blocks before it give."""
        return False

    def one_by_one(self, step: C) -> bool:
        """Whether a block's sites are observed one after the other, each with those before it solved."""
        return False

    # ---- at work ----------------------------------------------------------------------------------------------------

    def range_of(self, step: C, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor] | None:
        """(low, high) of a weight's tiles in the shape of the scales, from the weight alone; None: the largest
        magnitude."""
        return None

    def solve(self, step: C, site: SiteWork) -> None:
        """Improve the layers of a site."""
        for layer in site.layers:
            site.set_range_of(layer, step)

    def train(self, step: C, block: BlockWork) -> None:
        """Train a block whose sites are solved (scope ``block``)."""

    def change(self, step: C, work: ModelWork) -> None:
        """Change a whole model (scope ``model``)."""


_handlers: dict[type[QuantizeAlgorithmConfig], Handler[Any]] = {}


def register(config: type[QuantizeAlgorithmConfig]) -> Callable[[H], H]:
    """Serve configurations of this class, and of subclasses that have no handler, by the decorated class.

    Example:
        >>> from detent.algorithms.registry import Handler, forget, register
        >>> from detent.config import ConfigField, QuantizeAlgorithmConfig
        >>> class HalfConfig(QuantizeAlgorithmConfig):
        ...     method: str = ConfigField("half")
        ...     @property
        ...     def needs_data(self):
        ...         return False
        >>> @register(HalfConfig)
        ... class Half(Handler):
        ...     scope = "weight"
        ...     def range_of(self, step, weight, fmt):
        ...         return tuple(bound / 2 for bound in weight_range(weight, fmt))
        >>> forget(HalfConfig)
    """

    def add(handler: H) -> H:
        _handlers[config] = handler()
        method = config.model_fields["method"].default
        ALGORITHMS.setdefault(method, config)
        return handler

    return add


def forget(config: type[QuantizeAlgorithmConfig]) -> None:
    """Undo `register`."""
    del _handlers[config], ALGORITHMS[config.model_fields["method"].default]


def handler_of(step: QuantizeAlgorithmConfig) -> Handler[Any]:
    """The handler of an algorithm.

    Raises:
        DetentError: nothing is registered for its configuration class.
    """
    _load()
    for kind in type(step).__mro__:
        if kind in _handlers:
            return _handlers[kind]
    raise DetentError(f"algorithm {step.method!r}: no handler is registered for {type(step).__name__}")


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(detent.algorithms.__path__):
        importlib.import_module(f"detent.algorithms.{module.name}")


def whole(steps: Iterable[QuantizeAlgorithmConfig]) -> list[QuantizeAlgorithmConfig]:
    """The steps, with composed algorithms expanded into their parts."""
    return [part for step in steps if step.method is not None for part in handler_of(step).parts(step)]


def refusals(
    steps: Iterable[QuantizeAlgorithmConfig],
    layers: Mapping[str, LayerFacts | HasFormats | tuple[Format | None, Format | None, str]],
) -> list[str]:
    """Why algorithms can't serve some of a model's layers, before anything runs; formats alone decide.

    Args:
        steps: the algorithms in order, parsed.
        layers: {module name: its formats}: `LayerFacts`, `detent.checkpoints.LayerFormats` or (weight format, input
            format, kind); None for a side that isn't quantized.

    Returns:
        One message for each algorithm and reason, with the first layer and how many there are; [] if all is well.

    Example:
        >>> from detent.algorithms.registry import refusals
        >>> from detent.config import parse_algorithm, parse_scheme
        >>> refusals(parse_algorithm("gptq"), {"up": (parse_scheme("w_mx6").weight, None, "Linear")})[0][:15]
        'gptq: up: its f'
    """
    facts = {name: replace(layer, name=name) for name, layer in _all_facts(layers) if layer.weight is not None}
    found: dict[tuple[str, str], list[str]] = {}
    for step in whole(steps):
        handler = handler_of(step)
        for name, layer in facts.items():
            reason = handler.refusal(step, layer)
            if reason:
                found.setdefault((str(step.method), reason), []).append(name)
            facts[name] = handler.leaves(step, layer)
    return [
        f"{method}: {names[0]}: {reason}" + (f" ({len(names)} layers like it)" if len(names) > 1 else "")
        for (method, reason), names in found.items()
    ]


def _all_facts(layers: Mapping[str, Any]) -> Iterable[tuple[str, LayerFacts]]:
    return ((name, _facts(layer)) for name, layer in layers.items())


def _facts(layer: LayerFacts | HasFormats | tuple[Format | None, Format | None, str]) -> LayerFacts:
    if isinstance(layer, LayerFacts):
        return layer
    if isinstance(layer, tuple):
        return LayerFacts(*layer)
    return LayerFacts(layer.weight, layer.input, layer.kind, tuple(layer.shape))


# ---- reasons that several algorithms have ---------------------------------------------------------------------------


def codes_together(layer: LayerFacts) -> str | None:
    """For algorithms that choose codes one by one over the matrix of a layer."""
    from detent.algorithms.objective import chooses_codes_together

    fmt = layer.weight
    if fmt is None:
        return None
    if chooses_codes_together(fmt):
        return f"its format {fmt} chooses codes jointly, not one by one; use 'max' or 'mse'"
    if layer.is_convolution and fmt.granularity.kind not in ("per_tensor", "per_channel"):
        return f"its format {fmt} has groups, but a convolution's scales have to be per tensor or per channel"
    return None


def quantized_twice(layer: LayerFacts) -> str | None:
    """For algorithms that train weights."""
    return "its weight is quantized twice, which can't be trained; use 'gptq'" if layer.twice else None


def scale_after_branch(layer: LayerFacts, method: str | None) -> str | None:
    """For algorithms that give a layer's input a channel scale, which would not reach a low-rank branch."""
    return f"it has a low-rank branch; name {method} before svdquant" if layer.branch else None


def with_branch(layer: LayerFacts) -> LayerFacts:
    """The same layer after it was given a low-rank branch."""
    return replace(layer, branch=True)
