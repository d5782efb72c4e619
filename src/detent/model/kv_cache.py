"""Scales of quantized keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints.records import ATTENTION_SIDES, exported_format
from detent.errors import DetentError
from detent.formats import FloatScale, Scales
from detent.nn import TensorQuantizer
from detent.nn.attention import CACHE_NAMES, attention_modules, caches_latents, interface_modules

#: An attention function that is registered for a moment.
_LOOK = "detent_look"


def stored_scales(quantizer: TensorQuantizer) -> Scales:
    """The calibrated scales of an activation, on the CPU."""
    scales = quantizer.scales()
    if scales is None:
        outer = quantizer.outer_scale()
        if outer is None:
            raise DetentError(f"{quantizer.name}: not calibrated, so there is no scale to write")
        scales = Scales(torch.empty(0, dtype=quantizer.format.scale.stored_dtype), None, outer)
    return scales.map(lambda tensor: tensor.detach().cpu())


def kv_scales(model: nn.Module) -> dict[str, tuple[Scales, ...]]:
    """Calibrated scales of keys and values, and of queries and probabilities where these are quantized, by attention
    module; none for dynamic formats."""
    found: dict[str, tuple[Scales, ...]] = {}
    for name, module in attention_modules(model):
        quantizers = [getattr(module, f"{side}_bmm_quantizer", None) for side in ATTENTION_SIDES]
        on = [q for q in quantizers if isinstance(q, TensorQuantizer) and q.is_enabled]
        if on and not exported_format(on[0].format).dynamic:
            found[name] = tuple(map(stored_scales, on))
    return found


def floor_kv_scales(model: nn.Module, minimum: float) -> None:
    """Raise calibrated key and value ranges until no scale is below `minimum`, keys and values of a block alike.

    The two parts of a latent get one range: engines cache them as one tensor, under the scale of keys.
    """
    for _, module in attention_modules(model):
        if caches_latents(type(module)):
            _share_range(getattr(module, "k_bmm_quantizer", None), getattr(module, "v_bmm_quantizer", None))
        for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
            quantizer = getattr(module, name, None)
            if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and quantizer.amax is not None:
                rule = quantizer.format.scale
                assert isinstance(rule, FloatScale)
                least = minimum * rule.divisor(quantizer.format.element)
                quantizer.amax = quantizer.amax.clamp_min(least)


def _share_range(*quantizers: Any) -> None:
    ranges = [q.amax for q in quantizers if isinstance(q, TensorQuantizer) and q.is_enabled and q.amax is not None]
    if len(ranges) == 2:
        for quantizer in quantizers:
            quantizer.amax = torch.maximum(*ranges)


class _Spy:
    """In the place of a key/value cache: notes what it is given and gives it back."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def update(self, key: Tensor, value: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.given.append((key, value))
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """How many tokens the cache holds: none yet."""
        return 0


@torch.no_grad()
def check_cache(model: nn.Module) -> None:
    """Prove that what a model caches are the keys and values that reach its attention, which is where Detent quantizes
    them. What stores latents in its cache, and is known to, has them quantized instead.

    Raises:
        DetentError: an attention module caches other tensors. One that was given no cache is passed over.
    """
    spies: dict[str, _Spy] = {}
    hooks = []
    for name, module in interface_modules(model):
        if caches_latents(type(module)):
            continue  # what it caches is what is quantized
        spies[name] = _Spy()
        hooks.append(module.register_forward_pre_hook(_replace_cache(spies[name]), with_kwargs=True))
    names = {id(module): name for name, module in interface_modules(model)}
    reached: dict[str, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        reached[names[id(module)]] = (key, value)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    net: Any = model
    ids = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with _attention_is(model, look):
            net(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, spy in spies.items():
        if name in reached and spy.given and not _same(spy.given[-1], reached[name]):
            raise DetentError(
                f"{name}: {type(model).__name__} caches {_shapes(spy.given[-1])}, not the keys and values"
                f" {_shapes(reached[name])} that reach attention, so this version can't quantize its key/value cache;"
                " leave the cache unquantized"
            )


@contextmanager
def _attention_is(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """For a while all attention modules that fetch their function by name get `function`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_LOOK, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_LOOK, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    modules: list[Any] = [module for _, module in interface_modules(model)]
    configs = {id(module.config): module.config for module in modules}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _LOOK
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _replace_cache(spy: _Spy) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = next((n for n in CACHE_NAMES if n in kwargs), "")
        return args, {**kwargs, name: spy} if name else kwargs

    return hook


def _same(cached: tuple[Any, ...], reached: tuple[Tensor, Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(cached, reached, strict=True))


def _shapes(pair: tuple[Any, ...]) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in pair)
