"""Two ways of bringing data to the algorithms: the whole model in one forward pass, or block by block.

Whole model: every site is observed in one run of the calibration loop, then solved. Block by block: a block is
observed, its sites are solved, and its outputs, float or quantized, are what the next block is observed on. Memory for
second moments is then one block's. What lies outside the blocks is observed in a run with the blocks' outputs put in
place.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from detent.algorithms.layer import Layer, layers_of
from detent.algorithms.site import ObservedSite, Wanted
from detent.config.algorithm import (
    AutoRoundCalibConfig,
    BlockAPCalibConfig,
    DataAlgorithmConfig,
    GPTQCalibConfig,
    QuantizeAlgorithmConfig,
    SmoothQuantCalibConfig,
)
from detent.engine.blocks import BlockChain, NoChain, Run, record_chain, replaced_outputs
from detent.engine.learn_block import tune_block
from detent.engine.learning import coarse
from detent.engine.observe import Seen, SiteObserver
from detent.engine.solve import Solver, wanted
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.model.scopes import quantizers_off, without_cache
from detent.nn import TensorQuantizer
from detent.notices import notify
from detent.progress import track
from detent.statistics import SiteStatistics
from detent.statistics.products import fast_forward
from detent.structure.chain import block_names

_log = logging.getLogger(__name__)

#: Bytes of a float block's activations that are kept while its sites are solved one after the other.
REFERENCE_BYTES = 1 << 30
#: Algorithms that learn block by block, by gradients.
_LEARNING = (AutoRoundCalibConfig, BlockAPCalibConfig)


def solve_model(
    model: nn.Module,
    steps: Sequence[QuantizeAlgorithmConfig],
    run: Run,
    solver: Solver,
    quantizers: Callable[[], Sequence[TensorQuantizer]],
    together: Callable[[], AbstractContextManager[None]],
) -> None:
    """Run algorithms that learn from data over a model.

    Args:
        model: in eval mode.
        steps: the algorithms, at least one of them a `DataAlgorithmConfig`.
        run: feeds the model its calibration data, any number of times.
        solver: solves a site.
        quantizers: every quantizer of the model; all are quantizers_off while it is observed.
        together: what else looks on where the whole model is observed in one run.

    Raises:
        DetentError: NaN or infinity in an activation (named: block, site, batch); data that never reaches a layer.
    """
    layers = layers_of(model)
    need = wanted(steps)
    for layer in layers:
        if not layer.has_rows:
            notify(f"{layer.name}: {type(layer.module).__name__} has no rows to learn from; it is rounded plainly")
    layers = [layer for layer in layers if layer.has_rows]
    chain = _chain(model, steps, run, quantizers)
    if chain is None:
        for step in steps:
            if isinstance(step, _LEARNING):
                notify(f"{step.method} learns block by block, so it did nothing: the model is taken as a whole")
        with together(), quantizers_off(quantizers()), without_cache(model):
            observer = _observe_model(model, run, layers, need)
        _account_for(observer.sites, layers, model, block_names(model), solver)
        solver.solve(observer.sites, "Whole model")
        return
    try:
        _block_by_block(model, chain, layers, need, steps, run, solver, quantizers)
    finally:
        chain.close()


def _observe_model(model: nn.Module, run: Run, layers: list[Layer], need: Wanted) -> SiteObserver:
    observer = SiteObserver(layers, need, block_names(model))

    def next_batch(*_: Any) -> None:
        observer.batch += 1

    hook = model.register_forward_hook(next_batch)
    try:
        with observer, fast_forward(layer.module.weight for layer in layers):
            run(model)
    finally:
        hook.remove()
    return observer


def _chain(
    model: nn.Module,
    steps: Sequence[QuantizeAlgorithmConfig],
    run: Run,
    quantizers: Callable[[], Sequence[TensorQuantizer]],
) -> BlockChain | None:
    """The blocks to go through one by one, or None for the whole model at once."""
    data_steps = [step for step in steps if isinstance(step, DataAlgorithmConfig)]
    asked = [step.layerwise for step in data_steps if step.layerwise is not None]
    default = any(not isinstance(step, SmoothQuantCalibConfig) for step in data_steps)
    if not (asked[-1] if asked else default):
        return None
    names = block_names(model)
    weights = (parameter for name in names[:1] for parameter in model.get_submodule(name).parameters())
    with quantizers_off(quantizers()), fast_forward(weights):
        chain = record_chain(model, names, run, spill=any(step.spill for step in data_steps))
    if isinstance(chain, NoChain):
        must = any(asked) or any(getattr(step, "retarget", False) for step in data_steps)
        text = f"The model is taken as a whole, not block by block: {chain.reason}"
        notify(text) if must or default else _log.info(text)
        return None
    return chain


def _block_by_block(
    model: nn.Module,
    chain: BlockChain,
    layers: list[Layer],
    need: Wanted,
    steps: Sequence[QuantizeAlgorithmConfig],
    run: Run,
    solver: Solver,
    quantizers: Callable[[], Sequence[TensorQuantizer]],
) -> None:
    inside = {name: [layer for layer in layers if layer.name.startswith(f"{name}.")] for name in chain.names}
    quantized = _quantized_inputs(steps, layers)
    references = chain.inputs if need.references else None
    inputs = chain.inputs
    learned = next((step for step in steps if isinstance(step, _LEARNING)), None)
    training = learned is not None and coarse(layers)
    for index, name in enumerate(track(chain.names, "Block by block", len(chain.names))):
        observed = _ObservedBlock(chain, index, inputs, references, need, training)
        rounding = next((i for i, step in enumerate(steps) if getattr(step, "sequential", False)), None)
        floats = chain.store()
        if rounding is None:
            sites = observed.sites(inside[name], None if quantized else floats, stop=quantized)
            _account_for(sites, inside[name], model, chain.names, solver)
            solver.solve(sites)
        else:
            _one_after_the_other(observed, inside[name], rounding, model, solver)
        if learned is not None and observed.made is not None:
            tune_block(chain, index, inputs, observed.made, inside[name], learned, solver.latents)
        if quantized:
            with (
                fast_forward(chain.blocks[index].parameters(), training=training),
                quantizers_off(solver.grids(inside[name])),
            ):
                for output in chain.run_all(index, inputs):
                    floats.append(output)
        if inputs is not chain.inputs:
            inputs.clear()
        if references is not None and references is not chain.inputs:
            references.clear()
        inputs, references = floats, observed.made
    outside = [layer for layer in layers if not any(layer in members for members in inside.values())]
    if outside:
        with quantizers_off(quantizers()), replaced_outputs(chain, inputs), without_cache(model):
            observer = _observe_model(model, run, outside, need)
        _account_for(observer.sites, outside, model, chain.names, solver)
        solver.solve(observer.sites)


class _ObservedBlock:
    """One block, run on all batches while its sites are observed; where references are wanted, the float block beside
    it.

    What layers read in the float block is kept from the first run for later ones, as far as `REFERENCE_BYTES` go.
    """

    def __init__(
        self,
        chain: BlockChain,
        index: int,
        inputs: TensorStore,
        references: TensorStore | None,
        need: Wanted,
        training: bool,
    ) -> None:
        self.names, self._training = chain.names, training
        self._chain, self._index, self._inputs, self._need = chain, index, inputs, need
        self._references = references
        self._kept: dict[int, dict[str, list[torch.Tensor]]] = {}
        self._bytes = 0
        #: What the float block makes of the references, once it has run.
        self.made: TensorStore | None = None
        self.keep_float_block()

    def keep_float_block(self) -> None:
        """Take the block as it is now for the one that makes references."""
        self._float_block = None if self._references is None else copy.deepcopy(self._chain.blocks[self._index])
        self._kept.clear()

    def sites(
        self,
        layers: Sequence[Layer],
        outputs: TensorStore | None = None,
        *,
        batches: int | None = None,
        need: Wanted | None = None,
        leaders: Sequence[Layer] | None = None,
        stop: bool = False,
    ) -> list[ObservedSite]:
        """The sites of `layers`, with statistics.

        Args:
            layers: of this block.
            outputs: where the block's outputs go.
            batches: only so many.
            need: other statistics than the block's usual ones.
            leaders: layers whose inputs in the float block are kept for later runs; by default `layers`.
            stop: leave the rest of the block out once all layers were called, from the second batch on.
        """
        chain, index = self._chain, self._index
        block = chain.blocks[index]
        count = len(self._inputs) if batches is None else batches
        observer = SiteObserver(layers, self._need if need is None else need, chain.names, stop=stop, batches=count)
        if self._references is not None and self.made is None and batches is None:
            self.made = chain.store()
        own = [module for module in block.modules() if isinstance(module, TensorQuantizer)]
        device = chain.device(index)
        with quantizers_off(own), observer, fast_forward(block.parameters(), training=self._training):
            for batch in range(count):
                observer.batch = batch
                if self.made is not None:
                    observer.references = self._read(batch, layers if leaders is None else leaders, device)
                try:
                    output = chain.run(index, batch, self._inputs.get(batch, device))
                except Seen:
                    continue
                if outputs is not None:
                    outputs.append(output)
        return observer.sites

    def _read(self, batch: int, layers: Sequence[Layer], device: torch.device) -> dict[str, list[torch.Tensor]]:
        """What `layers` read in the float block; runs it, unless that is known from an earlier run."""
        assert self._references is not None
        assert self._float_block is not None
        assert self.made is not None
        if batch in self._kept:
            return {name: list(tensors) for name, tensors in self._kept[batch].items()}
        read: dict[str, list[torch.Tensor]] = {}
        prefix = f"{self.names[self._index]}."
        inside = dict(self._float_block.named_modules())
        hooks = [
            inside[layer.name.removeprefix(prefix)].register_forward_pre_hook(
                lambda _, args, name=layer.name: read.setdefault(name, []).append(args[0])
            )
            for layer in layers
        ]
        try:
            with quantizers_off([module for module in inside.values() if isinstance(module, TensorQuantizer)]):
                output = self._chain.run(self._index, batch, self._references.get(batch, device), self._float_block)
        finally:
            for hook in hooks:
                hook.remove()
        if len(self.made) == batch:
            self.made.append(output)
        self._bytes += sum(t.numel() * t.element_size() for tensors in read.values() for t in tensors)
        if self._bytes <= REFERENCE_BYTES:
            self._kept[batch] = {name: list(tensors) for name, tensors in read.items()}
        return read


def _one_after_the_other(
    observed: _ObservedBlock, layers: list[Layer], rounding: int, model: nn.Module, solver: Solver
) -> None:
    """Solve a block's sites one by one, each observed with the ones before it rounded.

    Steps before number `rounding` run first, on all sites: what they fold into other layers has to be there before
    those are rounded.
    """
    names = observed.names
    sites = observed.sites(layers, batches=None if rounding else 1, need=None if rounding else Wanted())
    if rounding:
        _account_for(sites, layers, model, names, solver)
        solver.solve(sites, steps=solver.steps[:rounding])
        observed.keep_float_block()
    leaders = [site.layers[0] for site in sites]
    for site in sites:
        for again in observed.sites(site.layers, leaders=leaders, stop=True):
            solver.solve([again], steps=solver.steps[rounding:])
    seen = {layer.name for site in sites for layer in site.layers}
    late = [layer for layer in layers if layer.name not in seen]
    if late:  # not called in the first batch: experts
        observed.keep_float_block()
        rest = observed.sites(late)
        _account_for(rest, late, model, names, solver)
        solver.solve(rest, steps=solver.steps[rounding:])


def _quantized_inputs(steps: Sequence[QuantizeAlgorithmConfig], layers: Sequence[Layer]) -> bool:
    """Whether a block is observed on what quantized blocks give.

    As asked. Else `autoround`, `block_ap` and `gptq` do, but for `gptq` with 4 bits or more under float activations:
    there it changes perplexity by less than the noise of the calibration text, and costs a second forward pass.
    """
    asked = [s.inputs for s in steps if isinstance(s, DataAlgorithmConfig) and s.inputs is not None]
    if asked:
        return asked[-1] == "quantized"
    coarse = any(
        layer.format.element.bits < 4 or (layer.input_quantizer is not None and layer.input_quantizer.is_enabled)
        for layer in layers
    )
    return any(
        isinstance(step, _LEARNING)
        or (isinstance(step, GPTQCalibConfig) and (coarse or step.retarget or step.sequential))
        for step in steps
    )


def _account_for(
    sites: Sequence[ObservedSite], layers: Sequence[Layer], model: nn.Module, blocks: Sequence[str], solver: Solver
) -> None:
    """Layers that data never reached: experts are solved without data, others are an error.

    An expert lies in a member of a list of modules (not of the chain of blocks) of which another member's same layer
    saw data.

    Raises:
        DetentError: a layer that isn't an expert saw nothing.
    """
    seen = {layer.name for site in sites for layer in site.layers}
    unseen = [layer for layer in layers if layer.name not in seen]
    if not unseen:
        return
    lists = [
        [f"{name}.{child}" for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    lists = [members for members in lists if not set(blocks) & set(members)]
    lost = [layer.name for layer in unseen if not _is_expert(layer.name, lists, seen)]
    if lost:
        raise DetentError(
            f"the calibration data never reached {len(lost)} layers (for instance {', '.join(lost[:3])}); exclude them"
            " in the configuration or feed data that uses them"
        )
    solver.solve([ObservedSite([layer], SiteStatistics.empty(layer.width, second_moment=False)) for layer in unseen])


def _is_expert(name: str, lists: Sequence[Sequence[str]], seen: set[str]) -> bool:
    for members in lists:
        own = next((member for member in members if name.startswith(f"{member}.")), None)
        if own is not None:
            suffix = name.removeprefix(own)
            return any(f"{member}{suffix}" in seen for member in members if member != own)
    return False
