"""`rotate_model`: Hadamard rotations put into a model, each proved not to change what the model computes.

R1 and R2 disappear into weights. R3 and R4 are left to quantizers, whose `rotate` attribute turns a tensor before it is
quantized, so that they are saved and restored with every other attribute. The mathematics is in
`detent.algorithms.rotation`.

Objective: how far the outputs on the probe are from the float model's when every quantizer that is on rounds with the
range of the tensor at hand: the mean KL divergence where they are logits, else the squared error relative to their
square. If the rotated model has a larger one, the rotations are undone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detent.config.transforms import RotationConfig
from detent.errors import DetentError
from detent.model.conversion import named_members
from detent.model.rollback import ModelMemory, unchanged_on_failure
from detent.model.scopes import evaluating, quantizers_off
from detent.nn import TensorQuantizer
from detent.pretrained.facts import input_device, max_sequence_length, vocabulary_size
from detent.structure.site import Structure
from detent.transforms.rotation_parts import CannotRotate, RotationPart, Rotator

_log = logging.getLogger(__name__)

Run = Callable[[nn.Module], Any]

#: How far outputs may move, relative to their length, before a rotation counts as wrong: what rounding rotated weights
#: to the model's type costs, with room to spare. A wrong fold changes outputs by about their own length.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class RotationReport:
    """What `rotate_model` did.

    Attributes:
        parts: R1 to R4, as far as they were asked for.
        change: how far the unquantized model's outputs moved, relative to their length.
        before, after: the objective without and with the rotations; None where no quantizer is on.
        changed: names of the parameters that have new values, an output head that was untied included.
        notice: what the user has to know; "" for nothing.
    """

    parts: tuple[RotationPart, ...]
    change: float
    before: float | None
    after: float | None
    changed: tuple[str, ...] = ()
    notice: str = ""


def rotate_model(
    model: nn.Module, structure: Structure, config: RotationConfig | None = None, run: Run | None = None
) -> RotationReport:
    """Rotate a model, in place.

    Args:
        model: with or without quantizers. Ranges calibrated before are forgotten, since tensors change.
        structure: of this model, from `detent.structure.find_structure`.
        config: which rotations.
        run: calls the model on a probe and returns its output (a tensor, or an object with `logits` or
            `last_hidden_state`); by default random tokens. Real text gives an objective that means more.

    Returns:
        What was done, and what wasn't and why.

    Raises:
        DetentError: R1, R3 or R4 is asked for and can't be done, or would change the function; `rotation_size` doesn't
            fit; nothing can be rotated. The model is then as it was.
    """
    config = config or RotationConfig()
    run = run or random_tokens(model)
    before_all = ModelMemory(model)
    with unchanged_on_failure(model), evaluating(model), torch.no_grad():
        reference = _float_output(model, run)
        before = _objective(model, run, reference)
        proof = _Proof(model, structure, config, run, reference)
        parts, change = proof.rotate()
        after = _objective(model, run, reference)
    notice, changed = "", proof.rotator.weights.changed
    if before is not None and after is not None and after > before:
        before_all.restore()
        changed = set()
        notice = f"rotation: undone, since it raised the error of the probe's outputs from {before:.4g} to {after:.4g}"
        after = before
        parts = tuple(RotationPart(p.name, (), p.size, "undone") if p.where else p for p in parts)
    for part in parts:
        _log.info("rotation: %s", part)
    return RotationReport(parts, change, before, after, tuple(sorted(changed)), notice)


def random_tokens(model: nn.Module, tokens: int = 32) -> Run:
    """A probe of two sequences of random tokens, the same at every call.

    Raises:
        DetentError: the model doesn't say how large its vocabulary is.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = vocabulary_size(config)
    if vocabulary is None:
        raise DetentError(
            "rotation: the model's configuration has no vocab_size, so no probe can be made for it; pass run=, a"
            " function that calls the model and returns its output"
        )
    length = min(tokens, max_sequence_length(config) or tokens)
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    return lambda model: model(input_ids=ids.to(input_device(model)))


class _Proof:
    """Puts rotations in one after the other and compares what the model computes with what it did before."""

    def __init__(
        self, model: nn.Module, structure: Structure, config: RotationConfig, run: Run, reference: Tensor
    ) -> None:
        self.model, self.config, self.run, self.reference = model, config, run, reference
        self.rotator = Rotator(model, structure, config)

    def rotate(self) -> tuple[tuple[RotationPart, ...], float]:
        """(what was done, how far the outputs moved in the end)."""
        config, parts = self.config, []
        if config.r1:
            parts.append(self._proved(self.rotator.stream, "set r1=False"))
        elif config.r1 is None:
            parts.append(self._optional("R1", self.rotator.stream))
        if config.r2:
            parts.append(self._optional("R2", self.rotator.heads))
        for asked, name, rotate in ((config.r3, "R3", self.rotator.keys), (config.r4, "R4", self.rotator.inputs)):
            if asked:
                parts.append(self._proved(rotate, f"set {name.lower()}=False"))
            elif asked is None:
                parts.append(self._optional(name, rotate))
        if not any(part.where for part in parts):
            raise DetentError("rotation: nothing was rotated: " + "; ".join(f"{p.name}: {p.reason}" for p in parts))
        for module in self.model.modules():
            if isinstance(module, TensorQuantizer) and module.is_calibrated:
                module.reset_amax()
        return tuple(parts), self._change()

    def _proved(self, rotate: Callable[[], RotationPart], way_out: str) -> RotationPart:
        """A rotation that was asked for: whatever prevents it is an error."""
        try:
            return self._checked(rotate())
        except CannotRotate as error:
            raise DetentError(f"rotation: {error}; {way_out}") from None

    def _optional(self, name: str, rotate: Callable[[], RotationPart]) -> RotationPart:
        """A rotation where it can be: what prevents it is undone and reported."""
        memory, changed = ModelMemory(self.model), set(self.rotator.weights.changed)
        try:
            return self._checked(rotate())
        except CannotRotate as error:
            memory.restore()
            self.rotator.weights.changed = changed
            return RotationPart(name, (), "", str(error).removeprefix(f"{name}: "))

    def _checked(self, part: RotationPart) -> RotationPart:
        if part.where and (change := self._change()) > self._tolerance:
            raise CannotRotate(
                f"{part.name}: it would change the model's outputs by {change:.2g} of their length, so some layer that"
                " reads or writes what it rotates was not discovered"
            )
        return part

    def _change(self) -> float:
        output = _float_output(self.model, self.run)
        return float((output - self.reference).norm() / self.reference.norm().clamp_min(1e-30))

    @property
    def _tolerance(self) -> float:
        dtypes = {p.dtype for p in self.model.parameters() if p.dtype in _TOLERANCE}
        return max((_TOLERANCE[dtype] for dtype in dtypes), default=1e-3)


# ---- what the model computes ----------------------------------------------------------------------------------------


def _float_output(model: nn.Module, run: Run) -> Tensor:
    with quantizers_off(list(named_members(model))):
        return _output(run(model))


def _objective(model: nn.Module, run: Run, reference: Tensor) -> float | None:
    """The objective of the model as it is; None if nothing in it is quantized."""
    if not any(isinstance(m, TensorQuantizer) and m.is_enabled for m in model.modules()):
        return None
    result = run(model)
    output = _output(result)
    if not isinstance(getattr(result, "logits", None), Tensor):
        return float((output - reference).pow(2).sum() / reference.pow(2).sum().clamp_min(1e-30))
    right, ours = reference.log_softmax(-1), output.log_softmax(-1)
    return float((right.exp() * (right - ours)).sum(-1).mean())


def _output(result: Any) -> Tensor:
    """The tensor to compare in what the probe returned, float64."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(result, name, None), Tensor):
            result = getattr(result, name)
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise DetentError(
            f"rotation: the probe has to return a tensor or a model's output, not a {type(result).__name__}"
        )
    if not bool(torch.isfinite(result).all()):
        raise DetentError("rotation: the model's outputs on the probe are not finite")
    return result.detach().double()
