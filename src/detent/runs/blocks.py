"""Quantizing a checkpoint with data, block by block: each is read, calibrated, solved, kept and freed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.site_work import Ledger
from detent.checkpoints import ModelFormats, Source
from detent.config import QuantizeConfig
from detent.data.batches import CalibrationBatches
from detent.distributed import size
from detent.engine import quantization
from detent.engine.data_loop import DataLoop
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.formats import Scales
from detent.model.kv_cache import check_cache, floor_kv_scales, kv_scales
from detent.model.skeleton import model_without_weights
from detent.nn import QuantWeightBase
from detent.plan.plan import Plan
from detent.runs.journal import FinishedUnit, Journal
from detent.runs.simulate import Quantized, SimulatedLayer, layer_as_quantized, share_outer_scales
from detent.runs.streamed import StreamedBlocks
from detent.structure.chain import chain_of


def quantize_by_blocks(
    source: Source,
    plan: Plan,
    config: Any,
    batches: CalibrationBatches,
    journal: Journal | None,
    dtype: torch.dtype,
    min_kv_scale: float,
    device: str,
    spill: bool,
    **options: Any,
) -> tuple[Quantized | None, dict[str, torch.dtype]]:
    """Quantize a checkpoint whose plan says that it can be done block by block.

    Args:
        source, plan, config: the checkpoint.
        batches: calibration data.
        journal: where finished blocks are, and go; None where another process keeps them.
        dtype: of the model.
        min_kv_scale: the least scale of keys and values.
        device: where a block is calibrated.
        spill: whether hidden states are kept on disk.
        options: as for `model_without_weights`.

    Returns:
        What was quantized, where there is a journal, and the dtype of each parameter.

    Raises:
        CannotStream: blocks hand on more than their outputs.
        DetentError: as `simulate`.
    """
    model = model_without_weights(source, config, dtype=dtype, **options)
    stream = BlockStream(source, plan, model, journal, device=device, min_kv_scale=min_kv_scale, spill=spill)
    if plan.formats.kv_cache is not None:
        with stream.on_demand():
            check_cache(model)
    held = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    return stream.run(DataLoop.of(batches, torch.device(device))), held


#: What is outside of the blocks, in the journal.
OUTSIDE = "outside"


class BlockStream(StreamedBlocks):
    """The blocks of a model that come from a checkpoint one by one, and go into a journal.

    Args:
        source: the checkpoint. plan: of it, which `streams_blocks`.
        model: from `model_without_weights`.
        journal: where finished blocks go; None for nowhere.
        device: where a block is calibrated.
        min_kv_scale: the least scale of keys and values.
        spill: whether hidden states are kept on disk.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        model: nn.Module,
        journal: Journal | None,
        *,
        device: str = "cpu",
        min_kv_scale: float = 0.0,
        spill: bool = False,
    ) -> None:
        self._plan, self._journal, self._min_kv_scale = plan, journal, min_kv_scale
        states = (journal.path if journal else Path(gettempdir())) if spill else None
        super().__init__(source, plan.names, model, chain_of(model, plan.structure), device=device, states=states)

    def resumed(self) -> tuple[int, TensorStore, TensorStore | None] | None:
        return self._journal.resumed() if self._journal and size() == 1 else None

    @torch.no_grad()
    def finished(self, name: str, ledger: Ledger, changed: set[str]) -> None:
        """Keep what was made of a block, or of what is outside of the blocks."""
        if self._journal is None:
            return
        plan, within = self._plan, self._within(name)
        layers = [layer for layer in plan.formats.layers if within(layer)]
        share_outer_scales(self._model, [g for g in plan.groups_with_common_scale if all(map(within, g))])
        records = [self._quantized(layer, ledger) for layer in layers]
        quantized = {f"{r.record.name}.weight" for r in records if r.record.weight is not None}
        values = {p: self._model.get_parameter(p).detach() for p in sorted(changed - quantized) if within(p)}
        part = self._model.get_submodule(name)
        kv = {}
        if plan.formats.kv_cache is not None and name:
            floor_kv_scales(part, self._min_kv_scale)
            kv = {f"{name}.{module}": pair for module, pair in kv_scales(part).items()}
        self._journal.write(self._unit(name), records, values, kv, plan.formats)

    def _quantized(self, name: str, ledger: Ledger) -> SimulatedLayer:
        module = self._model.get_submodule(name)
        assert isinstance(module, QuantWeightBase)
        quantizes = self._plan.formats.layers[name].weight is not None
        weight = module.to_output_first(module.weight.detach(), module).contiguous() if quantizes else None
        outcomes, error = ledger.outcomes.get(name, []), ledger.errors.get(name)
        return layer_as_quantized(name, module, self._plan, weight, outcomes, error)

    def _within(self, name: str) -> Callable[[str], bool]:
        if name:
            return lambda part: part.startswith(f"{name}.")
        return lambda part: not any(part.startswith(f"{block}.") for block in self._blocks)

    def _unit(self, name: str) -> str:
        return f"{self._blocks.index(name):05d}" if name else OUTSIDE

    def handed_on(self, index: int, inputs: TensorStore, references: TensorStore | None) -> None:
        if self._journal and size() == 1:
            self._journal.keep(index, inputs, references)

    # ---- the whole run ----------------------------------------------------------------------------------------------

    def run(self, loop: DataLoop) -> Quantized | None:
        """Quantize what the journal doesn't have yet.

        Returns:
            What the journal has then; None without one.

        Raises:
            CannotStream: the model can't be calibrated block by block.
            DetentError: as `simulate`.
        """
        plan, journal, units = self._plan, self._journal, [self._unit(name) for name in self._blocks]
        outside = [layer for layer in plan.formats.layers if self._within("")(layer)]
        if outside:
            units.append(OUTSIDE)
        if journal is None or not all(map(journal.has, units)):
            config = QuantizeConfig(quant_cfg=plan.quant_cfg, algorithm=plan.algorithms or "max")
            quantization.run(self._model, config, loop, structure=plan.structure, fold="auto", host=self)
        if journal is None:
            return None
        return Journaled(plan.formats, [journal.unit(unit) for unit in units if journal.has(unit)])


class Journaled:
    """What a journal holds: a `Quantized`."""

    untied = False

    def __init__(self, formats: ModelFormats, units: list[FinishedUnit]) -> None:
        self._unit_of = {layer: unit for unit in units for layer in unit.formats.layers}
        self.formats = replace(formats, layers={name: u.formats.layers[name] for name, u in self._unit_of.items()})
        if formats.layers.keys() != self.formats.layers.keys():
            missing = min(formats.layers.keys() - self.formats.layers.keys())
            raise DetentError(f"{missing} was planned and not quantized; please report this")
        self.values: dict[str, Tensor] = {name: value for unit in units for name, value in unit.values.items()}
        self.kv: dict[str, tuple[Scales, ...]] = {name: pair for unit in units for name, pair in unit.kv.items()}

    def layer(self, name: str, *, measured: bool = True) -> SimulatedLayer:
        return self._unit_of[name].layer(name)
