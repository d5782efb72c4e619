"""The bias of affine quantization."""

from __future__ import annotations

import pytest
import torch

import plain_quant
from detent.errors import DetentError
from detent.nn import TensorQuantizer

AFFINE = {"num_bits": (4, 3), "bias": {-2: None, -4: None, "type": "static"}}


def test_one_bias_for_each_head_and_channel() -> None:
    """The integer axes are those that one bias covers: batch and tokens of [batch, heads, seq, dim]."""
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 5, 4) + 10, torch.randn(1, 3, 7, 4) + 5]
    q = TensorQuantizer(AFFINE, if_quant=False, if_calib=True)
    for x in batches:
        q(x)
    q.load_calib_amax()
    q.disable_calib()
    q.enable_quant()
    flat = torch.cat([x.transpose(1, 2).reshape(-1, 3, 4) for x in batches]).double()
    bias = flat.mean(0).float().view(1, 3, 1, 4)
    torch.testing.assert_close(q._bias_value, bias)
    centred = [x - q._bias_value for x in batches]
    amax = max(float(c.abs().amax()) for c in centred)
    assert q.amax is not None
    assert float(q.amax) == amax  # the range of what remains, exactly
    assert torch.equal(q(batches[0]), plain_quant.small_floats(centred[0], amax) + q._bias_value)


def test_middle_of_the_range() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, -4.0], [8.0, 1.0]])
    q = TensorQuantizer({"num_bits": 8, "bias": {0: None, "method": "max_min"}})
    q.calibrate_on(x)
    assert torch.equal(q._bias_value, torch.tensor([[4.5, 3.0]]))
    assert float(q.amax) == 7.0  # type: ignore[arg-type]


def test_dynamic_bias_is_that_of_the_tensor() -> None:
    x = torch.randn(4, 6) + 3
    q = TensorQuantizer({"num_bits": 8, "type": "dynamic", "bias": {-1: None, "type": "dynamic"}})
    bias = x.double().mean(-1, keepdim=True).float()
    centred = x - bias
    assert torch.equal(q(x), plain_quant.integers(centred, centred.abs().amax()) + bias)


def test_errors() -> None:
    q = TensorQuantizer({"bias": {3: None}}, if_calib=True)
    with pytest.raises(DetentError, match="bias names axis 3"):
        q(torch.ones(2, 2))
    q = TensorQuantizer({"bias": {-1: None}}, if_calib=True)
    q(torch.ones(2, 2))
    with pytest.raises(DetentError, match="one shape in every batch"):
        q(torch.ones(3, 2))


def test_a_new_bias_forgets_the_old_one() -> None:
    q = TensorQuantizer(AFFINE)
    q.calibrate_on(torch.randn(1, 2, 3, 4))
    q.set_from_attribute_config({**AFFINE, "bias": {-1: None}})
    assert q._bias_value is None
