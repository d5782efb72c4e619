"""From statistics to weights: the algorithms of a list, one after the other, at the sites of a block or of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detent.algorithms.layer import Layer
from detent.algorithms.mse import least_error_range, multipliers
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import handler_of
from detent.algorithms.site import ObservedSite, Wanted
from detent.algorithms.site_work import Ledger, SiteWork, Stage, squared_error
from detent.config.algorithm import QuantizeAlgorithmConfig
from detent.distributed import dealt, rank
from detent.engine.processes import hand_over
from detent.formats import FloatScale
from detent.nn import TensorQuantizer
from detent.notices import notify
from detent.progress import track


class Solver:
    """The algorithms of a list, at work on the sites of a block or of a model.

    Attributes:
        steps: their configurations, in order.
        ledger: what they have done so far.
    """

    def __init__(self, steps: Sequence[QuantizeAlgorithmConfig], ledger: Ledger, min_tokens: int) -> None:
        self.steps, self.ledger, self._min_tokens = steps, ledger, min_tokens
        ledger.keeps_latents = any(handler_of(step).from_latents for step in steps)

    @property
    def learns(self) -> bool:
        """Whether any step learns from data."""
        return any(handler_of(step).learns_from_data for step in self.steps)

    def wants(self) -> Wanted:
        """The statistics that the steps need, combined."""
        need = Wanted()
        for step in self.steps:
            need |= handler_of(step).wants(step)
        return need

    @torch.no_grad()
    def solve(
        self, sites: Sequence[ObservedSite], task: str = "", steps: Sequence[QuantizeAlgorithmConfig] | None = None
    ) -> None:
        """Run the steps, each on all sites before the next: a scale that is folded changes another site's weights.

        Args:
            sites: of a block, or of the model.
            task: what progress is shown as; "" for none.
            steps: only these of the steps.
        """
        work = [SiteWork(site, self.ledger) for site in sites]
        # Several processes share the sites out, unless what is done to one may change the weights of another.
        owners = dealt([_cost(site) for site in work])
        everything, apart = work, not any(handler_of(step).scales_channels for step in self.steps)
        if apart:
            work = [site for site, owner in zip(work, owners, strict=True) if owner == rank()]
        unfed: set[SiteWork] = set()
        for step in self.steps if steps is None else steps:
            handler = handler_of(step)
            for site in track(work, f"{task}: {step.method}", len(work)) if task else work:
                if handler.scope == "weight" or site.statistics.tokens >= self._min_tokens:
                    handler.solve(step, site)
                elif handler.scope != "end" and site not in unfed:
                    unfed.add(site)
                    _solve_without_data(site, str(step.method), self._min_tokens)
        for site in work:
            site.finish()
        for site, owner in zip(everything, owners, strict=True) if apart else ():
            hand_over(site.readers, owner, self.ledger)

    def rounded(self, layers: Sequence[Layer]) -> list[TensorQuantizer]:
        """Quantizers of weights that are on their grids already."""
        return [
            layer.quantizer
            for layer in layers
            if self.ledger.state(layer).stage is Stage.ROUNDED and layer.quantizer is layer.module.weight_quantizer
        ]


def _cost(site: SiteWork) -> int:
    """About how much work a site is: a factorization, and a product with it for each weight."""
    return sum(layer.width**2 * (layer.width // len(site.readers) + len(layer.weight)) for layer in site.readers)


def _solve_without_data(site: SiteWork, algorithm: str, wanted: int) -> None:
    """The rule for layers that saw too few tokens: the scales of least squared error, without data."""
    for layer in site.layers:
        text = (
            f"{layer.name}: only {site.statistics.tokens} tokens reached it ({algorithm} needs {wanted}); using"
            " minimum-MSE scales instead"
        )
        notify(text)
        site.set_range_of(layer, None)
        fmt = layer.format
        if isinstance(fmt.scale, FloatScale) and layer.quantizer.needs_calibration:
            low, high = least_error_range(layer.matrix(), fmt, multipliers(0.05, 0.4, 1.0))
            site.set_range(layer, low, high)
        error = squared_error(layer)
        site.note(layer, Outcome(algorithm, "squared error of the weight", error, error, notice=text))
