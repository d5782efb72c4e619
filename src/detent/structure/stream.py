"""The residual stream: the sum that blocks read through norms and add to, and whether it can be rotated.

Its terms are the leaves that the input of the last norm is a sum of. That it can be rotated is tried: with every term
and every norm's output replaced by its mirror image, every norm and every weight must read the mirror image of what it
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from detent.structure.folds import TOLERANCE
from detent.structure.site import Mixture, Norm, Reader, Site, Stream
from detent.structure.trace import Producer, Reading, Trace
from detent.structure.values import householder, reflect

Change = dict[str, Callable[[Tensor, int], Tensor]]


@dataclass(frozen=True)
class Found:
    """Attributes: stream: None where there is none, or more than one. note: why, if that is worth telling."""

    stream: Stream | None
    note: str = ""


def find_stream(
    model: nn.Module,
    trace: Trace,
    probe: Callable[[Change], Trace],
    sites: Iterable[Site],
    blocks: tuple[str, ...],
) -> Found:
    """The residual stream of a model.

    Args:
        model: the model.
        trace: of a run.
        probe: runs again in the same way, with changes.
        sites: of the model.
        blocks: of the model.
    """
    norms = [r for r in trace.readings if r.kind == "norm" and _normalizes(trace.producers[r.name])]
    if not norms:
        return Found(None)
    # The last norm of the stream reads the most terms; what experts make, and what chooses them, is one of them.
    main = max(norms, key=lambda r: len({leaf.producer for leaf in r.leaves if leaf.size == r.sums.shape[1]}))
    sources = _producers(main)
    if len(sources) < 2:
        return Found(None)
    for other in norms:
        names = _producers(other)
        if not names <= sources and other.name not in sources and _spans(names, trace, blocks):
            if any(trace.producers[name].kind == "norm" for name in (*names, *sources)):
                return Found(None, "no residual stream: the sum is normalised after each addition (post-norm)")
            return Found(None, f"more than one residual stream: {main.name} and {other.name} read different sums")
    members = [r for r in norms if _producers(r) <= sources]
    # Routers and gates have a part in the sum without being added: they multiply.
    width = main.sums.shape[1]
    terms = {leaf.producer for leaf in main.leaves if leaf.size == width and leaf.producer not in trace.choosers}
    stream = _described(model, trace, width, terms, members, list(sites))
    reason = _unfit(trace, width, terms, members) or _moved(trace, probe, width, terms, members)
    return Found(replace(stream, rotatable=not reason, reason=reason))


def _described(
    model: nn.Module, trace: Trace, width: int, terms: set[str], members: list[Reading], sites: list[Site]
) -> Stream:
    norms = {r.name: _norm(r.name, trace.producers[r.name]) for r in members}
    readers: dict[Reader, None] = {}
    site_of = {weight: site for site in sites for weight in site.weights}
    for reading in trace.readings:
        site = site_of.get(reading.name)
        if reading.kind != "weight" or site is None:
            continue
        through = [norms[name] for name in sorted(_producers(reading)) if name in norms]
        if through:
            readers.update(dict.fromkeys(Reader(site.name, norm) for norm in through))
        elif _producers(reading) & terms:
            readers[Reader(site.name, None)] = None
    embeddings = tuple(name for name in trace.embeddings if name in terms)
    head = _head(model, readers, sites)
    return Stream(
        width=width,
        embeddings=embeddings,
        readers=tuple(readers),
        writers=tuple(name for name in trace.producers if name in terms and trace.producers[name].kind == "rows"),
        head=head,
        tied=head is not None and any(_weight(model, head) is _weight(model, name) for name in embeddings),
        rotatable=False,
        reason="",
    )


def _head(model: nn.Module, readers: Iterable[Reader], sites: list[Site]) -> str | None:
    """The weight that makes the logits, if it reads the stream."""
    read = {weight for reader in readers for site in sites if site.name == reader.site for weight in site.weights}
    get: Any = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    names = [name for name, module in model.named_modules() if module is output]
    outside = [site.name for site in sites if site.block is None and site.name in read]
    return next((name for name in [*names, *(outside[-1:] if output is None else [])] if name in read), None)


def _weight(model: nn.Module, name: str) -> Any:
    return getattr(model.get_submodule(name), "_parameters", {}).get("weight", name)


def _unfit(trace: Trace, width: int, terms: set[str], members: list[Reading]) -> str:
    """Why the parts can't be rotated, whatever the probe says; "" if there is no reason."""
    for name, producer in trace.producers.items():
        if name in terms and producer.kind == "norm":
            return f"{name} multiplies what is added to the stream by a weight per channel"
    for reading in members:
        if reading.sums.shape[1] != width:
            return f"{reading.name} reads {reading.sums.shape[1]} channels, not {width}"
        scaling = trace.producers[reading.name].scaling
        if scaling is not None and not (scaling.rotates or scaling.centres):
            return f"{reading.name} is not an RMS or layer norm over the stream's channels"
    return ""


def _moved(trace: Trace, probe: Callable[[Change], Trace], width: int, terms: set[str], members: list[Reading]) -> str:
    """What doesn't rotate with the stream; "" if everything does."""
    mirror = householder(width)

    def turn(value: Tensor, axis: int) -> Tensor:
        return reflect(value.movedim(axis, -1), mirror).movedim(-1, axis)

    turned = terms | {r.name for r in members}
    after = probe(dict.fromkeys(turned, turn))
    if [r.name for r in after.readings] != [r.name for r in trace.readings]:
        return "the model runs differently when its stream is rotated"
    for old, new in zip(trace.readings, after.readings, strict=True):
        of_stream = bool(_producers(old) & turned)
        if of_stream and old.kind == "output":
            return f"the stream, or a norm of it, is the model's {old.name}"
        if of_stream and old.sums.shape[1] != width:
            return f"{old.name} reads it joined with something else"
        expected = reflect(old.sums, mirror) if of_stream else old.sums
        if not bool((new.sums - expected).abs().max() <= TOLERANCE * expected.abs().max()):
            return f"{old.name} reads something other than the sum of the stream's parts"
    return ""


def _norm(name: str, producer: Producer) -> Norm:
    scaling = producer.scaling
    assert scaling is not None
    return Norm(name, "layer" if scaling.centres else "rms", scaling.fold, scaling.parameters)


def _normalizes(producer: Producer) -> bool:
    return producer.scaling is not None and producer.scaling.normalizes


def _producers(reading: Reading) -> set[str]:
    return {leaf.producer for leaf in reading.leaves}


def _spans(names: set[str], trace: Trace, blocks: tuple[str, ...]) -> bool:
    """Whether the sources of a norm are those of a residual stream: an embedding, or outputs of several blocks."""
    touched = {block for block in blocks for name in names if name.startswith(f"{block}.")}
    return len(touched) > 1 or any(trace.producers[name].kind == "embedding" for name in names)


def written_by_all(stream: Stream, mixtures: Iterable[Mixture]) -> Stream:
    """The stream with what all experts of a mixture write, where the probe has reached some of them."""
    writers = dict.fromkeys(stream.writers)
    for mixture in mixtures:
        for member in mixture.members:
            inside = [name.removeprefix(member) for name in stream.writers if name.startswith(f"{member}.")]
            writers |= {other + name: None for name in inside for other in mixture.members}
    return replace(stream, writers=tuple(writers))
