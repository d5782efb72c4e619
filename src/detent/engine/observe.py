"""Observing sites: which layers read one activation, and the statistics of what they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.layer import Layer
from detent.algorithms.site import ObservedSite, Wanted
from detent.engine.calls import PassOver
from detent.engine.processes import combined
from detent.padding import drop_padding
from detent.statistics import SiteStatistics

#: A second moment sums over `MOMENT_TOKENS` tokens, or `TOKENS_A_CHANNEL` per channel if that is more. Where there are
#: more, and it is known in how many batches they come, evenly spread ones of each batch represent all of them.
MOMENT_TOKENS, TOKENS_A_CHANNEL = 1 << 14, 8


class SiteObserver:
    """Gathers statistics of what `layers` read while it is active (a context manager).

    Layers that are called with the very same tensor form a site. That is decided at their first call; layers of a site
    that are later called with different tensors get separate sites.

    What the layers read in the float model can be put into `references` for a batch; what is observed next is paired
    with it.

    `blocks`: names of the model's blocks, for messages. `stop`: end the forward pass with `PassOver` once all of
    `layers` were called; not in the first batch, and not where one of them is called twice in it. `batches`: how many
    there are, in all processes; None if that isn't known. `starts`: how many tokens of the data come before each batch
    of this process; () if that isn't known.

    Attributes:
        batch: number of the batch that runs, for messages.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        wanted: Wanted,
        blocks: Sequence[str] = (),
        *,
        stop: bool = False,
        batches: int | None = None,
        starts: Sequence[int] = (),
    ) -> None:
        self._layers = [layer for layer in layers if layer.has_rows]
        self._wanted, self._blocks, self._stop, self._batches = wanted, blocks, stop, batches
        self._starts = starts
        self._site_of: dict[str, ObservedSite] = {}
        self._hooks: list[Any] = []
        #: How often each layer was called in the first batch, and which were in the one that runs.
        self._calls: Counter[str] = Counter()
        self._called: set[str] = set()
        self._at = 0
        #: {layer: what it reads in the float model}, for the batch that is observed next.
        self.references: dict[str, list[Tensor]] = {}
        self.batch = 0

    @property
    def sites(self) -> list[ObservedSite]:
        """The sites seen so far, in the order of their first call."""
        return list({id(site): site for site in self._site_of.values()}.values())

    def all_sites(self) -> list[ObservedSite]:
        """The sites, with what all processes have seen there."""
        return combined(self.sites, self._layers, self._empty)

    def __enter__(self) -> SiteObserver:
        for layer in self._layers:
            self._hooks.append(
                layer.module.register_forward_pre_hook(
                    lambda _, args, kwargs, layer=layer: self._see(layer, args, kwargs), with_kwargs=True
                )
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.references.clear()
        for site in self.sites:
            site._last = None

    def _see(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor):
            return
        site = self._site_of.get(layer.name)
        if site is None:
            site = self._join(layer, x)
        elif site.layers[0] is not layer and site._last is not x:
            site = self._part(site, layer)
        if site.layers[0] is layer:
            kept = self.references.get(layer.name)
            site._last = x
            self._update(site, x, kept.pop(0) if kept else None)
        if self._stop:
            self._stop_if_all_called(layer)

    def _stop_if_all_called(self, layer: Layer) -> None:
        if self.batch == 0:
            self._calls[layer.name] += 1
            return
        if self._at != self.batch:
            self._at, self._called = self.batch, set()
        self._called.add(layer.name)
        if len(self._called) == len(self._layers) and max(self._calls.values(), default=0) == 1:
            raise PassOver

    def _join(self, layer: Layer, x: Tensor) -> ObservedSite:
        for site in self.sites:
            if site._last is x and type(site.layers[0].module) is type(layer.module) and _alike(site.layers[0], layer):
                site.layers.append(layer)
                self._site_of[layer.name] = site
                return site
        site = self._site_of[layer.name] = ObservedSite([layer], self._empty(layer))
        return site

    def _empty(self, layer: Layer) -> SiteStatistics:
        return SiteStatistics.empty(
            layer.width,
            second_moment=self._wanted.second_moment,
            cross_moment=self._wanted.cross_moment,
            sample_size=self._wanted.rows(layer.width),
            device=layer.module.weight.device,
        )

    def _part(self, site: ObservedSite, layer: Layer) -> ObservedSite:
        """A separate site for a layer that used to share one, with the statistics so far."""
        site.layers.remove(layer)
        own = self._site_of[layer.name] = ObservedSite(
            [layer], site.statistics.divided(torch.ones_like(site.statistics.low))
        )
        return own

    def _update(self, site: ObservedSite, x: Tensor, reference: Tensor | None) -> None:
        layer = site.layers[0]
        block = next((f"block {name}, " for name in self._blocks if layer.name.startswith(f"{name}.")), "")
        where = f"{block}batch {self.batch}: {site.name}"
        site.statistics.update(
            layer.rows(_transformed(layer, x)),
            where,
            None if reference is None else layer.rows(_transformed(layer, reference)),
            self._most(layer.width),
            self._starts[self.batch] if self.batch < len(self._starts) else None,
        )

    def _most(self, channels: int) -> int | None:
        """Rows of a batch that go into second moments."""
        return None if self._batches is None else -(-max(MOMENT_TOKENS, TOKENS_A_CHANNEL * channels) // self._batches)


def _alike(a: Layer, b: Layer) -> bool:
    """Whether two layers see the same rows of the same tensor."""
    first, second = a.input_quantizer, b.input_quantizer
    if (first is None) != (second is None) or a.width != b.width:
        return False
    if isinstance(a.module, nn.Linear) or first is None or second is None:
        same = True
    else:  # convolutions: the same patches
        keys = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        same = all(getattr(a.module, key) == getattr(b.module, key) for key in keys)
    if first is None or second is None:
        return same
    scales = first.pre_quant_scale, second.pre_quant_scale
    if (scales[0] is None) != (scales[1] is None):
        return False
    equal = scales[0] is None or scales[1] is None or torch.equal(scales[0], scales[1])
    return same and equal and first.rotation == second.rotation


def _transformed(layer: Layer, x: Tensor) -> Tensor:
    x = drop_padding(x) if isinstance(layer.module, nn.Linear) else x
    quantizer = layer.input_quantizer
    return x if quantizer is None or x.numel() == 0 else quantizer.transform(x)
