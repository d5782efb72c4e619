"""`local_hessian`: `mse` with the error weighed by the second moment of the layer's inputs, G.

Objective: ``tr(D G D^T)``, D = W - Q(W), with G's block under each group of columns, or its diagonal; see
`detent.algorithms.scale_search`. The range of round-to-nearest is among the candidates and wins ties.
"""

from __future__ import annotations

from detent.algorithms.mse import multipliers
from detent.algorithms.registry import Handler, LayerFacts, codes_together, register
from detent.algorithms.scale_search import take_ranges, weighings, weighted_range
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork
from detent.config.algorithm import LocalHessianCalibConfig
from detent.formats import FloatScale


@register(LocalHessianCalibConfig)
class LocalHessianHandler(Handler[LocalHessianCalibConfig]):
    """The range of least weighted error of each tile."""

    def wants(self, step: LocalHessianCalibConfig) -> Wanted:
        return Wanted(second_moment=True)

    def refusal(self, step: LocalHessianCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer)

    def solve(self, step: LocalHessianCalibConfig, site: SiteWork) -> None:
        factors = multipliers(step.step_size, step.start_multiplier, step.stop_multiplier)
        weighed = weighings(site, block=step.weighting == "block")
        for layer in site.layers:
            fmt, rule = layer.format, layer.format.scale
            choice = weighted_range(
                layer.matrix(),
                fmt,
                weighed[fmt],
                factors,
                fp8_scale_sweep=step.fp8_scale_sweep
                and isinstance(rule, FloatScale)
                and rule.outer
                and rule.dtype == "e4m3",
                global_amax=site.amax_behind(fmt),
            )
            take_ranges(site, layer, str(step.method), weighed[fmt], choice)
