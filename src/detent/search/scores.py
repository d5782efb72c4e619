"""How much the model suffers from each option of each layer: three measures.

All are estimates of what the loss gains, for each layer by itself, and are added up over layers.

- ``gradient``: the sum of ``(g_e D_e)^2`` over the elements e of a layer's output, where D is what the option changes
  in it and g the loss's gradient there: the second-order term with the Fisher information in place of the Hessian.
- ``kl_div``: the divergence of the model's predictions from those of the float model, with the option alone switched
  on: exact, and a forward pass for each unit and option.
- ``curvature``: ``tr(H_O D H_I D^T)`` per token, where D is what the option changes in a layer's matrix, H_I the second
  moment of its input and H_O that of the gradients at its output, each from one backward pass however many options
  there are. Rounded activations count too: rows x of a sample stand for H_I, and D x is measured on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detent.algorithms.layer import Layer
from detent.algorithms.site import LEAST_ROWS, SAMPLE_ELEMENTS
from detent.errors import DetentError
from detent.nn import QuantWeightBase
from detent.padding import drop_padding, token_mask
from detent.statistics.gram import Gram
from detent.statistics.sample import Sample

#: {layer or unit: {option: score}}
Scores = dict[str, dict[str, float]]
#: Output channels up to which their curvature is a whole matrix; of more it is the diagonal.
WHOLE = 2048


@contextmanager
def gradients_at(
    modules: Mapping[str, nn.Module], heard: Callable[[str, tuple[Any, ...], dict[str, Any], Tensor], None]
) -> Iterator[None]:
    """Within, a backward pass tells for each call of a module what it was called with and the gradient at its output.

    Parameters need no gradients: where the first of the modules runs, gradients begin. What `heard` calls is not heard.

    Args:
        modules: by name; each gives a tensor.
        heard: called with the name, the arguments and the gradient, without gradients enabled.
    """
    busy = False
    last: tuple[Tensor, int, Tensor] | None = None

    def held(value: Any) -> Any:
        """A copy of an argument, since the model may change it afterwards; one for those that read the same tensor."""
        nonlocal last
        if not isinstance(value, Tensor):
            return value
        if last is None or last[0] is not value or last[1] != value._version:
            last = (value, value._version, value.detach().clone())
        return last[2]

    def watch(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            nonlocal busy
            if busy or not torch.is_grad_enabled():
                return None
            if not isinstance(output, Tensor):
                raise DetentError(f"{name}: it gives a {type(output).__name__}, not a tensor; disable this layer")
            y = output if output.requires_grad else output.detach().requires_grad_().clone()
            mine = tuple(map(held, args)), {key: held(value) for key, value in kwargs.items()}

            def backward(gradient: Tensor) -> None:
                nonlocal busy
                busy = True
                try:
                    with torch.no_grad():
                        heard(name, *mine, gradient)
                finally:
                    busy = False

            y.register_hook(backward)
            return y

        return hook

    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            yield
    finally:
        last = None
        for hook in hooks:
            hook.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient inside the block."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def padding_of(data: Any) -> Any:
    """A context in which padding of a batch, by its `attention_mask` [batch, seq], is known."""
    mask = data.get("attention_mask") if isinstance(data, Mapping) else None
    return token_mask(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)


def add(scores: Scores, name: str, option: str, value: Tensor | float) -> None:
    """Add to a score. Raises DetentError: the value isn't finite."""
    number = float(value)
    if not math.isfinite(number):
        raise DetentError(
            f"{name}: the score of {option} is {number}: a gradient or an output there isn't finite; check the loss, or"
            " load the model in bfloat16 or float32"
        )
    scores[name][option] += number


class GradientScores:
    """The measure ``gradient``: what `gradients_at` calls.

    Args:
        scores: to add to, by layer, an entry for each option that quantizes it.
        switched: switches a layer to an option: a context.
    """

    def __init__(
        self, scores: Scores, modules: Mapping[str, nn.Module], switched: Callable[[dict[str, str]], Any]
    ) -> None:
        self._scores, self._modules, self._switched = scores, modules, switched

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor) -> None:
        module = self._modules[name]
        y = module(*args, **kwargs).float()
        for option in self._scores[name]:
            with self._switched({name: option}):
                change = module(*args, **kwargs).float() - y
            add(self._scores, name, option, (gradient.float() * change).square().sum(dtype=torch.float64))


@dataclass
class Curvature:
    """What one backward pass leaves of a layer: rows of its input, and the second moment of gradients at its output.

    Attributes:
        tokens: how many rows there were.
    """

    layer: Layer
    sample: Sample = field(init=False)
    tokens: int = 0
    _moment: Gram | None = None
    _squares: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.layer.has_rows:
            kind = type(self.layer.module).__name__
            raise DetentError(
                f"{self.layer.name}: method 'curvature' can't score a {kind}; disable it, or use 'gradient'"
            )
        width, out = self.layer.width, self.layer.weight.shape[0]
        device = self.layer.module.weight.device
        self.sample = Sample(max(LEAST_ROWS, SAMPLE_ELEMENTS // width), width, device)
        if out <= WHOLE:
            self._moment = Gram(out, device)
        else:
            self._squares = torch.zeros(out, device=device)

    def see(self, x: Tensor, gradient: Tensor) -> None:
        """Take in an input and the gradient at the output."""
        if isinstance(self.layer.module, nn.Linear):
            x, gradient = drop_padding(x), drop_padding(gradient)
        else:  # a convolution has its channels along axis 1
            gradient = gradient.movedim(1, -1)
        rows, g = self.layer.rows(x), gradient.reshape(-1, gradient.shape[-1]).float()
        self.sample.add(rows, self.tokens)
        self.tokens += len(rows)
        if self._moment is not None:
            self._moment.add(g)
        elif self._squares is not None:
            self._squares += g.square().sum(0)

    def rows(self) -> Tensor:
        return self.sample.rows()

    def score(self, change: Tensor) -> float:
        """``tr(H_O D H_I D^T) / 2`` per token, for ``D x`` [rows, out] of the sample's rows."""
        d = change.float()
        curved: Any = self._squares if self._moment is None else self._moment.matrix()
        weighted = d * curved if self._moment is None else d @ curved
        total = torch.linalg.vecdot(weighted, d).sum(dtype=torch.float64)
        return float(total) / (2 * max(1, len(d)) * max(1, self.tokens))


def outputs(layer: Layer, rows: Tensor) -> Tensor:
    """What a layer makes of rows [n, width] as its quantizers are now, without bias, float32 [n, out]."""
    module: Any = layer.module
    dtype = module.weight.dtype
    if isinstance(module, nn.Linear):
        bias = 0 if module.bias is None else module.bias.float()
        return module(rows.to(dtype)).float() - bias  # type: ignore[no-any-return]
    quantizer = layer.input_quantizer
    rows = rows if quantizer is None else quantizer(rows)
    weight = layer.module.to_output_first(layer.module.quantized_weight(), layer.module)
    return rows @ weight.reshape(len(weight), -1).float().T


@torch.no_grad()
def curvature_scores(
    scores: Scores, curvature: Mapping[str, Curvature], switched: Callable[[dict[str, str]], Any]
) -> None:
    """The measure ``curvature`` of each option in `scores`, by layer."""
    for name, options in scores.items():
        seen = curvature[name]
        rows = seen.rows()
        if not len(rows):
            continue
        y = outputs(seen.layer, rows)
        for option in options:
            with switched({name: option}):
                change = outputs(seen.layer, rows) - y
            add(scores, name, option, seen.score(change))


def log_probabilities(output: Any, data: Any) -> Tensor:
    """Of a model's output, float32 [tokens, vocabulary] without padding.

    Raises:
        DetentError: it has no logits.
    """
    logits = logits_of(output)
    if logits is None:
        raise DetentError(
            f"method 'kl_div' compares logits, but forward_step gives a {type(output).__name__}; have it return the"
            " logits, or an output that has them"
        )
    with padding_of(data):
        return drop_padding(logits).float().log_softmax(-1).flatten(0, -2)


def logits_of(output: Any) -> Tensor | None:
    """The logits of a model's output: a tensor, or what is called so in it."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    found = output.get("logits") if found is None and isinstance(output, Mapping) else found
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() else None


def divergence_scores(
    scores: Scores,
    members: Mapping[str, Sequence[str]],
    run: Callable[[], Tensor],
    switched: Callable[[dict[str, str]], Any],
) -> None:
    """The measure ``kl_div`` of each option in `scores`, by unit, on one batch.

    Args:
        members: layers of each unit.
        run: gives the log-probabilities.
    """
    with torch.no_grad():
        expected = run()
        probabilities = expected.exp()
        for unit, options in scores.items():
            for option in options:
                with switched(dict.fromkeys(members[unit], option)):
                    difference = expected - run()
                # 0 * (-inf) where the model rules a token out
                kl = torch.where(probabilities > 0, probabilities * difference, 0.0).sum(dtype=torch.float64)
                add(scores, unit, option, kl)


def own_loss(output: Any, number: int) -> Tensor:
    """The loss where the user gives none: that of the model against tokens drawn from its own predictions, so that the
    second moment of gradients is the Fisher information.

    Args:
        output: of the model.
        number: of the batch, which the draw follows from.

    Raises:
        DetentError: it has no logits.
    """
    logits = logits_of(output)
    if logits is None or isinstance(output, Tensor):
        raise DetentError(
            "there is no loss to take gradients of: pass loss_func(output, data) or forward_backward_step(model, data)"
        )
    flat = drop_padding(logits).float().flatten(0, -2)
    generator = torch.Generator(flat.device).manual_seed(number)
    drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(flat, drawn, reduction="sum")


def layer_of(model: nn.Module, name: str) -> Layer:
    """A layer whose weight can be read as a matrix. Raises DetentError where it can't."""
    module = model.get_submodule(name)
    if not isinstance(module, QuantWeightBase):
        kind = type(module).__name__
        raise DetentError(f"{name}: method 'curvature' can't score a {kind}; disable it, or use 'gradient'")
    return Layer(name, module)
