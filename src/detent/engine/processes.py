"""One run shared by several processes (torchrun): each sees a share of the data and solves a share of the sites.

What they see is added up, and what each solves is handed to the others, so that all of them hold the same blocks. With
one process nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import reduce
from types import TracebackType
from typing import Any

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
from detent.nn import TensorQuantizer
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
        told = rank() > 0
        with suppress(ProcessFailed):
            if isinstance(error, Exception) and not isinstance(error, ProcessFailed):
                tell_failure(str(error) if isinstance(error, DetentError) else f"{type(error).__name__}: {error}")
            if error is None or isinstance(error, Exception):
                gathered()  # a launcher ends all once one ends, so wait until the first has cleaned up
        leave(end=self._made)
        failure = DetentError(str(error)) if isinstance(error, ProcessFailed) else error
        if isinstance(failure, DetentError):
            failure.told = told
        if failure is not None and failure is not error:
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
    observers: list[MinMaxObserver] = []
    tensors: dict[str, Tensor] = {}
    for number, quantizer in enumerate(waiting):
        observer = quantizer._observer
        if quantizer.needs_bias or type(observer) is not MinMaxObserver:
            raise DetentError(
                f"{quantizer.name}: several processes share the ranges of the calibrator 'max' alone; use that, or"
                " start the run without torchrun"
            )
        observers.append(observer)
        if observer.seen is not None:
            tensors |= {f"{number}/low": observer.seen[0], f"{number}/high": observer.seen[1]}
    for _, there in gathered(None, tensors):
        for number, observer in enumerate(observers):
            if f"{number}/low" in there:
                observer.merge(there[f"{number}/low"].to(device), there[f"{number}/high"].to(device))


# ---- what all have made ---------------------------------------------------------------------------------------------


def hand_over(layers: Sequence[Layer], owner: int, ledger: Ledger) -> None:
    """Give all processes what one of them has made of some layers."""
    if size() == 1:
        return
    mine: dict[str, Tensor] = {}
    done: dict[str, Any] = {}
    for layer in layers if owner == rank() else ():
        mine |= {f"{layer.name}/{name}": tensor for name, tensor in layer.module.state_dict().items()}
        outcomes = [asdict(outcome) for outcome in ledger.outcomes.get(layer.name, [])]
        done[layer.name] = int(ledger.state(layer).stage), outcomes, ledger.errors.get(layer.name)
    done, tensors = gathered(done, mine)[owner]
    for layer in layers if owner != rank() else ():
        prefix, device = f"{layer.name}/", layer.weight.device
        state = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
        for quantizer in members_of(layer.module.weight_quantizer):
            quantizer.reset_amax()  # what the owner's doesn't have any more
        # Replaced, not copied into: a weight that is tied to another one is a layer's own once it is solved.
        layer.module.load_state_dict(state, assign=True)
        layer.module.refresh_weight()
        stage, outcomes, error = done[layer.name]
        ledger.errors |= {} if error is None else {layer.name: error}
        ledger.state(layer).stage = Stage(stage)
        ledger.outcomes |= {layer.name: [Outcome(**outcome) for outcome in outcomes]} if outcomes else {}


def check_same_block(block: nn.Module, name: str) -> None:
    """Make sure that all processes hold the same block (or layer). Raises DetentError where they don't."""
    digest = hashlib.blake2b()
    for value in block.state_dict().values() if size() > 1 else ():
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    check_same(digest.hexdigest(), f"{name} after it was solved, as happens between unlike machines")


def check_same(value: str, what: str) -> None:
    """Make sure that all processes have the same value of something. Raises DetentError where they don't."""
    if len({found for found, _ in gathered(value)}) > 1:
        raise DetentError(f"the processes of this run differ in {what}; start them alike, on machines of one kind")
