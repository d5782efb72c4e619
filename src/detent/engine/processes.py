"""One run shared by several processes (torchrun): each sees a share of the data and solves a share of the sites.

What they see is added up, and what each solves is handed to the others, so that all of them hold the same blocks. With
one process nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from types import TracebackType

import torch
from torch import Tensor, nn

from detent.algorithms.layer import Layer
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import handler_of, whole
from detent.algorithms.site import ObservedSite
from detent.algorithms.site_work import Ledger, Stage
from detent.config.algorithm import QuantizeAlgorithmConfig
from detent.distributed import ProcessFailed, gathered, join, launched, leave, rank, size, summed, tell_failure
from detent.errors import DetentError
from detent.model import edit
from detent.nn import TensorQuantizer, quantizers_of
from detent.nn.observers import MinMaxObserver
from detent.nn.sequential import members_of
from detent.statistics import SiteStatistics
from detent.statistics.gram import Gram
from detent.statistics.sample import Sample


class Together:
    """The processes that a launcher has started share a run inside: a context manager, which gives the device to use.

    If one of them fails, all do: the first says why.

    Raises:
        DetentError: the launcher's environment is incomplete; there is no GPU for each; another process has failed.
    """

    def __init__(self, device: str) -> None:
        self._device, self._several, self._made = device, launched()[1] > 1, False

    def __enter__(self) -> str:
        if not self._several:
            return self._device
        device = _own_device(self._device)
        try:
            self._made = join()
        except (RuntimeError, ValueError) as error:
            raise DetentError(
                f"started as one of {launched()[1]} processes (WORLD_SIZE), which can't find each other: {error}; start"
                " them with torchrun, or unset WORLD_SIZE"
            ) from None
        return device

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._several:
            return
        first = rank() == 0
        try:
            if isinstance(error, Exception) and not isinstance(error, ProcessFailed):
                tell_failure(str(error) if isinstance(error, DetentError) else f"{type(error).__name__}: {error}")
            if error is None or isinstance(error, Exception):
                gathered()  # a launcher ends all once one ends, so wait until the first has cleaned up
        except ProcessFailed as lost:
            error = error or lost
        finally:
            leave(end=self._made)
        if isinstance(error, DetentError):
            error.told = not first
        elif isinstance(error, ProcessFailed):
            failure = DetentError(str(error))
            failure.told = not first
            raise failure from None


def _own_device(device: str) -> str:
    """The GPU that is this process's own."""
    if not device.startswith("cuda"):
        return device
    local, there = int(os.environ.get("LOCAL_RANK", launched()[0])), torch.cuda.device_count()
    if ":" in device or local >= there:
        raise DetentError(
            f"device {device}: process {local} of this machine takes CUDA device {local} of {there}; start as many"
            " processes as there are devices, and ask for 'cuda' without a number"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def check_shareable(steps: Sequence[QuantizeAlgorithmConfig], why_not: str) -> None:
    """Refuse a run that several processes can't share.

    Args:
        steps: its algorithms.
        why_not: another reason; "" for none.

    Raises:
        DetentError: there are several, and it can't be shared.
    """
    processes = launched()[1]
    trained = [str(part.method) for part in whole(steps) if handler_of(part).scope == "block"]
    why_not = f"{trained[0]} trains weights, which one process does" if trained else why_not
    if processes > 1 and why_not:
        raise DetentError(
            f"started as one of {processes} processes (WORLD_SIZE={processes}), but they can't share this run:"
            f" {why_not}; start it without torchrun"
        )


def check_same_run(made_of: Mapping[str, str]) -> None:
    """Make sure that all processes are at the same run.

    Raises:
        DetentError: what one makes it of differs.
    """
    for number, (other, _) in enumerate(gathered(dict(made_of))):
        unlike = [name for name, value in made_of.items() if other.get(name) != value]
        if unlike:
            raise DetentError(
                f"process {number} was started with another {unlike[0]}: {other.get(unlike[0])}, not"
                f" {made_of[unlike[0]]}; give all processes the same model, data and options"
            )


# ---- what all have seen ---------------------------------------------------------------------------------------------


def combined(
    sites: list[ObservedSite], layers: Sequence[Layer], empty: Callable[[Layer], SiteStatistics]
) -> list[ObservedSite]:
    """The sites that any process saw, with what all of them saw there, in the same order everywhere.

    Layers that are one site in some processes and several in others are several.

    Args:
        sites: that this process saw; their moments are used up.
        layers: all that could be seen.
        empty: statistics of a layer that wasn't.
    """
    if size() == 1:
        return sites
    seen: list[list[list[str]]] = [
        names for names, _ in gathered([[layer.name for layer in site.layers] for site in sites])
    ]
    site_of = [{name: number for number, names in enumerate(own) for name in names} for own in seen]
    together: dict[tuple[int | None, ...], dict[str, None]] = {}
    for name in (name for own in seen for names in own for name in names):
        together.setdefault(tuple(places.get(name) for places in site_of), {})[name] = None
    by_name = {layer.name: layer for layer in layers}
    uses = Counter(key[rank()] for key in together)
    result = []
    for key, members in together.items():
        mine, group = key[rank()], [by_name[name] for name in members]
        own = empty(group[0]) if mine is None else sites[mine].statistics
        if uses[mine] > 1:
            own = own.divided(torch.ones_like(own.low))  # a copy
        result.append(ObservedSite(group, _of_all(own)))
    return result


def _of_all(own: SiteStatistics) -> SiteStatistics:
    """The statistics of all processes. Sums are made in place."""
    tensors = {"low": own.low, "high": own.high, "abs_sum": own.abs_sum}
    if own.sample is not None:
        tensors["rows"], tensors["hashes"] = own.sample.numbered()
    device = own.low.device
    parts = []
    for tokens, there in gathered(own.tokens, tensors):
        rows = {name: tensor if name == "hashes" else tensor.to(device) for name, tensor in there.items()}
        sample = None if own.sample is None else Sample.of(own.sample.size, rows["rows"], rows["hashes"])
        parts.append(SiteStatistics(tokens, rows["low"], rows["high"], rows["abs_sum"], sample=sample))
    total = reduce(SiteStatistics.merge, parts)
    if own.second_moment is not None:
        total.second_moment = Gram.of(summed(own.second_moment.matrix()))
    if own.cross_moment is not None:
        total.cross_moment = summed(own.cross_moment)
    return total


def combine_ranges(module: nn.Module, waiting: Sequence[TensorQuantizer]) -> None:
    """Have the quantizers of activations that observe in `module` know what those of all processes saw.

    Raises:
        DetentError: one gathers something that doesn't add up.
    """
    if size() == 1:
        return
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    for number, quantizer in enumerate(waiting):
        if quantizer.needs_bias or type(quantizer._observer) is not MinMaxObserver:
            raise DetentError(
                f"{quantizer.name}: several processes share the ranges of the calibrator 'max' alone; use that, or"
                " start the run without torchrun"
            )
        for bound, value in zip(("low", "high"), quantizer._observer.seen or (), strict=False):
            tensors[f"{number}/{bound}"] = value
    for _, there in gathered(None, tensors):
        for number, quantizer in enumerate(waiting):
            if f"{number}/low" in there and isinstance(quantizer._observer, MinMaxObserver):
                bounds = (there[f"{number}/{bound}"].to(device) for bound in ("low", "high"))
                quantizer._observer.merge(*bounds)


# ---- what all have made ---------------------------------------------------------------------------------------------


def hand_over(layers: Sequence[Layer], owner: int, ledger: Ledger) -> None:
    """Give all processes what one of them has made of some layers."""
    if size() == 1:
        return
    tensors: dict[str, Tensor] = {}
    notes = {}
    if owner == rank():
        for layer in layers:
            tensors |= {
                f"{layer.name}/{name}": tensor for name, tensor in _state(layer.module).items() if tensor is not None
            }
            outcomes = [asdict(outcome) for outcome in ledger.outcomes.get(layer.name, [])]
            notes[layer.name] = [int(ledger.state(layer).stage), outcomes]
    notes, tensors = gathered(notes, tensors)[owner]
    if owner == rank():
        return
    for layer in layers:
        prefix = f"{layer.name}/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        _set_state(layer, own)
        stage, outcomes = notes[layer.name]
        ledger.state(layer).stage = Stage(stage)
        if outcomes:
            ledger.outcomes[layer.name] = [Outcome(**outcome) for outcome in outcomes]


def _state(module: nn.Module) -> dict[str, Tensor | None]:
    """The weight of a layer, and what its quantizers hold."""
    kept = {f"{place}{name}": getattr(q, name) for place, q in _members(module) for name in q._STATE}
    return {"weight": module._parameters["weight"], **kept}


def _set_state(layer: Layer, state: Mapping[str, Tensor]) -> None:
    device = layer.weight.device
    for place, quantizer in _members(layer.module):
        for name in quantizer._STATE:
            value = state.get(f"{place}{name}")
            quantizer._set_buffer(name, None if value is None else value.to(device))
    edit.put(layer.module, "weight", state["weight"], layer.name, untie=layer.shared)


def _members(module: nn.Module) -> list[tuple[str, TensorQuantizer]]:
    return [
        (f"{name}.{number}", member)
        for name, quantizer in quantizers_of(module)
        for number, member in enumerate(members_of(quantizer))
    ]


def check_same(part: nn.Module, name: str) -> None:
    """Make sure that all processes hold the same part of a model.

    Raises:
        DetentError: they don't.
    """
    if size() == 1:
        return
    digest = hashlib.blake2b()
    for value in part.state_dict().values():
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len({found for found, _ in gathered(digest.hexdigest())}) > 1:
        raise DetentError(
            f"{name}: the processes have made different weights of the same statistics, as unlike machines do; start"
            " them on machines of one kind"
        )
