"""Two ways of feeding data to the algorithms: the whole model in one forward pass, or block by block.

Whole model: every site is observed in one run of the calibration loop, then solved. Block by block: a block is
observed, its sites are solved, and its outputs, float or quantized, are what the next block is observed on. Memory for
second moments is then one block's. Layers outside the blocks are observed in a run in which the
blocks are skipped and the last one returns the recorded outputs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detent.algorithms.layer import Layer, layers_of
from detent.algorithms.registry import LayerFacts, handler_of
from detent.algorithms.site import ObservedSite, Wanted
from detent.engine.blocks import BlockChain, NoChain, Run, record_chain, replaced_outputs
from detent.engine.chain import Experts, chain_of
from detent.engine.learn_block import train_block
from detent.engine.learning import coarse
from detent.engine.observe import AllLayersSeen, SiteObserver
from detent.engine.options import Traversal
from detent.engine.solve import Solver
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.model.scopes import quantizers_off, without_cache
from detent.nn import TensorQuantizer
from detent.notices import notify
from detent.progress import track
from detent.statistics import SiteStatistics
from detent.statistics.products import fast_forward
from detent.structure.site import Structure

_log = logging.getLogger(__name__)

#: Bytes of a float block's activations that are kept while its sites are solved one after the other.
REFERENCE_BYTES = 1 << 30


@dataclass(frozen=True)
class Subject:
    """A model that algorithms are run over.

    Attributes:
        model: in eval mode.
        run: feeds it its calibration data, any number of times.
        quantizers: gives every quantizer of the model; all are off while it is observed.
        blocks: names of the blocks that are traversed one by one.
        experts: of the model.
        activation_pass: a context for the run in which the whole model is observed at once, to find activation ranges.
    """

    model: nn.Module
    run: Run
    quantizers: Callable[[], Sequence[TensorQuantizer]]
    blocks: Sequence[str]
    experts: Experts
    activation_pass: Callable[[], AbstractContextManager[None]]

    @staticmethod
    def of(
        model: nn.Module,
        run: Run,
        quantizers: Callable[[], Sequence[TensorQuantizer]],
        structure: Structure | None,
        activation_pass: Callable[[], AbstractContextManager[None]],
    ) -> Subject:
        """One whose blocks and experts are those of `structure`, or are looked for where that is None."""
        blocks = chain_of(model, structure)
        return Subject(model, run, quantizers, blocks, Experts(model, blocks, structure), activation_pass)


def solve_model(subject: Subject, solver: Solver, traversal: Traversal) -> None:
    """Run algorithms that learn from data over a model.

    Args:
        subject: the model, with its data.
        solver: the algorithms.
        traversal: how they get their data.

    Raises:
        DetentError: NaN or infinity in an activation (named: block, site, batch); data that never reaches a layer.
    """
    layers = layers_of(subject.model)
    for layer in layers:
        if not layer.has_rows:
            kind = type(layer.module).__name__
            notify(f"{layer.name}: {kind} has no rows to learn from; using round-to-nearest")
    layers = [layer for layer in layers if layer.has_rows]
    chain = _chain(subject, traversal)
    if chain is None:
        _whole_model(subject, layers, solver)
        return
    try:
        _block_by_block(subject, chain, layers, solver, traversal)
    finally:
        chain.close()


def _whole_model(subject: Subject, layers: list[Layer], solver: Solver) -> None:
    for step in solver.steps:
        if handler_of(step).scope == "block":
            notify(f"{step.method} needs block-by-block processing and was skipped")
    with subject.activation_pass(), quantizers_off(subject.quantizers()), without_cache(subject.model):
        observer = _observe_model(subject, layers, solver.wants())
    _account_for(observer.sites, layers, subject.experts, solver)
    solver.solve(observer.sites, "Whole model")


def _observe_model(subject: Subject, layers: list[Layer], need: Wanted) -> SiteObserver:
    observer = SiteObserver(layers, need, subject.blocks)

    def next_batch(*_: Any) -> None:
        observer.batch += 1

    hook = subject.model.register_forward_hook(next_batch)
    try:
        with observer, fast_forward(layer.module.weight for layer in layers):
            subject.run(subject.model)
    finally:
        hook.remove()
    return observer


def _chain(subject: Subject, traversal: Traversal) -> BlockChain | None:
    """The blocks to go through one by one, or None for the whole model at once."""
    if not traversal.by_blocks:
        return None
    model, names = subject.model, subject.blocks
    weights = (parameter for name in names[:1] for parameter in model.get_submodule(name).parameters())
    with quantizers_off(subject.quantizers()), fast_forward(weights):
        chain = record_chain(model, names, subject.run, spill=traversal.spill)
    if isinstance(chain, NoChain):
        text = f"Processing the whole model at once instead of block by block: {chain.reason}"
        notify(text) if traversal.notifies else _log.info(text)
        return None
    return chain


def _block_by_block(
    subject: Subject, chain: BlockChain, layers: list[Layer], solver: Solver, traversal: Traversal
) -> None:
    """Each block in turn: observe it, solve its sites, train it where an algorithm does, hand its outputs on.

    `inputs` is what the block is fed, `references` what the float model feeds it (where an algorithm needs that):
    both come from the block before and are freed once this block is done, except the recorded inputs of the first.
    """
    inside = {name: [layer for layer in layers if layer.name.startswith(f"{name}.")] for name in chain.names}
    quantized = _sees_quantized(solver, layers, traversal)
    need = solver.wants()
    inputs, references = chain.inputs, chain.inputs if need.references else None
    learner = next((step for step in solver.steps if handler_of(step).scope == "block"), None)
    training = learner is not None and coarse(layers)
    for index, name in enumerate(track(chain.names, "Block by block", len(chain.names))):
        observed = _ObservedBlock(chain, index, inputs, references, need, training)
        outputs = chain.store()
        # 1. Observe and solve.
        if traversal.one_by_one is None:
            # The run that observes also gives the float block's outputs. Where quantized outputs are handed on
            # instead, nothing needs those, and each pass stops once all layers have been called.
            sites = observed.sites(inside[name], None if quantized else outputs, stop=quantized)
            _account_for(sites, inside[name], subject.experts, solver)
            solver.solve(sites)
        else:
            _one_after_the_other(observed, inside[name], traversal.one_by_one, subject.experts, solver)
        # 2. Train the block towards the float block's outputs.
        if learner is not None and observed.float_outputs is not None:
            train_block(chain, index, inputs, observed.float_outputs, inside[name], learner, solver.ledger)
        # 3. Run it once more with its weights quantized. Those on their grid already need no second rounding.
        if quantized:
            with (
                fast_forward(chain.blocks[index].parameters(), training=training),
                quantizers_off(solver.rounded(inside[name])),
            ):
                for output in chain.run_all(index, inputs):
                    outputs.append(output)
        # 4. Free what it was fed. `chain.inputs` stays: `replaced_outputs` runs the blocks on its first batch.
        for done in (inputs, references):
            if done is not None and done is not chain.inputs:
                done.clear()
        inputs, references = outputs, observed.float_outputs
    outside = [layer for layer in layers if not any(layer in members for members in inside.values())]
    if outside:
        off = quantizers_off(subject.quantizers())
        with off, replaced_outputs(chain, inputs), without_cache(subject.model):
            observer = _observe_model(subject, outside, need)
        _account_for(observer.sites, outside, subject.experts, solver)
        solver.solve(observer.sites)


class _ObservedBlock:
    """One block, run on all batches while its sites are observed.

    Where an algorithm compares with the float model, there are two streams of activations::

        inputs     --> the block as it is solved --> outputs
        references --> a float copy of it        --> float_outputs, the references of the next block

    and each statistic pairs what a layer reads in the first with what it reads in the second. The float copy runs once
    per batch if what its layers read fits into `REFERENCE_BYTES`; later runs over the same batches reuse that.
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
        self._float_inputs: dict[int, dict[str, list[torch.Tensor]]] = {}
        self._kept_bytes = 0
        #: What the float copy gives for the references, once it has run.
        self.float_outputs: TensorStore | None = None
        self.keep_float_block()

    def keep_float_block(self) -> None:
        """Copy the block as it is now, and forget what was read from an earlier copy."""
        self._float_block = None if self._references is None else copy.deepcopy(self._chain.blocks[self._index])
        self._float_inputs.clear()

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
            batches: only the first ones, by their number.
            need: other statistics than the block's usual ones.
            leaders: layers whose inputs in the float block are kept for later runs; by default `layers`.
            stop: end each pass once all layers have been called, from the second batch on.
        """
        chain, index = self._chain, self._index
        block = chain.blocks[index]
        count = len(self._inputs) if batches is None else batches
        observer = SiteObserver(layers, self._need if need is None else need, chain.names, stop=stop, batches=count)
        # A run over the first batches alone (which only shows the sites) pairs nothing, and must not fill the store.
        if self._references is not None and self.float_outputs is None and batches is None:
            self.float_outputs = chain.store()
        own = [module for module in block.modules() if isinstance(module, TensorQuantizer)]
        device = chain.device(index)
        with quantizers_off(own), observer, fast_forward(block.parameters(), training=self._training):
            for batch in range(count):
                observer.batch = batch
                if self.float_outputs is not None:
                    observer.references = self._read(batch, layers if leaders is None else leaders, device)
                try:
                    output = chain.run(index, batch, self._inputs.get(batch, device))
                except AllLayersSeen:
                    continue
                if outputs is not None:
                    outputs.append(output)
        return observer.sites

    def _read(self, batch: int, layers: Sequence[Layer], device: torch.device) -> dict[str, list[torch.Tensor]]:
        """What `layers` read in the float copy for a batch; runs it unless an earlier run was kept."""
        assert self._references is not None
        assert self._float_block is not None
        assert self.float_outputs is not None
        if batch in self._float_inputs:
            return {name: list(tensors) for name, tensors in self._float_inputs[batch].items()}
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
        if len(self.float_outputs) == batch:  # not yet stored by an earlier run over the batches
            self.float_outputs.append(output)
        self._kept_bytes += sum(t.numel() * t.element_size() for tensors in read.values() for t in tensors)
        if self._kept_bytes <= REFERENCE_BYTES:
            self._float_inputs[batch] = {name: list(tensors) for name, tensors in read.items()}
        return read


def _one_after_the_other(
    observed: _ObservedBlock, layers: list[Layer], first: int, experts: Experts, solver: Solver
) -> None:
    """Solve a block's sites one by one, each observed with the ones before it solved.

    Steps before number `first` run beforehand, on all sites: what they fold into other layers has to be in place
    before those are rounded.
    """
    sites = observed.sites(layers, batches=None if first else 1, need=None if first else Wanted())
    if first:
        _account_for(sites, layers, experts, solver)
        solver.solve(sites, steps=solver.steps[:first])
        observed.keep_float_block()  # the scaled block computes the same function, but its layers read other values
    leaders = [site.layers[0] for site in sites]
    for site in sites:
        for again in observed.sites(site.layers, leaders=leaders, stop=True):
            solver.solve([again], steps=solver.steps[first:])
    seen = {layer.name for site in sites for layer in site.layers}
    late = [layer for layer in layers if layer.name not in seen]
    if late:  # not called in the first batch: experts
        observed.keep_float_block()
        rest = observed.sites(late)
        _account_for(rest, late, experts, solver)
        solver.solve(rest, steps=solver.steps[first:])


def _sees_quantized(solver: Solver, layers: Sequence[Layer], traversal: Traversal) -> bool:
    """Whether a block is observed on the outputs of quantized blocks: as asked for, or as algorithms prefer."""
    if traversal.inputs is not None:
        return traversal.inputs == "quantized"
    facts = [LayerFacts.of(layer) for layer in layers]
    return any(handler_of(step).sees_quantized(step, facts) for step in solver.steps)


def _account_for(sites: Sequence[ObservedSite], layers: Sequence[Layer], experts: Experts, solver: Solver) -> None:
    """Layers that data never reached: experts are solved without data, others are an error.

    Raises:
        DetentError: a layer saw no data, and isn't an expert whose siblings did.
    """
    seen = {layer.name for site in sites for layer in site.layers}
    unseen = [layer for layer in layers if layer.name not in seen]
    if not unseen:
        return
    lost = [layer.name for layer in unseen if not any(twin in seen for twin in experts.twins(layer.name))]
    if lost:
        raise DetentError(unreached(lost, "layers"))
    solver.solve([ObservedSite([layer], SiteStatistics.empty(layer.width, second_moment=False)) for layer in unseen])


def unreached(names: Sequence[str], what: str) -> str:
    """The message for modules that data never reached."""
    return (
        f"the calibration data never reached {len(names)} {what} (for instance {', '.join(names[:3])}): the model"
        " doesn't call them on this data, or a fast path uses their weights without calling them; exclude them in the"
        " configuration, or feed data that uses them"
    )
