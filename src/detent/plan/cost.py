"""What a plan costs before it is carried out: size of the result, peak memory, and about how long it takes.

The figures of memory are upper estimates of what the process itself holds (anonymous memory): pages of files that the
system maps and may drop at any time are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from detent.algorithms.registry import handler_of
from detent.checkpoints import Source
from detent.formats import Format, decode, encode
from detent.nn.walk import walk
from detent.plan.plan import Plan
from detent.structure.chain import chain_of

#: What Python, PyTorch and transformers hold before anything else, and what is put together before it is written.
LIBRARIES, BUFFER = 700 << 20, 1 << 30
#: Tokens for which the speed of a product is measured, and the width of its matrix.
_TOKENS, _WIDTH = 256, 1024


@dataclass(frozen=True)
class Samples:
    """Calibration data, as far as it costs something: how many sequences, their length, and how many run at once."""

    count: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Cost:
    """What a run will need, in bytes and seconds.

    Attributes:
        way: ``"tensor by tensor"``, ``"block by block"`` or ``"whole model"``.
        output: of all tensors that are written.
        bits_per_weight: of the quantized weights, scales included.
        memory: at the peak, without hidden states.
        states: hidden states between blocks, which can go to disk.
        model: that the model takes as a whole, in its dtype: what evaluation needs.
        disk: that the run needs at the same time: the output, and what it keeps for resuming.
        seconds: a rough estimate, by the speed of this machine now.
    """

    way: str
    output: int
    bits_per_weight: float
    memory: int
    states: int
    model: int
    disk: int
    seconds: float


def cost(plan: Plan, source: Source, dtype: torch.dtype, samples: Samples | None, *, timed: bool = True) -> Cost:
    """The cost of a plan.

    Args:
        plan: of `source`.
        dtype: that weights are held in.
        samples: what it is calibrated on; None for nothing.
        timed: whether the time is wanted, for which the machine's speed is measured (a tenth of a second).
    """
    weights = [(math.prod(f.shape), f.weight, f.shape) for f in plan.formats.layers.values() if f.weight is not None]
    coded = sum(size * fmt.bits_per_element(shape) for size, fmt, shape in weights if fmt is not None)
    elements = sum(size for size, _, _ in weights)
    output = round(coded / 8) + sum(source.info(name).nbytes for name in plan.kept)
    largest = max((size for size, _, _ in weights), default=0)
    # A weight at work: in its own dtype, in float32, as codes, decoded again.
    one = largest * (dtype.itemsize + 4 + 1 + 4)
    states = 0
    if plan.streams:
        way, memory = "tensor by tensor", one + BUFFER
    elif samples is not None and not plan.why_whole:
        way, memory, states = "block by block", *_of_blocks(plan, dtype, samples, largest)
        memory = max(memory, BUFFER)
    else:
        way = "whole model"
        memory = _bytes(plan, "", dtype) + round(coded / 8) + one + BUFFER
        memory += 0 if samples is None else _activations(plan, samples)
    seconds = _seconds(plan, elements, samples, dtype) if timed else 0.0
    journal = round(coded / 8) + 2 * states if way == "block by block" else 0
    bits = coded / elements if elements else 0.0
    model = LIBRARIES + _bytes(plan, "", dtype)
    return Cost(way, output, bits, LIBRARIES + memory, states, model, output + journal, seconds)


def _of_blocks(plan: Plan, dtype: torch.dtype, samples: Samples, largest: int) -> tuple[int, int]:
    """(memory, hidden states) of a run block by block."""
    assert plan.structure is not None
    model: torch.nn.Module = plan.skeleton
    blocks = chain_of(model, plan.structure)
    block = max(_bytes(plan, name, dtype) for name in blocks)
    inside = sum(_bytes(plan, name, dtype) for name in blocks)
    outside = _bytes(plan, "", dtype) - inside
    wants = [handler_of(step).wants(step) for step in plan.algorithms]
    copies = 2 if any(want.references for want in wants) else 1
    moments = 0
    if any(want.second_moment or want.cross_moment for want in wants):
        widths = [s.width for s in plan.structure.sites if s.block == blocks[0]]
        moments = 4 * (sum(w * w for w in widths) + 3 * max(widths, default=0) ** 2)
    hidden = 2 * copies * samples.tokens * _width(plan) * dtype.itemsize
    work = largest * (dtype.itemsize + 4 * 4)
    return copies * block + block + outside + moments + work + _activations(plan, samples), hidden


def _activations(plan: Plan, samples: Samples) -> int:
    """What one batch takes on its way through a block: inputs and outputs of its layers, and attention's scores."""
    shapes = [f.shape for f in plan.formats.layers.values()]
    widest = max((sum(shape[:2]) for shape in shapes), default=0)
    heads = getattr(getattr(plan.skeleton, "config", None), "num_attention_heads", None) or 1
    tokens = samples.batch * samples.length
    return 4 * tokens * (6 * widest + 3 * heads * samples.length)


def _width(plan: Plan) -> int:
    """Channels of the hidden states, or else the most that any layer reads."""
    assert plan.structure is not None
    if plan.structure.stream is not None:
        return plan.structure.stream.width
    return max((site.width for site in plan.structure.sites), default=0)


def _bytes(plan: Plan, module: str, dtype: torch.dtype) -> int:
    parameters = (p for _, m in walk(plan.skeleton.get_submodule(module)) for p in m._parameters.values())
    return sum({id(p): p.numel() for p in parameters if p is not None}.values()) * dtype.itemsize


# ---- time -----------------------------------------------------------------------------------------------------------


def _seconds(plan: Plan, elements: int, samples: Samples | None, dtype: torch.dtype) -> float:
    formats = [f.weight for f in plan.formats.layers.values() if f.weight is not None]
    seconds = elements * _per_element(formats[0], dtype) if formats else 0.0
    if samples is None:
        return seconds
    per_product = _per_product()
    learns = any(handler_of(step).learns_from_data for step in plan.algorithms)
    # Observed once, run once more on its quantized weights; second moments and solving cost about a product each.
    passes = 4 if learns else 2
    solving = sum(f.shape[0] * f.shape[-1] ** 2 for f in plan.formats.layers.values()) if learns else 0
    config = getattr(plan.skeleton, "config", None)
    routed = {} if plan.structure is None else plan.structure.routed_shares(config)
    seen = sum(math.prod(f.shape) * routed.get(name, 1.0) for name, f in plan.formats.layers.items())
    return seconds + (passes * seen * samples.tokens + solving) * per_product


def _per_element(fmt: Format, dtype: torch.dtype) -> float:
    """Seconds of rounding one element."""
    weight = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    return _fastest(lambda: decode(encode(weight, fmt))) / weight.numel()


def _per_product() -> float:
    """Seconds of one multiplication and addition."""
    x, w = torch.ones(_TOKENS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    return _fastest(lambda: x @ w) / (_TOKENS * _WIDTH * _WIDTH)


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
