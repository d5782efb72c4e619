"""One block of a model, run on all batches while its sites are observed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from detent.algorithms.layer import Layer
from detent.algorithms.site import ObservedSite, Wanted
from detent.distributed import rank, size
from detent.engine.blocks import BlockChain
from detent.engine.calls import PassOver
from detent.engine.data_loop import DataLoop
from detent.engine.observe import SiteObserver
from detent.engine.store import TensorStore
from detent.model.scopes import quantizers_off
from detent.nn import TensorQuantizer
from detent.statistics.products import fast_forward

#: Bytes of a float block's activations that are kept while its sites are solved one after the other.
REFERENCE_BYTES = 1 << 30


class ObservedBlock:
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
        data: DataLoop,
    ) -> None:
        self.names, self._training = chain.names, training
        self._chain, self._index, self._inputs, self._need = chain, index, inputs, need
        self._data = data
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
            batches: only the first ones of all processes, by their number.
            need: other statistics than the block's usual ones.
            leaders: layers whose inputs in the float block are kept for later runs; by default `layers`.
            stop: end each pass once all layers have been called, from the second batch on.
        """
        chain, index = self._chain, self._index
        block = chain.blocks[index]
        count = len(self._inputs) if batches is None else len(range(rank(), batches, size()))
        observer = SiteObserver(
            layers,
            self._need if need is None else need,
            chain.names,
            stop=stop,
            batches=self._data.batches or count,
            starts=self._data.starts,
        )
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
                except PassOver:
                    continue
                if outputs is not None:
                    outputs.append(output)
        return observer.all_sites()

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
