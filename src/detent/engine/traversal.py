"""Two ways of feeding data to the algorithms: the whole model in one forward pass, or block by block.

Whole model: every site is observed in one run of the calibration loop, then solved. Block by block: a block is
observed, its sites are solved, and its outputs, float or quantized, are what the next block is observed on. Memory for
second moments is then one block's. Layers outside the blocks are observed in a run in which the
blocks are skipped and the last one returns the recorded outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from detent.algorithms.layer import Layer, layers_of
from detent.algorithms.registry import LayerFacts, handler_of
from detent.algorithms.site import ObservedSite, Wanted
from detent.algorithms.weight_ranges import calibrate_weight, quantized_weights, weight_quantizers
from detent.config.algorithm import QuantizeAlgorithmConfig
from detent.engine.blocks import BlockChain, NoChain, record_chain, replaced_outputs
from detent.engine.data_loop import DataLoop
from detent.engine.host import CannotStream, Host
from detent.engine.learn_block import train_block
from detent.engine.learning import coarse
from detent.engine.observe import SiteObserver
from detent.engine.observed_block import ObservedBlock
from detent.engine.options import Traversal
from detent.engine.processes import check_same_block
from detent.engine.solve import Solver
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.model.scopes import quantizers_off, without_cache
from detent.model.usage import quantizer_usage
from detent.nn import TensorQuantizer
from detent.notices import notify
from detent.progress import track
from detent.statistics import SiteStatistics
from detent.statistics.products import fast_forward
from detent.structure.chain import Experts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model that algorithms are run over.

    Attributes:
        model: in eval mode.
        run: feeds it its calibration data, any number of times.
        quantizers: gives every quantizer of the model; all are off while it is observed.
        blocks: names of the blocks that are traversed one by one.
        experts: of the model.
        waiting: the quantizers whose ranges have to be found from data.
        ranges: gives a context for a run of a model, or of a block of it, in which these of its quantizers find theirs.
        host: where the blocks are.
        changed: gives the names of the parameters outside of quantized weights that have other values now.
    """

    model: nn.Module
    run: DataLoop
    quantizers: Callable[[], Sequence[TensorQuantizer]]
    blocks: Sequence[str]
    experts: Experts
    waiting: Sequence[TensorQuantizer]
    ranges: Callable[..., AbstractContextManager[None]]
    host: Host
    changed: Callable[[], set[str]]

    def waiting_in(self, module: nn.Module) -> list[TensorQuantizer]:
        """Those of `waiting` that are in a part of the model."""
        inside = {id(member) for member in module.modules()}
        return [quantizer for quantizer in self.waiting if id(quantizer) in inside]


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
        _ranges_of_others(subject.model, layers, solver)
        return
    try:
        _block_by_block(subject, chain, layers, solver, traversal)
    finally:
        chain.close()


def _whole_model(subject: Subject, layers: list[Layer], solver: Solver) -> None:
    for step in solver.steps:
        if handler_of(step).scope == "block":
            notify(f"{step.method} needs block-by-block processing and was skipped")
    ranges = subject.ranges(subject.model, subject.waiting)
    with ranges, quantizers_off(subject.quantizers()), without_cache(subject.model):
        sites = _observe_model(subject, layers, solver.wants())
    _account_for(sites, layers, subject.experts, solver)
    solver.solve(sites, "Whole model")


def _observe_model(subject: Subject, layers: list[Layer], need: Wanted) -> list[ObservedSite]:
    observer = SiteObserver(layers, need, subject.blocks, starts=subject.run.starts)

    def next_batch(*_: Any) -> None:
        observer.batch += 1

    hook = subject.model.register_forward_hook(next_batch)
    try:
        with observer, fast_forward(layer.module.weight for layer in layers):
            subject.run(subject.model)
    finally:
        hook.remove()
    return observer.all_sites()


def _chain(subject: Subject, traversal: Traversal) -> BlockChain | None:
    """The blocks to go through one by one, or None for the whole model at once."""
    if not (traversal.by_blocks or subject.host.streams):
        return None
    model, names = subject.model, subject.blocks
    weights = (parameter for name in names[:1] for parameter in model.get_submodule(name).parameters())
    with quantizers_off(subject.quantizers()), fast_forward(weights):
        chain = record_chain(model, names, subject.run, spill=traversal.spill, host=subject.host)
    if isinstance(chain, NoChain):
        if subject.host.streams:
            raise CannotStream(chain.reason)
        text = f"Processing the whole model at once instead of block by block: {chain.reason}"
        notify(text) if traversal.notifies else _log.info(text)
        return None
    return chain


def _block_by_block(
    subject: Subject, chain: BlockChain, layers: list[Layer], solver: Solver, traversal: Traversal
) -> None:
    """Each block in turn, and what it gives handed on to the next.

    `inputs` is what the block is fed, `references` what the float model feeds it (where an algorithm needs that):
    both come from the block before and are freed once this block is done, except the recorded inputs of the first.
    """
    inside = {name: [layer for layer in layers if layer.name.startswith(f"{name}.")] for name in chain.names}
    need, host = solver.wants(), subject.host
    work = _BlockWork(subject, chain, solver, traversal, _sees_quantized(solver, layers, traversal))
    start, inputs, references = host.resumed() or (
        0,
        chain.inputs,
        chain.inputs if need.references else None,
    )
    for index, name in enumerate(track(chain.names, "Block by block", len(chain.names))):
        if index < start:
            continue
        with host.block(name):
            outputs, float_outputs = work.done(index, inputs, references, inside[name])
            check_same_block(chain.blocks[index], name)
            host.finished(name, solver.ledger, subject.changed())
        # Free what it was fed, but for the recorded inputs of the first block.
        for done in (inputs, references):
            if done is not None and done is not chain.inputs:
                done.clear()
        inputs, references = outputs, float_outputs
        if index + 1 < len(chain.names):
            host.handed_on(index + 1, inputs, references)
    _outside(
        subject, chain, inputs, [layer for layer in layers if not any(layer in m for m in inside.values())], solver
    )


def _outside(subject: Subject, chain: BlockChain, inputs: TensorStore, layers: list[Layer], solver: Solver) -> None:
    """What isn't in a block, observed in a run in which the blocks are skipped."""
    model = subject.model
    found = {id(q) for block in chain.blocks for q in subject.waiting_in(block)}
    waiting = [q for q in subject.waiting if id(q) not in found]
    weights = weight_quantizers(model, {id(inner) for block in chain.blocks for inner in block.modules()})
    if not waiting and not any(True for _ in weights):
        return
    with subject.host.outside(whole=True):
        if solver.learns and layers:
            off = quantizers_off(subject.quantizers())
            with off, replaced_outputs(chain, inputs), without_cache(model):
                sites = _observe_model(subject, layers, solver.wants())
            _account_for(sites, layers, subject.experts, solver)
            solver.solve(sites)
        _ranges_of_others(model, layers, solver, but=chain.blocks)
        if waiting:
            with subject.ranges(model, waiting), replaced_outputs(chain, inputs), without_cache(model):
                subject.run(model)
        if subject.host.streams:
            with quantizer_usage(model) as usage, replaced_outputs(chain, inputs), without_cache(model):
                subject.run.first(model)
            usage.check()
            for layer in layers:
                check_same_block(layer.module, layer.name)
        subject.host.finished("", solver.ledger, subject.changed())


def _ranges_of_others(
    module: nn.Module, layers: Sequence[Layer], solver: Solver, but: Iterable[nn.Module] = (), prefix: str = ""
) -> None:
    """Ranges of the quantized weights in a module that no site has, from the weights alone: all of them where nothing
    learns from data, else embeddings and the like.

    Args:
        module: a model, or a block of it, whose weights have values.
        layers: those of sites.
        solver: what was done to these.
        but: parts of it that are left out.
        prefix: of the names in it.
    """
    done = {id(inner) for part in but for inner in part.modules()}
    steps: Sequence[QuantizeAlgorithmConfig | None] = solver.steps
    if solver.learns:
        done |= {id(layer.module) for layer in layers}
        steps = [None]
    for step in steps:
        for name, quantizer, weight in quantized_weights(module, but=done):
            calibrate_weight(f"{prefix}{name}", quantizer, weight, step)


class _BlockWork:
    """What is done to each block: observe it, solve its sites, train it where an algorithm does, find its ranges."""

    def __init__(
        self, subject: Subject, chain: BlockChain, solver: Solver, traversal: Traversal, quantized: bool
    ) -> None:
        self._subject, self._chain, self._solver, self._traversal = subject, chain, solver, traversal
        self._quantized = quantized
        self._learner = next((step for step in solver.steps if handler_of(step).scope == "block"), None)

    def done(
        self, index: int, inputs: TensorStore, references: TensorStore | None, layers: list[Layer]
    ) -> tuple[TensorStore, TensorStore | None]:
        """Solve block `index`; returns what enters the next one, as `inputs` and `references`."""
        subject, chain, solver = self._subject, self._chain, self._solver
        block, outputs = chain.blocks[index], chain.store()
        training = self._learner is not None and coarse(layers)
        float_outputs = None
        if solver.learns:
            observed = ObservedBlock(chain, index, inputs, references, solver.wants(), training, subject.run)
            self._solve(observed, layers, outputs)
            float_outputs = observed.float_outputs
            if self._learner is not None and float_outputs is not None:
                train_block(chain, index, inputs, float_outputs, layers, self._learner, solver.ledger)
        _ranges_of_others(block, layers, solver, prefix=f"{chain.names[index]}.")
        # Ranges of activations, of the block as its weights are now. Where nothing was observed, this run gives the
        # float block's outputs too.
        waiting = subject.waiting_in(block)
        if waiting or not solver.learns:
            own = [module for module in block.modules() if isinstance(module, TensorQuantizer)]
            with subject.ranges(block, waiting, of_block=True), quantizers_off(own), fast_forward(block.parameters()):
                for output in chain.run_all(index, inputs):
                    if not solver.learns:
                        outputs.append(output)
        # Once more with its weights quantized. Those on their grid already need no second rounding.
        if self._quantized:
            with (
                fast_forward(block.parameters(), training=training),
                quantizers_off(solver.rounded(layers)),
            ):
                for output in chain.run_all(index, inputs):
                    outputs.append(output)
        if subject.host.streams:
            _check_used(chain, index, inputs)
        return outputs, float_outputs

    def _solve(self, observed: ObservedBlock, layers: list[Layer], outputs: TensorStore) -> None:
        first, experts, solver = self._traversal.one_by_one, self._subject.experts, self._solver
        if first is not None:
            _one_after_the_other(observed, layers, first, experts, solver)
            return
        # The run that observes also gives the float block's outputs. Where quantized outputs are handed on
        # instead, nothing needs those, and each pass stops once all layers have been called.
        sites = observed.sites(layers, None if self._quantized else outputs, stop=self._quantized)
        _account_for(sites, layers, experts, solver)
        solver.solve(sites)


def _check_used(chain: BlockChain, index: int, inputs: TensorStore) -> None:
    """A block has to compute with every quantizer that is on."""
    with quantizer_usage(chain.blocks[index], f"{chain.names[index]}.") as usage:
        chain.run(index, 0, inputs.get(0, chain.device(index)))
    usage.check()


def _one_after_the_other(
    observed: ObservedBlock, layers: list[Layer], first: int, experts: Experts, solver: Solver
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
