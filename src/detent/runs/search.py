"""Choosing a scheme for each layer of a checkpoint, block by block: what ``quant_scheme auto`` does before the plan.

One pass forward keeps what enters each block; one back takes gradients through one block at a time, and scores its
layers on what both have left (`detent.search.scores`, the measure ``curvature``). So a block and the hidden states are
all that has to fit into memory, and hidden states can go to disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from detent.algorithms.weight_ranges import calibrate_weight
from detent.distributed import launched
from detent.engine.blocks import BlockChain, NoChain, record_chain, replaced_outputs
from detent.engine.data_loop import DataLoop
from detent.engine.host import CannotStream
from detent.engine.store import TensorStore
from detent.errors import DetentError
from detent.external.files import placed, unreadable, user_path
from detent.model.conversion import attributes_of, replace_quant_module, set_attributes
from detent.model.scopes import without_cache
from detent.model.skeleton import model_without_weights
from detent.nn import TensorQuantizer
from detent.padding import token_mask
from detent.plan.plan import Plan
from detent.pretrained.loading import load_tokenizer
from detent.progress import track
from detent.report.run_report import ChosenFormat, SearchReport
from detent.runs.options import CalibrationOptions, ModelOptions, SchemeOptions
from detent.runs.prepare import Prepared, calibration_batches, prepare
from detent.runs.run import Run
from detent.runs.streamed import StreamedBlocks
from detent.search.candidates import Candidate
from detent.search.options import NONE
from detent.search.outcome import auto_quantize_table, solve_state, state_of
from detent.search.scores import Curvature, Scores, curvature_scores, gradients_at, layer_of, own_loss
from detent.search.units import Unit, grouped
from detent.structure.chain import chain_of


def search_schemes(
    folder: Path, model: ModelOptions, options: SchemeOptions, calibration: CalibrationOptions, run: Run
) -> tuple[SchemeOptions, SearchReport]:
    """The scheme of each layer, as options for a run, and a report of the choice.

    Args:
        folder: the checkpoint. model: how it is held.
        options: with `auto`.
        calibration: the data to score on.
        run: the run in progress.

    Raises:
        DetentError: a format isn't valid, or can't be used for this checkpoint; the budget can't be met; the model
            has no chain of blocks.
    """
    auto = options.auto
    assert auto is not None
    if options.group_size_per_layer or options.group_size is not None:
        raise DetentError(
            "scheme auto: group sizes stand in the names of the formats, such as w_int4_per_group_g64_sym; leave out"
            " group_size and group_size_per_layer"
        )
    if launched()[0]:
        raise DetentError("scheme auto searches in one process; start a single one")
    quiet = Run()
    plans = {name: prepare(folder, model, replace(options, name=name, auto=None), None, quiet) for name in auto.formats}
    first = next(iter(plans.values()))
    candidates = _candidates({name: prepared.plan for name, prepared in plans.items()}, first.dtype)
    groups = grouped(list(candidates), first.plan.structure)
    units = [Unit(group, (NONE, *_distinct(group, candidates))) for group in groups]
    written = {tensor for prepared in plans.values() for tensor in prepared.plan.parameters}
    other = sum(info.nbytes for name, info in first.source.tensors.items() if name not in written)
    constraints = {"effective_bits": auto.effective_bits, "bytes": auto.bytes}

    def state(scores: Scores, steps: int) -> dict[str, Any]:
        shares = {} if first.plan.structure is None else first.plan.structure.routed_shares(first.config)
        return state_of(units, candidates, scores, shares, method="curvature", steps=steps, other_bytes=other)

    solve_state(state({}, 0), constraints)  # a budget that can't be met is said before the work
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    batches = calibration_batches(calibration, tokenizer, first.config, model.model_dir is None, run)
    scores: Scores = {unit.name: dict.fromkeys(unit.options[1:], 0.0) for unit in units}
    loop = DataLoop.of(batches, torch.device(model.device))
    _Pass(first, model, candidates, {name: scores[u.name] for u in units for name in u.modules}, loop).run()
    found = state(scores, len(batches))
    found["best"] = solve_state(found, constraints)
    if auto.scores is not None:
        path = user_path(auto.scores)
        try:
            placed(path, lambda fresh: fresh.write_text(json.dumps(found), encoding="utf-8"))
        except OSError as error:
            raise unreadable(path, error) from None
    picks = zip(units, found["best"]["recipe"].values(), strict=True)
    chosen = tuple((name, pick) for unit, pick in picks if pick != NONE for name in unit.modules)
    if not chosen:
        raise DetentError("scheme auto: the budget leaves every layer in floating point; lower it")
    return replace(options, auto=None, chosen=chosen), _report(found)


def _report(state: Mapping[str, Any]) -> SearchReport:
    best = state["best"]
    rows = [ChosenFormat(**row) for row in auto_quantize_table(state)]
    bits = best["constraints"]["effective_bits"]
    return SearchReport(
        effective_bits=bits, bytes=best["constraints"]["bytes"], score=best["score"], gap=best["gap"], choices=rows
    )


def _candidates(plans: Mapping[str, Plan], dtype: torch.dtype) -> dict[str, Candidate]:
    """The layers whose weights some plan quantizes, with what each plan does to them."""
    found: dict[str, Candidate] = {}
    for name, plan in plans.items():
        for layer, formats in plan.formats.layers.items():
            if formats.weight is None:
                continue
            count = math.prod(formats.shape)
            candidate = found.setdefault(layer, Candidate(layer, {"weight": count}, dtype.itemsize * 8))
            candidate.bits[name] = formats.weight.bits_per_element(formats.shape) * count
            module: Any = plan.skeleton.get_submodule(layer)
            candidate.settings[name] = {
                leaf: attributes_of(quantizer)
                for leaf in ("weight_quantizer", "input_quantizer", "output_quantizer")
                if (quantizer := getattr(module, leaf)).is_enabled
            }
    for candidate in found.values():
        for name in (NONE, *plans):
            candidate.bits.setdefault(name, float(candidate.count * candidate.float_bits))
    return found


def _distinct(group: Sequence[str], candidates: Mapping[str, Candidate]) -> list[str]:
    """Names of what the layers of a group may become, one for each that differs."""
    names = dict.fromkeys(name for layer in group for name in candidates[layer].settings)
    distinct: dict[str, Any] = {}
    for name in names:
        what = [candidates[layer].settings.get(name) for layer in group]
        if what not in distinct.values():
            distinct[name] = what
    return list(distinct)


class _Leaves(TensorStore):
    """What stands in for the outputs of the last block: tensors that gather gradients.

    Attributes:
        last: the one that was asked for last.
    """

    def __init__(self, outputs: TensorStore) -> None:
        super().__init__()
        self._outputs = outputs
        self.last: Tensor | None = None

    def get(self, index: int, device: torch.device) -> Tensor:
        self.last = self._outputs.get(index, device).detach().requires_grad_()
        return self.last


class _Pass:
    """One pass of the data forward and back, block by block.

    Args:
        prepared: the checkpoint. model: how it is held.
        candidates: the layers.
        scores: {layer: {option: score}}, to add to.
        loop: the data.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: ModelOptions,
        candidates: Mapping[str, Candidate],
        scores: Scores,
        loop: DataLoop,
    ) -> None:
        source, config = prepared.source, prepared.config
        self._candidates, self._scores, self._loop = candidates, scores, loop
        self._model = model_without_weights(
            source,
            config,
            dtype=prepared.dtype,
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
        replace_quant_module(self._model)
        self._blocks = chain_of(self._model, prepared.plan.structure)
        states = Path(gettempdir())
        self._host = StreamedBlocks(
            source, prepared.plan.names, self._model, self._blocks, device=model.device, states=states
        )

    @torch.no_grad()
    def run(self) -> None:
        """Raises DetentError: the model can't be run block by block."""
        try:
            chain = record_chain(self._model, self._blocks, self._loop, spill=True, host=self._host)
            if isinstance(chain, NoChain):
                raise CannotStream(chain.reason)
        except CannotStream as error:
            raise DetentError(
                f"scheme auto goes through a model block by block, and this one can't: {error}; use"
                " detent.auto_quantize in Python"
            ) from error
        try:
            self._back(chain)
        finally:
            chain.close()

    def _back(self, chain: BlockChain) -> None:
        entering = [chain.inputs]
        for index, name in enumerate(track(chain.names, "Hidden states", len(chain.names))):
            given = chain.store()
            with self._host.block(name):
                for output in chain.run_all(index, entering[-1]):
                    given.append(output)
            entering.append(given)
        gradients = chain.store()
        inside = tuple(f"{name}." for name in chain.names)
        with self._host.outside(whole=True), without_cache(self._model):
            leaves = _Leaves(entering.pop())
            outside = [name for name in self._scores if not name.startswith(inside)]
            with self._scored(outside), replaced_outputs(chain, leaves):
                for number, call in enumerate(self._loop.calls_of(self._model)):
                    with torch.enable_grad(), token_mask(call.mask):
                        own_loss(self._model(*call.args, **call.kwargs), number).backward()
                    assert leaves.last is not None
                    assert leaves.last.grad is not None
                    gradients.append(leaves.last.grad)
        for index in track(list(reversed(range(len(chain.names)))), "Scoring", len(chain.names)):
            name, before = chain.names[index], chain.store()
            with self._host.block(name), self._scored([n for n in self._scores if n.startswith(f"{name}.")]):
                device = chain.device(index)
                for batch in range(chain.batches):
                    hidden = entering[index].get(batch, device).detach().requires_grad_()
                    with torch.enable_grad():
                        chain.run(index, batch, hidden).backward(gradients.get(batch, device))
                    assert hidden.grad is not None
                    before.append(hidden.grad)
            gradients.clear()
            entering.pop().clear()
            gradients = before

    @contextmanager
    def _scored(self, names: Sequence[str]) -> Iterator[None]:
        """Layers, all of which have their weights, are scored on the backward passes inside the block."""
        seen = {name: Curvature(layer_of(self._model, name)) for name in names}
        modules = {name: self._model.get_submodule(name) for name in names}
        with gradients_at(modules, lambda name, x, kwargs, g: seen[name].see(x[0], g)):
            yield
        rows = {name: curvature.rows() for name, curvature in seen.items()}
        switched = lambda choice: self._switched(choice, rows)  # noqa: E731
        curvature_scores({name: self._scores[name] for name in names}, seen, switched)

    @contextmanager
    def _switched(self, choice: Mapping[str, str], rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Layers are quantized to options, with ranges from their weights and from rows of their inputs."""
        for name, option in choice.items():
            module: Any = self._model.get_submodule(name)
            for leaf, attributes in self._candidates[name].settings.get(option, {}).items():
                set_attributes(self._model, f"{name}.{leaf}", attributes)
            calibrate_weight(name, module.weight_quantizer, module.to_output_first(module.weight, module), None)
            x = rows[name].to(module.weight.dtype)
            if module.input_quantizer.is_enabled:
                module.input_quantizer.calibrate_on(x)
            if module.output_quantizer.is_enabled:
                module.output_quantizer.calibrate_on(module(x))
        try:
            yield
        finally:
            for name in choice:
                for quantizer in self._model.get_submodule(name).children():
                    if isinstance(quantizer, TensorQuantizer):
                        quantizer.disable()
