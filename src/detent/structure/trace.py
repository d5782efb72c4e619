"""What one run under a probe recorded: the readings of cuts, in order, and what is known of their producers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from detent.structure.norms import Scaling


@dataclass(frozen=True, eq=False)
class Leaf:
    """The output of a cut. Attributes: kind: "rows", "norm" or "embedding". axis: of channels, from the end."""

    producer: str
    kind: str
    axis: int
    size: int


@dataclass
class Reading:
    """The input of a cut (kind "weight" or "norm") or an output of the model (kind "output").

    Attributes:
        name: of the weight or the norm; of the output.
        axis: of the weight's parameter that counts its columns.
        tensor: the input with channels last, [rows, channels], part of autograd's graph; None once it was looked at.
        leaves: what it depends on.
        sums: its rows under random weights, float64 [COMBINATIONS, channels]: what it is remembered by.
        rows: number of rows.
        whole: whether all of the weight's columns read it.
    """

    kind: str
    name: str
    tensor: Tensor | None
    leaves: dict[Leaf, Tensor]
    sums: Tensor
    rows: int
    axis: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Producer:
    """What is known of a cut's output side.

    Attributes:
        module, parameters, axis: as in `Fold`; no parameters where nothing can be scaled.
        scaling: for norms.
    """

    kind: str
    module: str
    parameters: tuple[str, ...]
    axis: int
    scaling: Scaling | None = None


@dataclass
class Trace:
    """What one run showed.

    Attributes:
        readings: in the order of the run.
        producers: by name.
        keys, values: the weights that make attention's keys and values.
        choosers: by weight whose output is ranked, its number of rows.
        fused: by weight that is used in equal parts, one of them at a time, the number of parts; and whether they are
            stored one after the other in a matrix [parts * n, .] rather than in [parts, ., .].
        embeddings: the tables in which something was looked up.
        used: weights that took part in anything but a product.
        taken: weights that a module other than their own multiplied with.
    """

    readings: list[Reading] = field(default_factory=list)
    producers: dict[str, Producer] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    values: dict[str, None] = field(default_factory=dict)
    choosers: dict[str, int] = field(default_factory=dict)
    fused: dict[str, tuple[int, bool]] = field(default_factory=dict)
    embeddings: dict[str, None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    taken: dict[str, None] = field(default_factory=dict)
