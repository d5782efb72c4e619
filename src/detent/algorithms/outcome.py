"""What an algorithm did to one weight: its objective under round-to-nearest (RTN) and after, and what it decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    algorithm: its name.
    objective: what it minimises, in a few words.
    energy: the objective of a weight of zeros, so that the others can be read as shares of it; None if not measured.
    before: the objective under round-to-nearest.
    after: the objective with what was chosen, never above `before`.
    decided: what was chosen, as JSON values.
    notice: what the user has to know, such as that round-to-nearest was kept; "" for nothing.
    kept_plain: whether the weight stays as round-to-nearest has it, since nothing better was found or possible.
    noteworthy: whether `notice` belongs into the summary of a run, and not only into the report's entry of the layer.
    """

    algorithm: str
    objective: str
    before: float
    after: float
    energy: float | None = None
    decided: dict[str, Any] = field(default_factory=dict)
    notice: str = ""
    kept_plain: bool = False
    noteworthy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What the report of a run holds, as JSON values."""
        values = asdict(self)
        del values["kept_plain"], values["noteworthy"]
        return values
