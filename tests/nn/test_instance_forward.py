"""A forward that was set on the instance: it computes with the quantized weight, or it is refused by name."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
import plain_quant
from detent import DetentError

torch.manual_seed(3)
X = torch.randn(5, 16)
CONFIG = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def int4(weight: Tensor) -> Tensor:
    """By hand: each row on multiples of its amax / 7."""
    return torch.stack([plain_quant.integers(row, row.abs().amax(), 4) for row in weight])


def by_hand(plain: Any, x: Tensor) -> Tensor:
    h = nn.functional.linear(x, int4(plain[0].weight), plain[0].bias).relu()
    return nn.functional.linear(h, int4(plain[2].weight), plain[2].bias)


def decorated(layer: nn.Module, calls: list[str]) -> None:
    before = layer.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("seen")
        return before(*args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]


def a_partial(layer: nn.Module, calls: list[str]) -> None:
    def run(old: Callable[..., Any], x: Tensor) -> Any:
        calls.append("seen")
        return old(x)

    layer.forward = functools.partial(run, layer.forward)  # type: ignore[method-assign]


def with_attribute(layer: Any, calls: list[str]) -> None:
    def run(self: Any, x: Tensor) -> Any:
        calls.append("seen")
        return self._old_forward(x)

    layer._old_forward = layer.forward
    layer.forward = types.MethodType(run, layer)


def twice(layer: Any, calls: list[str]) -> None:
    decorated(layer, calls)
    decorated(layer, calls)


@pytest.mark.parametrize("patch", [decorated, a_partial, with_attribute, twice])
@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "algorithm": "mse"}], ids=["max", "mse"])
def test_what_stands_in_front_goes_on_around_the_quantized_forward(patch: Any, config: Any) -> None:
    expected = detent.quantize(model(), config)(X)
    assert config is not CONFIG or torch.allclose(expected, by_hand(model(), X), atol=1e-6)
    patched, calls = model(), []
    patch(patched[0], calls)
    patched = detent.quantize(patched, config)
    calls.clear()
    assert torch.equal(patched(X), expected)
    assert set(calls) == {"seen"}


def test_a_refused_configuration_leaves_the_patch_as_it_was() -> None:
    patched = model()
    decorated(patched[0], [])
    front = patched[0].forward
    with pytest.raises(DetentError):
        detent.quantize(patched, {"quant_cfg": {"*wieght_quantizer": {"num_bits": 4}}})
    assert patched[0].forward is front
    assert torch.equal(patched(X), model()(X))


def test_accelerate_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    seen: list[str] = []

    class Hook(hooks.ModelHook):  # type: ignore[name-defined,misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    hooked = model()
    hooks.add_hook_to_module(hooked[0], Hook())
    hooks.add_hook_to_module(hooked[2], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    quantized = detent.quantize(hooked, CONFIG)
    expected = by_hand(model(), X)
    assert torch.allclose(quantized(X), expected, atol=1e-6)
    assert seen
    assert torch.allclose(copy.deepcopy(quantized)(X), expected, atol=1e-6)
    hooks.remove_hook_from_module(quantized, recurse=True)
    assert torch.allclose(quantized(X), expected, atol=1e-6)


def test_accelerate_offload() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    offloaded = accelerate.cpu_offload(model(), execution_device="cpu")
    with pytest.raises(DetentError, match=r"0\.weight: the weight has no values \(meta device\)"):
        detent.quantize(offloaded, CONFIG)
    # Formats that take their scales from the tensor at hand need no values beforehand.
    mx: Any = {"quant_cfg": {"*weight_quantizer": {"format": "mxfp4"}}, "algorithm": None}
    expected = detent.quantize(model(), mx)(X)
    offloaded = accelerate.cpu_offload(model(), execution_device="cpu")
    assert torch.equal(detent.quantize(offloaded, mx)(X), expected)


def test_what_cannot_be_made_to_call_it_is_refused_by_name() -> None:
    def own(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    patched: Any = model()
    patched[2].forward = types.MethodType(own, patched[2])
    expected = patched(X)
    with pytest.raises(DetentError, match=r"^2: its forward was replaced on the instance \(by .*own\)"):
        detent.quantize(patched, CONFIG)
    assert torch.equal(patched(X), expected)
    assert type(patched[2]) is nn.Linear
    left_out: Any = {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "2.*": {"enable": False}}
    detent.quantize(patched, {"quant_cfg": left_out})
    assert not torch.equal(patched(X), expected)
    for on in (
        lambda: detent.enable_quantizer(patched, "2.weight_quantizer"),
        lambda: detent.set_quantizer_attribute(patched, "2.weight_quantizer", {"enable": True}),
    ):
        with pytest.raises(DetentError, match="its forward was replaced"):
            on()
        assert not patched[2].weight_quantizer.is_enabled
    del patched[2].forward
    detent.enable_quantizer(patched, "2.weight_quantizer")
