"""What a quantized checkpoint says about a model, whatever its layout on disk.

Two levels: *formats* (`LayerFormats`, `ModelFormats`) are known before any weight is touched, and decide which layout
can hold the model; *contents* (`LayerCheckpoint`) are one layer's codes and scales. `describe` and `parse_description`
turn formats into JSON and back, each distinct format written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from detent.errors import DetentError
from detent.external.files import check_as, shown
from detent.external.schemas import LayoutDescription
from detent.formats import FloatScale, Format, QTensor, Scales

#: The version of the JSON description that `describe` writes.
DESCRIPTION_VERSION = 1
#: What of an attention module has scales, in this order: keys, values, queries and probabilities.
ATTENTION_SIDES = ("k", "v", "q", "p")
#: Fields that few layers use; written only where set.
_EXTRAS = ("rotated", "low_rank")


@dataclass(frozen=True)
class Activation:
    """How one input or output of a layer is quantized.

    Attributes:
        format: its format.
        scales: calibrated scales, or None where they are computed from each tensor (``format.dynamic``). A static
            format with an outer scale (NVFP4) has a calibrated outer scale and block scales computed for each
            tensor: `scales` then holds the outer scale, and an empty `scale`.
    """

    format: Format
    scales: Scales | None = None

    def __post_init__(self) -> None:
        if self.format.dynamic and self.scales is not None:
            raise DetentError(f"a dynamic activation format has no calibrated scales: {self.format}")
        if not self.format.dynamic and self.scales is None:
            raise DetentError(f"a static activation format needs calibrated scales: {self.format}")


@dataclass(frozen=True)
class LayerFormats:
    """The formats of one layer.

    Attributes:
        shape: the logical shape of its weight, say (out, in).
        weight, input, output: a format, or None for what is kept in floating point.
        kind: the class of its module: "Linear", "Embedding", "Conv2d", ...
        rotated: size of the blocks in which its input is first rotated by a Hadamard matrix; 0: it is not.
        low_rank: rank of a branch in floating point alongside the weight; 0: none.
    """

    shape: tuple[int, ...]
    weight: Format | None = None
    input: Format | None = None
    output: Format | None = None
    kind: str = "Linear"
    rotated: int = 0
    low_rank: int = 0

    @property
    def calibrated(self) -> list[tuple[str, Format]]:
        """The sides that have calibrated scales, "input" and "output", with their formats."""
        sides = (("input", self.input), ("output", self.output))
        return [(side, fmt) for side, fmt in sides if fmt is not None and not fmt.dynamic]


@dataclass(frozen=True)
class ModelFormats:
    """The formats of a model.

    Attributes:
        layers: by module name ("model.layers.0.self_attn.q_proj"), every layer of which anything is quantized.
        kv_cache: the format of keys and values, or None.
        attention: the format of queries and of attention probabilities, or None.
        keys_rotated: whether queries and keys are rotated by a Hadamard matrix before keys are quantized.
        ignored: what stays in floating point: names of modules, or patterns (``re:...``) of them. Every matrix that an
            engine might take for a linear layer must be either here or in `layers`: engines read "all but these".
        aliases: {name in the file: name in transformers' model class} of the layers where the two differ.
        merges: whether transformers merges weights that stay (experts) out of several tensors while it loads them.
    """

    layers: Mapping[str, LayerFormats]
    kv_cache: Format | None = None
    ignored: tuple[str, ...] = ()
    attention: Format | None = None
    keys_rotated: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    merges: bool = False


@dataclass(frozen=True)
class LayerCheckpoint:
    """The contents of one layer.

    Attributes:
        name: the module's name.
        shape: the logical shape of its weight.
        weight: codes and scales, or None where the weight stays in floating point.
        input, output: see `Activation`; None where not quantized.
        kind: the class of its module.
        rotated: see `LayerFormats`.
        low_rank: the branch's matrices [rank, in] and [out, rank], or None.
    """

    name: str
    shape: tuple[int, ...]
    weight: QTensor | None = None
    input: Activation | None = None
    output: Activation | None = None
    kind: str = "Linear"
    rotated: int = 0
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def formats(self) -> LayerFormats:
        return LayerFormats(
            shape=self.shape,
            weight=self.weight.format if self.weight else None,
            input=self.input.format if self.input else None,
            output=self.output.format if self.output else None,
            kind=self.kind,
            rotated=self.rotated,
            low_rank=0 if self.low_rank is None else len(self.low_rank[0]),
        )


def assemble(
    name: str,
    layer: LayerFormats,
    weight: Callable[[Format], QTensor],
    calibrated: Callable[[str, Format], Scales],
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> LayerCheckpoint:
    """A layer's contents from two readers: of the weight, and of the calibrated scales of "input" or "output"."""

    def activation(side: str, fmt: Format | None) -> Activation | None:
        if fmt is None:
            return None
        return Activation(fmt, None if fmt.dynamic else calibrated(side, fmt))

    return LayerCheckpoint(
        name=name,
        shape=layer.shape,
        weight=None if layer.weight is None else weight(layer.weight),
        input=activation("input", layer.input),
        output=activation("output", layer.output),
        kind=layer.kind,
        rotated=layer.rotated,
        low_rank=low_rank,
    )


@dataclass
class _FormatTable:
    """Distinct formats in order of first use."""

    index: dict[Format, int] = field(default_factory=dict)

    def number(self, fmt: Format | None) -> int | None:
        return None if fmt is None else self.index.setdefault(fmt, len(self.index))


def describe(formats: ModelFormats) -> dict[str, Any]:
    """`formats` as JSON-able data; :func:`parse_description` reads it back."""
    table = _FormatTable()
    layers = {
        name: {
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weight": table.number(layer.weight),
            "input": table.number(layer.input),
            "output": table.number(layer.output),
            **{key: value for key in _EXTRAS if (value := getattr(layer, key))},
        }
        for name, layer in formats.layers.items()
    }
    kv_cache, attention = table.number(formats.kv_cache), table.number(formats.attention)
    return {
        "version": DESCRIPTION_VERSION,
        "formats": [fmt.to_dict() for fmt in table.index],
        "layers": layers,
        "kv_cache": kv_cache,
        "ignored": list(formats.ignored),
        **({} if attention is None else {"attention": attention}),
        **({"keys_rotated": True} if formats.keys_rotated else {}),
    }


def parse_description(description: dict[str, Any], where: str) -> ModelFormats:
    """The inverse of :func:`describe`.

    Raises:
        DetentError: naming `where`, if the description is of a newer version, or isn't a description.
    """
    version = description.get("version")
    if version != DESCRIPTION_VERSION:
        raise DetentError(
            f"{where}: written in version {shown(version)} of the layout; this Detent reads version"
            f" {DESCRIPTION_VERSION}. Install the Detent that wrote it, or a newer one"
        )
    check_as(LayoutDescription, description, f"{where}: the description of its formats is damaged")
    table = [Format.from_dict(fmt) for fmt in description["formats"]]

    def numbered(number: int | None) -> Format | None:
        return None if number is None else table[number]

    layers = {
        name: LayerFormats(
            shape=tuple(layer["shape"]),
            weight=numbered(layer["weight"]),
            input=numbered(layer["input"]),
            output=numbered(layer["output"]),
            kind=layer["kind"],
            **{key: layer[key] for key in _EXTRAS if key in layer},
        )
        for name, layer in description["layers"].items()
    }
    return ModelFormats(
        layers,
        numbered(description["kv_cache"]),
        tuple(description["ignored"]),
        numbered(description.get("attention")),
        description.get("keys_rotated", False),
    )


def exported_format(fmt: Format) -> Format:
    """The format as a checkpoint describes it: dynamic blocks under a calibrated outer scale count as static there."""
    calibrated = isinstance(fmt.scale, FloatScale) and fmt.scale.outer
    return fmt.as_dynamic(False) if calibrated else fmt
