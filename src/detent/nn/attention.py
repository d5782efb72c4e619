"""Quantizers inside attention: on queries, keys, values and probabilities, at the point where they are multiplied.

Most attention modules of transformers 5 fetch the function that computes softmax(QK')V by name from a registry. Detent
registers ``detent_<name>`` for each name in use: it quantizes what it is given and calls the function of that name. So
keys are quantized after the rotary embedding, as the engines' caches hold them, and no model's source is touched. A
module belongs to this scheme when its ``forward`` uses the registry; nothing is listed per model. For those that
compute attention themselves see `detent.nn.attention_products`.

What a module caches is nearly always the keys and values that reach its attention. Where it caches latents instead and
makes keys and values of them at each call (multi-head latent attention), the latents are what is quantized, on their
way into the cache: the first of the two by the quantizer of keys, the second by that of values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dis import Instruction, get_instructions
from typing import Any

from torch import Tensor, nn

from detent.errors import DetentError
from detent.nn.attention_products import (
    QUANTIZERS,
    AttentionProducts,
    QuantAttention,
    add_quantizers,
    multiplies,
)
from detent.nn.registry import QuantModuleRegistry, once_a_class
from detent.nn.sequential import SequentialQuantizer, members_of
from detent.nn.tensor_quantizer import TensorQuantizer
from detent.nn.walk import walk

_REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"
_PREFIX = "detent_"
#: What attention modules call the cache that they are given; the usual name first.
CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


@once_a_class
def fetches_its_function(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class looks its attention function up by name."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and _REGISTRY_NAME in code.co_names


QuantModuleRegistry.add_rule(lambda kind: multiplies(kind) and not fetches_its_function(kind), QuantAttention)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module whose queries, keys and values can be quantized."""
    for name, module in walk(model):
        kind = type(module)
        if isinstance(module, QuantAttention) or (fetches_its_function(kind) and hasattr(module, "config")):
            yield name, module


def interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of `attention_modules` whose forward looks its attention function up by name."""
    return ((name, module) for name, module in attention_modules(model) if not isinstance(module, QuantAttention))


@once_a_class
def caches_latents(kind: type[nn.Module]) -> bool:
    """Whether the keys and values of a module are made of what its cache returns: the variables that its forward stores
    that in aren't the ones that it hands to its attention function."""
    if not fetches_its_function(kind):
        return False
    steps = list(get_instructions(inspect.unwrap(kind.forward)))
    last = {step.argval: index for index, step in enumerate(steps) if step.argval in ("update", _REGISTRY_NAME)}
    if len(last) < 2:
        return False
    stored = _variables(steps[last["update"] :], "STORE_FAST")[:2]
    return not set(stored) & set(_variables(steps[last[_REGISTRY_NAME] :], "LOAD_FAST"))


def _variables(steps: list[Instruction], operation: str) -> list[str]:
    """The names of the variables that some instructions store or load; newer Pythons do two at once."""
    found = [step.argval for step in steps if step.opname.startswith(operation)]
    return [name for names in found for name in (names if isinstance(names, tuple) else (names,))]


def add_attention_quantizers(model: nn.Module) -> None:
    """Give every module that fetches its attention function q/k/v/p quantizers, switched off, where it has none yet."""
    for _, module in interface_modules(model):
        if caches_latents(type(module)) and not hasattr(module, QUANTIZERS[0]):
            module.register_forward_pre_hook(_with_latents, with_kwargs=True)
        add_quantizers(module)


class _Latents:
    """In the place of a cache: what it is given is quantized first."""

    def __init__(self, module: Any, cache: Any) -> None:
        from transformers import DynamicCache

        self._module, self._keeps = module, cache is not None
        self._cache = cache if self._keeps else DynamicCache()

    def update(self, first: Tensor, second: Tensor, *more: Any, **options: Any) -> Any:
        """Quantize both, and hand them to the cache that there is."""
        for quantizer in map(members_of, (self._module.k_bmm_quantizer, self._module.v_bmm_quantizer)):
            if quantizer[0].rotation is not None:
                raise DetentError(
                    f"{quantizer[0].name}: rotates what {type(self._module).__name__} caches, which are latents and not"
                    " keys, so queries can't be turned alike; leave the rotation out"
                )
        first, second = self._module.k_bmm_quantizer(first), self._module.v_bmm_quantizer(second)
        return self._cache.update(first, second, *more, **options) if self._keeps else (first, second)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _with_latents(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not any(_is_on(getattr(module, name)) for name in QUANTIZERS[1:3]):
        return args, kwargs
    name = next((name for name in CACHE_NAMES if name in kwargs), CACHE_NAMES[0])
    return args, {**kwargs, name: _Latents(module, kwargs.get(name))}


def route_attention(model: nn.Module) -> None:
    """Send attention through the quantizers where any is on; where none is, back to the function it had."""
    for name, module in interface_modules(model):
        config: Any = module.config
        implementation = config._attn_implementation or "eager"
        original = implementation.removeprefix(_PREFIX)
        wanted = any(_is_on(getattr(module, q, None)) for q in QUANTIZERS)
        if wanted and not implementation.startswith(_PREFIX):
            _register(original, name)
            config._attn_implementation_internal = _PREFIX + original
        elif not wanted and implementation.startswith(_PREFIX) and not _others_on(model, config):
            config._attn_implementation_internal = original


def _others_on(model: nn.Module, config: Any) -> bool:
    """Whether any attention module under this configuration object still has a quantizer on."""
    return any(
        _is_on(getattr(module, q, None))
        for _, module in interface_modules(model)
        if module.config is config
        for q in QUANTIZERS
    )


def _is_on(quantizer: Any) -> bool:
    return isinstance(quantizer, (TensorQuantizer, SequentialQuantizer)) and quantizer.is_enabled


def _register(original: str, module_name: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise DetentError(
            f"{module_name}: quantizing attention works with the implementations that have a mask function, not"
            f" {original!r}; load the model with attn_implementation='eager' or 'sdpa'"
        )
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + original, _quantized(original))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])


def _quantized(original: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        quantizers: Any = module
        if hasattr(module, "k_bmm_quantizer"):
            query = quantizers.q_bmm_quantizer(query)
            if not caches_latents(type(module)):
                key, value = quantizers.k_bmm_quantizer(key), quantizers.v_bmm_quantizer(value)
        function = _function(original, module)
        if not hasattr(module, "p_bmm_quantizer") or not quantizers.p_bmm_quantizer.is_enabled:
            return function(module, query, key, value, attention_mask, **kwargs)
        with AttentionProducts(module, frozenset({inspect.unwrap(function).__code__}), len(query), "p") as products:
            result = function(module, query, key, value, attention_mask, **kwargs)
        products.check()
        return result

    return attention


def _function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function called `name`; "eager" is the one that the module's own file defines."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., Any]
    if name != "eager":
        found = ALL_ATTENTION_FUNCTIONS[name]
        return found
    for kind in type(module).__mro__:
        source = sys.modules.get(kind.__module__)
        if source is not None and hasattr(source, "eager_attention_forward"):
            found = source.eager_attention_forward
            return found
    raise DetentError(f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'")
