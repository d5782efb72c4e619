"""Channel scales folded into the weights of a model, where its structure has a proved place for them.

A scale s divides the activation of a site and multiplies the columns of all weights that read it. Folded, the division
is done by the module before: a norm's weight, or the rows of a linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from detent.algorithms.site_work import Tie
from detent.structure.site import Fold, Site, Structure, fold_scale, scale_columns, tie_scale, weight_parameter


class Folding:
    """The folds of a model's sites, and what was changed by using them.

    Attributes:
        structure: of the model.
        changed: names of parameters outside of quantized weights that have other values now.
        rows: whether any scale went into the rows of a linear layer, which changes what that layer gives.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._model, self.structure = model, structure
        self._sites = {weight: site for site in structure.sites for weight in site.weights}
        self.changed: set[str] = set()
        self.rows = False

    def reason(self, layers: list[str]) -> str:
        """Why the layers of an activation take no scale; "" if they do."""
        sites = [self._sites.get(name) for name in layers]
        site = sites[0]
        if site is None or any(other is not site for other in sites):
            return "the model's structure shows no site for it"
        if site.fold is None or not site.fold.proved or site.experts:
            return f"its scale cannot be folded anywhere ({site.reason or 'fused experts'})"
        parts = [(self._model.get_submodule(site.fold.module), name) for name in site.fold.parameters]
        if any((parameter := module._parameters.get(name)) is not None and parameter.is_meta for module, name in parts):
            return f"its scale would go into {site.fold.module}, which is in another block"
        return ""

    def tie(self, layers: list[str]) -> Tie:
        """Makes a scale foldable for these layers, whose `reason` is empty."""
        _, fold = self._fold(layers)
        return lambda scale: tie_scale(fold, scale)

    def apply(self, layers: list[str], scale: Tensor) -> list[str]:
        """Fold a scale; the columns of `layers` themselves are left to the caller.

        Returns:
            Names of the modules whose parameters have changed.
        """
        site, fold = self._fold(layers)
        fold_scale(self._model, fold, scale)
        self.changed |= {f"{fold.module}.{name}" for name in fold.parameters}
        self.rows = self.rows or fold.kind == "rows"
        others = [name for name in site.weights if name not in layers]
        for name in others:
            _, attribute = weight_parameter(self._model, name)
            owner = name if attribute == "weight" else name.rpartition(".")[0]
            self.changed.add(f"{owner}.{attribute}")
        scale_columns(self._model, site, scale, others)
        return [fold.module, *others]

    def _fold(self, layers: list[str]) -> tuple[Site, Fold]:
        site = self._sites[layers[0]]
        assert site.fold is not None
        return site, site.fold
