"""`TensorQuantizer` against numbers worked out elsewhere, and what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import plain_quant
from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.formats import QTensor, decode, per_channel
from detent.nn import SequentialQuantizer, TensorQuantizer, register_quant_backend, unregister_quant_backend

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}

#: From NVIDIA ModelOpt 0.47: row 0 of what it makes of torch.manual_seed(0); torch.randn(2, 8).
GOLDEN = [
    ({}, [-1.132558, -1.149214, -0.249829, -0.433037, 0.849419, 0.699521, -0.31645, -2.115219]),
    (
        {"num_bits": 4, "block_sizes": {-1: 4}},
        [-1.15236, -1.15236, -0.329246, -0.493869, 0.906523, 0.604348, -0.302174, -2.115219],
    ),
    ({"num_bits": (4, 3)}, [-1.133153, -1.133153, -0.245517, -0.41549, 0.830979, 0.679892, -0.302174, -2.11522]),
]


@pytest.mark.parametrize(("attributes", "row"), GOLDEN)
def test_golden_values(attributes: dict[str, Any], row: list[float]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(TensorQuantizer(attributes)(x)[0], torch.tensor(row), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_static_scales_equal_plain_arithmetic(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 4).to(dtype)
    if transposed:
        x = x.t()
    q = TensorQuantizer({"num_bits": 8, "axis": 0})
    q.amax = x.float().abs().amax(1, keepdim=True) * 0.7  # clips
    assert torch.equal(q(x), plain_quant.integers(x, q.amax))
    f = TensorQuantizer({"num_bits": (4, 3)}, amax=1.5)
    assert torch.equal(f(x), plain_quant.small_floats(x, 1.5))


def test_axis_may_be_negative_and_several() -> None:
    x = torch.randn(3, 4, 5)
    for axis, keep in ((-1, (0, 1)), (1, (0, 2)), ((0, 2), (1,))):
        q = TensorQuantizer({"axis": axis})
        assert torch.equal(q(x), plain_quant.integers(x, x.abs().amax(keep, keepdim=True)))


def test_range_is_found_once_then_kept() -> None:
    q = TensorQuantizer(if_quant=False, if_calib=True)
    a, b = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.5])
    assert torch.equal(q(a), a)
    q(b)
    q.load_calib_amax()
    q.disable_calib()
    q.enable_quant()
    assert q.amax is not None
    assert float(q.amax) == 3.0
    assert torch.equal(q(b), plain_quant.integers(b, 3.0))
    q.reset_amax()
    assert q.amax is None
    assert torch.equal(q(b), plain_quant.integers(b, 2.0))


def test_amax_is_checked() -> None:
    q = TensorQuantizer({"axis": 0}, amax=torch.ones(3, 1))
    for bad in (torch.ones(4, 1), torch.tensor([[1.0], [float("nan")], [1.0]]), -torch.ones(3, 1), None):
        with pytest.raises(DetentError, match="amax"):
            q.amax = bad
    with pytest.raises(DetentError, match="calibrated for 3 scales"):
        q(torch.ones(4, 2))


def test_changed_attributes_drop_the_range_only_if_the_format_changes() -> None:
    q = TensorQuantizer(amax=2.0)
    q.set_from_attribute_config({"num_bits": 8, "pass_through_bwd": False})
    assert q.amax is not None
    with pytest.raises(DetentError):
        q.set_from_attribute_config({"num_bits": 99})
    assert q.num_bits == 8
    q.set_from_attribute_config(QuantizerAttributeConfig(num_bits=4))
    assert q.amax is None


def test_disabled_passes_through_but_still_scales() -> None:
    q = TensorQuantizer({"enable": False})
    x = torch.randn(2, 4)
    assert q(x) is x
    q.pre_quant_scale = torch.tensor([1.0, 2.0, 0.5, 4.0])
    assert torch.equal(q(x), x * q.pre_quant_scale)
    q.enable()
    scaled = x * q.pre_quant_scale
    assert torch.equal(q(x), plain_quant.integers(scaled, scaled.abs().amax()))
    q.pre_quant_scale = torch.ones(3)
    with pytest.raises(DetentError, match="pre_quant_scale"):
        q(x)
    with pytest.raises(DetentError, match="finite"):
        q.pre_quant_scale = torch.tensor([float("inf")])


def test_rotation_is_the_orthogonal_hadamard_matrix() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    h = torch.tensor(scipy_linalg.hadamard(8), dtype=torch.float32) / 8**0.5
    x = torch.randn(3, 8)
    off = TensorQuantizer({"enable": False, "rotate": True})
    torch.testing.assert_close(off(x), x @ h)
    back = TensorQuantizer({"num_bits": 8, "rotate": {"enable": True, "mode": "rotate_back"}})
    turned = x @ h
    expected = plain_quant.integers(turned, turned.abs().amax()) @ h
    torch.testing.assert_close(back(x), expected)
    off.name = "layer.input_quantizer"
    with pytest.raises(DetentError, match=r"layer\.input_quantizer: no Hadamard matrix exists for a width of 7"):
        off(torch.randn(2, 7))


def test_nan_and_infinity_name_the_quantizer() -> None:
    for value in (float("nan"), float("inf")):
        q = TensorQuantizer()
        q.name = "layer.input_quantizer"
        with pytest.raises(DetentError, match=r"layer\.input_quantizer"):
            q(torch.tensor([1.0, value]))
        q.enable_calib()
        q.disable_quant()
        with pytest.raises(DetentError, match=r"layer\.input_quantizer"):
            q(torch.tensor([1.0, value]))


def test_empty_and_zero_tensors() -> None:
    for attributes in ({}, {"axis": 0}, NVFP4, {"num_bits": 4, "block_sizes": {-1: 128}}):
        q = TensorQuantizer(attributes)
        assert q(torch.empty(0, 16)).shape == (0, 16)
        assert torch.equal(q(torch.zeros(2, 16)), torch.zeros(2, 16))


def test_constant_range_needs_no_calibration_whatever_the_granularity() -> None:
    x = torch.randn(4, 32) * 3
    q = TensorQuantizer({"num_bits": 8, "axis": 0, "constant_amax": 2.0})
    assert not q.needs_calibration
    assert torch.equal(q(x), plain_quant.integers(x, 2.0))
    f = TensorQuantizer({"num_bits": (4, 3), "use_constant_amax": True})
    assert torch.equal(f(x), plain_quant.small_floats(x, 448.0))
    n = TensorQuantizer({**NVFP4, "use_constant_amax": True})
    other = TensorQuantizer(NVFP4)
    other.amax = torch.tensor(448.0)
    assert torch.equal(n(x), other(x))


def test_outer_amax_is_the_amax_of_two_stage_formats() -> None:
    q = TensorQuantizer(NVFP4)
    x = torch.randn(2, 32)
    own = q(x)
    q.amax = x.abs().amax()
    assert torch.equal(q(x), own)
    q.reset_amax()
    q.amax = torch.tensor(100.0)
    assert q.amax is not None
    assert float(q.amax) == 100.0
    assert not torch.equal(q(x), own)


@pytest.mark.parametrize("pass_through", [True, False])
def test_gradient(pass_through: bool) -> None:
    q = TensorQuantizer({"pass_through_bwd": pass_through}, amax=1.0)
    x = torch.tensor([-2.0, -1.0, 0.3, 1.0, 1.5], requires_grad=True)
    (q(x) * torch.arange(1.0, 6.0)).sum().backward()
    expected = torch.arange(1.0, 6.0) * (1 if pass_through else torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_codes_on_request() -> None:
    x = torch.randn(4, 8)
    q = TensorQuantizer({"num_bits": 4, "fake_quant": False})
    codes = q(x)
    assert isinstance(codes, QTensor)
    assert torch.equal(decode(codes), plain_quant.integers(x, x.abs().amax(), 4))


def test_backend() -> None:
    q = TensorQuantizer({"backend": "half", "backend_extra_args": {"by": 2}})
    with pytest.raises(DetentError, match="not registered"):
        q(torch.ones(2))
    register_quant_backend("half", lambda x, quantizer: x / quantizer.attributes.backend_extra_args["by"])
    try:
        assert torch.equal(q(torch.ones(2)), torch.full((2,), 0.5))
    finally:
        unregister_quant_backend("half")


@pytest.mark.parametrize("attributes", [{"axis": 0}, {"format": "int4_per_channel_asym"}, NVFP4])
def test_state_survives_state_dict_and_copies(attributes: dict[str, Any]) -> None:
    x = torch.randn(4, 32)
    q = TensorQuantizer(attributes)
    q.calibrate_on(x * 0.5)
    q.pre_quant_scale = torch.rand(32) + 0.5
    other = TensorQuantizer(attributes)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), q(x))
    assert torch.equal(copy.deepcopy(q)(x), q(x))


def test_ranges_keep_float32_when_a_model_changes_dtype() -> None:
    q = TensorQuantizer(amax=1.2345678)
    q.bfloat16()
    assert q.amax is not None
    assert q.amax.dtype == torch.float32
    assert float(q.amax) == pytest.approx(1.2345678, rel=1e-7)


def test_edits_of_the_range_are_seen() -> None:
    q = TensorQuantizer(amax=1.0)
    x = torch.tensor([3.0, 0.2])
    q(x)
    assert q.amax is not None
    q.amax.mul_(4)
    assert torch.equal(q(x), plain_quant.integers(x, 4.0))
    q.amax = 2.0
    assert torch.equal(q(x), plain_quant.integers(x, 2.0))


def test_works_in_and_after_inference_mode() -> None:
    x = torch.randn(2, 8)
    with torch.inference_mode():
        q = TensorQuantizer(amax=2.0)
        first = q(x)
    assert torch.equal(q(x), first)


def test_sequence_applies_one_after_the_other() -> None:
    x = torch.randn(4, 8)
    s = SequentialQuantizer(
        TensorQuantizer({"num_bits": 4, "block_sizes": {-1: 4}}), TensorQuantizer({"num_bits": (4, 3)})
    )
    s.name = "w"
    assert [q.name for q in s.members] == ["w.0", "w.1"]
    blocks = x.view(4, 2, 4)
    first = plain_quant.integers(blocks, blocks.abs().amax(-1, keepdim=True), 4).view(4, 8)
    assert torch.equal(s(x), plain_quant.small_floats(first, first.abs().amax()))
    s.disable()
    assert not s.is_enabled
    assert torch.equal(s(x), x)


def test_repr_tells_the_state() -> None:
    q = TensorQuantizer({"axis": 0}, amax=torch.tensor([[1.0], [2.0]]))
    assert "int8" in repr(q)
    assert "[1.00e+00, 2.00e+00](2)" in repr(q)
    q.disable()
    assert repr(q) == "TensorQuantizer(disabled)"
    assert "dynamic" in repr(TensorQuantizer())


def test_format_can_be_set_directly() -> None:
    q = TensorQuantizer()
    q.format = q.format.with_granularity(per_channel(0))
    x = torch.randn(3, 4)
    assert torch.equal(q(x), plain_quant.integers(x, x.abs().amax(1, keepdim=True)))


@pytest.mark.parametrize("bad", [torch.complex64, torch.int64, torch.bool])
def test_tensors_that_are_not_floating_point(bad: torch.dtype) -> None:
    q = TensorQuantizer()
    kind = str(bad).removeprefix("torch.")
    with pytest.raises(DetentError, match=f"tensor: quantizers take dense floating-point tensors, not {kind};"):
        q(torch.ones(2, 2).to(bad))
    q.disable()
    assert q(torch.ones(2, 2).to(bad)).dtype == bad


def test_tensors_without_plain_values() -> None:
    q = TensorQuantizer()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for odd, kind in ((torch.eye(2).to_sparse(), "sparse_coo float32"), (nested, "nested float32")):
        with pytest.raises(DetentError, match=f"not {kind}"):
            q(odd)
    for name in ("amax", "pre_quant_scale", "global_amax"):
        for odd, words in (
            (torch.ones(1, device="meta"), "not meta float32"),
            (torch.ones(1, dtype=torch.complex64), "not complex64"),
            (torch.eye(2).to_sparse(), "not sparse_coo float32"),
            ("x", "a tensor or a number, not 'x'"),
            (10**400, "a tensor or a number"),
        ):
            with pytest.raises(DetentError, match=f"{name}: .*{words}"):
                setattr(q, name, odd)


def test_a_dictionary_changes_what_it_names() -> None:
    q = TensorQuantizer({"num_bits": 8, "axis": 0, "enable": False, "narrow_range": True})
    q.set_from_attribute_config({"num_bits": 4})
    assert (q.num_bits, q.axis, q.attributes.narrow_range, q.is_enabled) == (4, 0, True, False)
    q.set_from_attribute_config(QuantizerAttributeConfig(num_bits=4))
    assert (q.axis, q.attributes.narrow_range, q.is_enabled) == (None, False, True)
    with pytest.raises(DetentError, match="attributes are a dictionary"):
        q.set_from_attribute_config(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["keyword", "keywords", "quantizer"])
def test_a_backends_arguments_reach_it(style: str) -> None:
    import detent

    functions = {
        "keyword": lambda x, quantizer, by=1: x / by,
        "keywords": lambda x, quantizer, **options: x / options["by"],
        "quantizer": lambda x, quantizer: x / quantizer.backend_extra_args["by"],
    }
    register_quant_backend("divide", functions[style])
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
        weight = model[0].weight.detach().clone()
        divide = {"num_bits": 8, "backend": "divide", "backend_extra_args": {"by": 4}}
        model = detent.quantize(model, {"quant_cfg": {"*weight_quantizer": divide}})
        assert torch.equal(model(torch.eye(4)), weight.T / 4)
        detent.set_quantizer_attribute(model, "*weight_quantizer", {"backend_extra_args": {"by": 2}})
        assert torch.equal(model(torch.eye(4)), weight.T / 2)
    finally:
        unregister_quant_backend("divide")


def test_a_backend_that_does_not_fit() -> None:
    q = TensorQuantizer({"backend": "odd", "backend_extra_args": {"by": 4}})
    try:
        register_quant_backend("odd", lambda x, quantizer, step: x)
        with pytest.raises(DetentError, match=r"tensor: backend 'odd' doesn't accept backend_extra_args \{'by': 4\}"):
            q(torch.ones(2))
        register_quant_backend("odd", lambda x, quantizer: x[:1])
        with pytest.raises(DetentError, match=r"must return a tensor of shape \(2,\), not shape \(1,\)"):
            q(torch.ones(2))
    finally:
        unregister_quant_backend("odd")
