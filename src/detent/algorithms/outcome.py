"""What an algorithm did to one weight: its objective with plain rounding and after, and what it decided."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    algorithm: its name.
    objective: what it minimises, in a few words.
    energy: the objective of a weight of zeros, so that the others can be read as shares of it; None if not measured.
    before: the objective with plain rounding.
    after: the objective with what was chosen, never above `before`.
    decided: what was chosen, as JSON values.
    notice: what the user has to know, such as that plain rounding was kept; "" for nothing.
    """

    algorithm: str
    objective: str
    before: float
    after: float
    energy: float | None = None
    decided: dict[str, Any] = field(default_factory=dict)
    notice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
