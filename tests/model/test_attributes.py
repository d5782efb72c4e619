"""Attributes of quantizers in a model: a dictionary is merged into what is there, the full form replaces it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent import DetentError, QuantizerAttributeConfig, SequentialQuantizer

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def model(cfg: Any = None) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 8))
    return detent.quantize(plain, {"quant_cfg": cfg or {"*weight_quantizer": {"num_bits": 8, "axis": 0}}})


@pytest.mark.parametrize("pattern", ["*", lambda name: True])
def test_a_change_of_bits_keeps_axes_and_switches_nothing_on(pattern: Any) -> None:
    quantized = model()
    detent.set_quantizer_attribute(quantized, pattern, {"num_bits": 4})
    detent.calibrate(quantized, "max")
    layer = quantized[0]
    assert [q.is_enabled for q in (layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer)] == [
        False,
        True,
        False,
    ]
    rows = torch.stack([plain_quant.integers(row, row.abs().amax(), 4) for row in layer.weight])
    assert torch.allclose(quantized(X), nn.functional.linear(X, rows, layer.bias), atol=1e-6)
    assert detent.set_quantizer_attributes_partial is detent.set_quantizer_attribute


def test_the_full_form_replaces() -> None:
    for set_them, attributes in (
        (detent.set_quantizer_attributes_full, {"num_bits": 4}),
        (detent.set_quantizer_attribute, QuantizerAttributeConfig(num_bits=4)),
    ):
        quantized = model()
        set_them(quantized, "*", attributes)
        assert quantized[0].weight_quantizer.axis is None
        assert quantized[0].output_quantizer.is_enabled


def test_sequences() -> None:
    two = [{"num_bits": 4, "block_sizes": {-1: 16}}, {"num_bits": (4, 3)}]
    quantized = model({"*weight_quantizer": two})
    detent.set_quantizer_attribute(quantized, "*weight_quantizer", [{"num_bits": 3}, {}])
    first, second = quantized[0].weight_quantizer
    assert (first.num_bits, first.block_sizes, second.num_bits) == (3, {-1: 16}, (4, 3))
    detent.set_quantizer_attribute(quantized, "*", {"enable": False})
    assert not quantized[0].weight_quantizer.is_enabled
    with pytest.raises(DetentError, match=r"0\.weight_quantizer: 2 quantizers in sequence take a list of 2"):
        detent.set_quantizer_attribute(quantized, "*", {"num_bits": 4})
    detent.set_quantizer_attribute(quantized, "*input_quantizer", two)
    assert isinstance(quantized[0].input_quantizer, SequentialQuantizer)


def test_what_goes_together_is_checked_and_nothing_changes_on_a_refusal() -> None:
    quantized = model({"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}})
    before = repr(quantized)
    with pytest.raises(DetentError, match="axis must be None when block_sizes is given"):
        detent.set_quantizer_attribute(quantized, "*weight_quantizer", {"axis": 0})
    for bad in (7, None, "int4", object()):
        with pytest.raises(DetentError, match="attributes are a dictionary"):
            detent.set_quantizer_attribute(quantized, "*", bad)  # type: ignore[arg-type]
    assert repr(quantized) == before
    detent.set_quantizer_attribute(quantized, "*weight_quantizer", {"axis": 0, "block_sizes": None})
    assert quantized[0].weight_quantizer.axis == 0


def test_by_class() -> None:
    quantized = detent.quantize(
        nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}}
    )
    for parent in ("nn.Linear", nn.Linear):
        detent.set_quantizer_attribute(quantized, "*weight_quantizer", {"num_bits": 4}, parent)
    assert (quantized[0].weight_quantizer.num_bits, quantized[1].weight_quantizer.num_bits) == (4, 8)
    with pytest.raises(DetentError, match="no quantizer matches"):
        detent.set_quantizer_attribute(quantized, "*", {"num_bits": 4}, "nn.Conv2d")


def test_an_exception_of_the_users_loop_is_kept() -> None:
    class Mine(Exception):
        pass

    def loop(m: nn.Module) -> None:
        m(X)
        raise Mine("of the loop")

    plain: Any = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(Mine, match="of the loop"):
        detent.quantize(plain, detent.INT8_DEFAULT_CFG, loop)
    assert type(plain[0]) is nn.Linear


def test_a_pattern_that_matches_nothing_is_quoted_in_part() -> None:
    model = detent.quantize(nn.Sequential(nn.Linear(4, 4)), detent.INT8_WEIGHT_ONLY_CFG)
    with pytest.raises(detent.DetentError, match=r"no quantizer matches 'xxx") as caught:
        detent.enable_quantizer(model, "x" * 10_000)
    assert len(str(caught.value)) < 500
