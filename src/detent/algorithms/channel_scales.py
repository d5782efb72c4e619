"""Channel scales at a site: what a search found, and putting it to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from detent.algorithms.objective import energy_of
from detent.algorithms.outcome import Outcome
from detent.algorithms.site_work import SiteWork

#: The ends of what a channel scale can be.
LEAST, MOST = 1e-4, 1e4


@dataclass(frozen=True)
class ScaleChoice:
    """Attributes: scale: float32 [in]. alpha, beta: exponents of activation and weight. before, after: the objective
    without and with it."""

    scale: Tensor
    alpha: float
    beta: float
    before: float
    after: float


def take_scale(
    site: SiteWork,
    name: str,
    objective: str,
    choice: ScaleChoice,
    measure: Callable[[Tensor], float] | None = None,
) -> None:
    """Use a scale that a search found, or say that none is better than round-to-nearest. `measure`: of an error."""
    helps = choice.after < choice.before
    share = len(site.layers)
    for layer in site.layers:
        energy = None
        if share == 1 and measure is not None:  # else the objective isn't this layer's
            energy = energy_of(layer.matrix(), measure)
        outcome = Outcome(
            name,
            objective + (f", {share} layers sharing it" if share > 1 else ""),
            choice.before,
            choice.after,
            energy,
            {"alpha": choice.alpha, "beta": choice.beta} if helps else {},
            "" if helps else "no channel scale beat round-to-nearest; keeping round-to-nearest",
            kept_plain=not helps,
            noteworthy=not helps,
        )
        site.note(layer, outcome)
    if helps:
        site.scale_channels(choice.scale)


def leave_alone(site: SiteWork, name: str, objective: str, why: str) -> None:
    """Say that a site takes no scale."""
    for layer in site.layers:
        error = site.output_error(layer)
        notice = f"keeping round-to-nearest: {why}"
        site.note(layer, Outcome(name, objective, error, error, notice=notice, kept_plain=True, noteworthy=True))
