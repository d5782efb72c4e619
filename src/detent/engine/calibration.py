"""Calibration: ranges for every quantizer that needs one, from weights and from a user's `forward_loop`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from detent.algorithms.layer import layers_of
from detent.algorithms.modes import BaseCalibrateModeDescriptor, ForwardLoop
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import LayerFacts, handler_of, refusals, whole
from detent.algorithms.site_work import Ledger
from detent.algorithms.weight_ranges import calibrate_weight, quantized_weights, weight_quantizers
from detent.config import MaxCalibConfig, QuantizeAlgorithmConfig, RotationConfig, parse_algorithm
from detent.distributed import ParallelState
from detent.engine.data_loop import DataLoop
from detent.engine.host import Host
from detent.engine.learn_model import distill_model, predictions
from detent.engine.options import Traversal
from detent.engine.processes import combine_ranges
from detent.engine.solve import Solver
from detent.engine.traversal import Subject, solve_model, unreached
from detent.errors import DetentError, NothingObserved
from detent.model.conversion import named_members
from detent.model.rollback import unchanged_on_failure
from detent.model.scopes import evaluating, observing
from detent.nn import TensorQuantizer, quantizers_of
from detent.nn.sequential import members_of
from detent.notices import notify
from detent.progress import track
from detent.structure import find_structure
from detent.structure.chain import Experts, chain_of
from detent.structure.site import Structure
from detent.threads import threads_by_size
from detent.transforms.folding import Folding
from detent.transforms.rotation import rotate_model

_log = logging.getLogger(__name__)

#: Rows that a weight is taken to be multiplied with, as long as no data was seen.
USUAL_ROWS = 512
#: Where channel scales go: ``"never"`` folded, they stay in the layers' input quantizers; ``"auto"``: folded into the
#: norm or matrix before, where the structure has a proved place; a site without one is rounded to nearest.
Fold = Literal["auto", "never"]


@dataclass
class Calibrated:
    """What calibration did besides setting ranges.

    Attributes:
        outcomes: {layer: what algorithms did to its weight, in order}.
        errors: {layer: how far its rounded weight is from the float one, relative to its length}, where an algorithm
            has rounded it.
        changed: names of parameters outside of quantized weights that have other values now.
    """

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


def calibrate(
    model: nn.Module,
    algorithm: Any = "max",
    forward_loop: ForwardLoop | None = None,
    *,
    structure: Structure | None = None,
    fold: Fold = "never",
) -> nn.Module:
    """Find the range of every enabled quantizer that needs one, and run the algorithms that change weights.

    Args:
        model: a model with quantizers. It runs in eval mode, without gradients; every module's train flag is restored.
        algorithm: ``"max"``, ``"mse"``, a dict with ``"method"`` and its options, a configuration, a list of these (one
            after the other), or None for no calibration.
        forward_loop: a function that calls the model it is given on calibration data, once however many algorithms
            there are. Only needed where activations have static ranges. Where the model is called with an
            `attention_mask` [batch, seq], what it masks stays out of the statistics.
        structure: of the model, where it is known; otherwise it is found when it is needed.
        fold: where channel scales go. ``"never"``: they stay in the layers' input quantizers (`pre_quant_scale`).
            ``"auto"``: they are folded into the norm or matrix before, as the command line does; sites without a proved
            place keep round-to-nearest for that algorithm.

    Returns:
        `model`.

    Raises:
        DetentError: the model has no quantizers; the algorithm is unknown,
            can't serve a layer's format or kind, or contradicts another one; data is
            needed and missing; the loop never calls the model or never reaches a quantizer or layer that needs data;
            NaN or infinity is met. Weights, ranges and train flags are then as they were. What can be refused without
            data is refused before the loop runs.

    Example:
        >>> import torch, detent
        >>> model = detent.quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), {
        ...     "quant_cfg": {"*input_quantizer": {"num_bits": 8}}, "algorithm": None
        ... })
        >>> model = detent.calibrate(model, "max", lambda m: m(torch.ones(2, 16)))
        >>> model[0].input_quantizer.amax.item()
        1.0
    """
    steps = parse_algorithm(algorithm)
    with unchanged_on_failure(model):
        if steps and not any(True for _ in named_members(model)):
            raise DetentError("the model has no quantizers, so there is nothing to calibrate; call quantize() first")
        run(model, steps, forward_loop, structure=structure, fold=fold)
    return model


def run(
    model: nn.Module,
    steps: Sequence[QuantizeAlgorithmConfig],
    forward_loop: ForwardLoop | DataLoop | None = None,
    *,
    structure: Structure | None = None,
    fold: Fold = "never",
    host: Host | None = None,
) -> Calibrated:
    """`calibrate` for callers that discard the model after a failure: nothing is kept to restore it from.

    Args:
        model, forward_loop, structure, fold: see `calibrate`.
        steps: parsed.
        host: where the model's blocks are; by default in memory.

    Raises:
        DetentError: as `calibrate` does; the model can't be used afterwards.
    """
    loop = forward_loop if isinstance(forward_loop, DataLoop) else DataLoop(forward_loop)
    steps = whole(steps)
    if not steps:
        _warn_uncalibrated(model)
        return Calibrated()
    _check_served(model, steps)
    if not handler_of(steps[-1]).finds_ranges:
        steps.append(MaxCalibConfig())
    groups = _groups(steps)
    _check_data(model, steps, loop)
    # No list of the weights: it would hold them all until the end.
    largest = max((weight.numel() for _, _, weight in weight_quantizers(model)), default=0)
    largest = largest or max((parameter.numel() for parameter in model.parameters()), default=0)
    with torch.no_grad(), threads_by_size(USUAL_ROWS * largest) as meet:
        loop.heard = lambda call: meet(call.rows * largest)
        calibration = _Calibration(model, loop, structure, fold, groups, host or Host())
        with evaluating(model):
            for group, traversal in groups:
                calibration.run(group, traversal)
        if not (host and host.streams) and any(getattr(step, "distributed_sync", False) for step in steps):
            _synchronize(model)
    return calibration.done


# ---- before anything runs -------------------------------------------------------------------------------------------


def _check_served(model: nn.Module, steps: Sequence[QuantizeAlgorithmConfig]) -> None:
    """Refuse algorithms that can't serve a layer.

    Raises:
        DetentError: there are some.
    """
    refused = refusals(steps, {layer.name: LayerFacts.of(layer) for layer in layers_of(model) if layer.has_rows})
    if refused:
        raise DetentError("; ".join(refused))


def _check_data(model: nn.Module, steps: Sequence[QuantizeAlgorithmConfig], loop: DataLoop) -> None:
    """Refuse to go on without data where some is needed.

    Raises:
        DetentError: it is needed and missing.
    """
    learning = [str(step.method) for step in steps if handler_of(step).learns_from_data]
    if loop:
        return
    if learning:
        raise DetentError(
            f"{', '.join(learning)}: this algorithm learns from data; pass a forward_loop that runs the model on"
            " calibration data"
        )
    if all(handler_of(step).scope != "model" or not handler_of(step).finds_ranges for step in steps):
        _check_ranges(model)  # otherwise a custom algorithm may find them


def _check_ranges(model: nn.Module) -> None:
    """Raises DetentError where a range or bias can't be found without data."""
    needing = [q.name for q in _waiting(model) if _cannot_do_without_data(q)]
    if needing:
        raise DetentError(
            f"{len(needing)} quantizers need data for their static ranges (for instance {needing[0]}): pass a"
            " forward_loop that runs the model on calibration data, or make them dynamic (type: 'dynamic')"
        )


def _groups(steps: Sequence[QuantizeAlgorithmConfig]) -> list[tuple[list[QuantizeAlgorithmConfig], Traversal]]:
    """Steps that run together, with how they get their data; steps that change the whole model are run alone.

    Raises:
        DetentError: steps that run together ask for different things.
    """
    groups: list[list[QuantizeAlgorithmConfig]] = []
    for step in steps:
        alone = not groups or "model" in (handler_of(step).scope, handler_of(groups[-1][0]).scope)
        groups.append([step]) if alone else groups[-1].append(step)
    return [(group, Traversal.of(group)) for group in groups]


def _warn_uncalibrated(model: nn.Module) -> None:
    waiting = [q.name for q in named_members(model) if q.needs_calibration and q.is_static and not q.is_calibrated]
    if waiting:
        _log.info("%d static quantizers, such as %s, take their range from each tensor", len(waiting), waiting[0])


# ---- the groups of a list -------------------------------------------------------------------------------------------


class _Calibration:
    """A list of algorithms at work on a model (a `ModelWork` for those that are handed all of it).

    Attributes:
        done: what they have done so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loop: DataLoop,
        structure: Structure | None,
        fold: Fold,
        groups: Iterable[tuple[Sequence[QuantizeAlgorithmConfig], Traversal]],
        host: Host,
    ) -> None:
        self.model, self._loop, self._structure, self._host = model, loop, structure, host
        scales = any(handler_of(step).scales_channels for group, _ in groups for step in group)
        self._folding = Folding(model, self.structure) if fold == "auto" and scales else None
        self.done = Calibrated()

    @property
    def structure(self) -> Structure:
        """As handed down, or found now."""
        if self._structure is None:
            self._structure = find_structure(self.model)
        return self._structure

    def run(self, steps: list[QuantizeAlgorithmConfig], traversal: Traversal) -> None:
        """Run steps that belong together."""
        handler = handler_of(steps[0])
        if handler.scope == "model":
            handler.change(steps[0], self)
        elif self._host.streams or any(handler_of(step).learns_from_data for step in steps):
            self._learn(steps, traversal)
        else:
            self._find_ranges()
            total = sum(1 for _ in quantized_weights(self.model))
            for step in steps:
                for name, quantizer, weight in track(quantized_weights(self.model), "Calibrating weights", total):
                    calibrate_weight(name, quantizer, weight, step)

    def run_mode(self, mode: BaseCalibrateModeDescriptor, step: QuantizeAlgorithmConfig) -> None:
        """Hand the model to a custom algorithm."""
        mode.apply(self.model, step, self._loop.forward_loop)

    def rotate(self, step: RotationConfig) -> None:
        """Rotate the model, proved and measured on the first calibration batch, or on random tokens without data."""
        calls = self._loop.calls_of(self.model)[:1] if self._loop else []
        probe = calls[0].split(4)[0] if calls else None
        call = None if probe is None else (lambda m: m(*probe.args, **probe.kwargs))
        report = rotate_model(self.model, self.structure, step, call)
        for text in [report.notice, *(f"rotation: {part}" for part in report.parts if part.reason)]:
            if text:
                notify(text)
        self.done.changed |= set(report.changed)

    def _learn(self, steps: list[QuantizeAlgorithmConfig], traversal: Traversal) -> None:
        """Algorithms that learn from data.

        In order: what the float model predicts, for those that train the rounded model at the end; the sites, with the
        activation ranges on the way where the whole model is observed in one run; weights outside of all sites; the
        training at the end; activation ranges that are still missing, or that a channel scale has made stale.
        """
        model, loop, ledger = self.model, self._loop, Ledger(self._folding)
        waiting, layers = _waiting(model), [layer for layer in layers_of(model) if layer.has_rows]
        # At most one step trains the whole rounded model. Its targets are recorded now, while the weights are still
        # float; where there is too little data for it, the others do without it (`alone`: they train longer instead).
        last: Any = next((step for step in steps if handler_of(step).scope == "end"), None)
        lessons = [] if last is None else predictions(model, layers_of(model), loop, last)
        if not lessons:
            steps = [handler_of(step).alone(step) for step in steps]
        data = loop.limited(model, traversal.max_tokens)
        blocks = chain_of(model, self._structure)
        experts = Experts(model, blocks, self._structure)
        ranges = _Ranges(data, experts)
        everything = lambda: list(named_members(model))  # noqa: E731
        subject = Subject(model, data, everything, blocks, experts, waiting, ranges, self._host, self._changed)
        solve_model(subject, Solver(steps, ledger, traversal.min_tokens), traversal)
        if last is not None:
            self._observe([q for q in waiting if id(q) not in ranges.found])  # trained with its activations rounded
            self.done.changed |= distill_model(model, lessons, layers, last, ledger)
        self.done.changed = self._changed()
        if not ranges.by_blocks:
            self._find_stale_ranges(waiting, ledger, ranges.found)
        elif last is not None:
            self._observe(waiting)
        self.done.errors |= ledger.errors
        for name, outcomes in ledger.outcomes.items():
            self.done.outcomes.setdefault(name, []).extend(outcomes)

    def _changed(self) -> set[str]:
        """Names of the parameters outside of quantized weights that have other values by now."""
        return self.done.changed | (set() if self._folding is None else self._folding.changed)

    def _find_stale_ranges(self, waiting: list[TensorQuantizer], ledger: Ledger, found: set[int]) -> None:
        """Activation ranges after algorithms that learn from data: those that aren't known, or no longer hold.

        Args:
            waiting: all that need one. ledger: of what was done. found: ids of those that have one.
        """
        # A scale folded into the rows of a linear layer changes what that layer gives, so that output, key and value
        # ranges are stale too; any other scale leaves only the inputs of the layers that it scales stale.
        elsewhere = any(not q.name.endswith("input_quantizer") for q in waiting)
        moved = self._folding is not None and self._folding.rows and elsewhere
        rescaled = {name for name, state in ledger.states.items() if state.rescaled}
        stale = {id(layer.input_quantizer) for layer in layers_of(self.model) if layer.name in rescaled}
        self._observe([q for q in waiting if moved or id(q) in stale or id(q) not in found])

    def _find_ranges(self) -> None:
        """Activation ranges from data, where there is some."""
        if self._loop:
            self._observe(_waiting(self.model))
        else:
            _check_ranges(self.model)

    def _observe(self, waiting: list[TensorQuantizer]) -> None:
        if waiting:
            experts = Experts(self.model, chain_of(self.model, self._structure), self._structure)
            with _Ranges(self._loop, experts)(self.model, waiting):
                self._loop(self.model)


# ---- activations ----------------------------------------------------------------------------------------------------


def _waiting(model: nn.Module) -> list[TensorQuantizer]:
    """Quantizers that have to see data: those that aren't a weight's."""
    direct = {id(member) for _, quantizer, _ in weight_quantizers(model) for member in members_of(quantizer)}
    return [q for q in named_members(model) if id(q) not in direct and (q.needs_calibration or q.needs_bias)]


class _Ranges:
    """Runs of the data, through a model or a block of it, in which quantizers find their ranges.

    Attributes:
        found: ids of the quantizers that have theirs.
        by_blocks: whether they were found block by block.
    """

    def __init__(self, loop: DataLoop, experts: Experts) -> None:
        self._loop, self._experts = loop, experts
        self.found: set[int] = set()
        self.by_blocks = False

    @contextmanager
    def __call__(
        self, module: nn.Module, waiting: Sequence[TensorQuantizer], *, of_block: bool = False
    ) -> Iterator[None]:
        """Within, `waiting` look at what reaches them in `module`, in which nothing is rounded.

        Raises:
            DetentError: the data never reached one.
        """
        self.by_blocks |= of_block
        with observing(module, waiting):
            yield
            combine_ranges(module, waiting)
            unseen = [q for q in waiting if not _take_over(q)]
        if unseen and len(unseen) == len(waiting) and not self._loop.calls:
            raise DetentError("the forward_loop never called the model, so there is nothing to calibrate with")
        unseen = self._share_among_experts(unseen, waiting)
        if unseen:
            raise DetentError(unreached([q.name for q in unseen], "quantizers"))
        self.found |= {id(q) for q in waiting}

    def _share_among_experts(
        self, unseen: Sequence[TensorQuantizer], waiting: Sequence[TensorQuantizer]
    ) -> list[TensorQuantizer]:
        """Give experts that saw no token the range that covers those of the others; quantizers that aren't an expert's.

        Experts of one list read rows of the same tensor, so the rows of another expert can be expected to lie in the
        range that covers all of theirs.
        """
        by_name = {q.name: q for q in waiting}
        lost, blind = [], {id(q) for q in unseen}
        for quantizer in unseen:
            twins = [by_name[name] for name in self._experts.twins(quantizer.name) if name in by_name]
            twins = [twin for twin in twins if id(twin) not in blind and twin.is_calibrated]
            if not twins or quantizer.needs_bias:
                lost.append(quantizer)
                continue
            _cover(quantizer, twins)
            notify(f"{quantizer.name}: no token reached this expert; using the range that covers the other experts'")
        return lost


def _cover(quantizer: TensorQuantizer, others: Sequence[TensorQuantizer]) -> None:
    """Give a quantizer the range that covers those of others of its format."""
    if quantizer.format.dynamic:
        quantizer.global_amax = torch.stack([q.global_amax for q in others if q.global_amax is not None]).amax(0)
        return
    ranges = [bounds for q in others if (bounds := q._bounds()) is not None]
    quantizer.set_range(torch.stack([r[0] for r in ranges]).amin(0), torch.stack([r[1] for r in ranges]).amax(0))


def _cannot_do_without_data(quantizer: TensorQuantizer) -> bool:
    """Whether a range or bias is still unknown. Dynamic formats under an outer scale can take that from each tensor."""
    needs_range = quantizer.needs_calibration and quantizer.is_static and not quantizer.is_calibrated
    return needs_range or (quantizer.needs_bias and quantizer._bias_value is None)


def _take_over(quantizer: TensorQuantizer) -> bool:
    """Load what a quantizer observed; False if that is nothing."""
    try:
        quantizer.load_calib_amax()
    except NothingObserved:
        return False
    return True


# ---- several processes ----------------------------------------------------------------------------------------------


def _synchronize(model: nn.Module) -> None:
    """Give ranks that see different data, or hold parts of one matrix, the widest range that any of them found."""
    for module in model.modules():
        state = getattr(module, "parallel_state", None) or ParallelState()
        for _, quantizer in quantizers_of(module):
            for member in members_of(quantizer):
                if not (member.is_enabled and member.is_calibrated):
                    continue
                member.sync_amax_across_distributed_group(state.data_parallel_group)
                if member.amax is not None and member.amax.numel() == 1:
                    member.sync_amax_across_distributed_group(state.tensor_parallel_group)
