"""The Python API under generated input: what is valid works, and what isn't is refused in one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import detent
from detent import DetentError, QuantizeConfig, QuantizerAttributeConfig, TensorQuantizer
from fuzz.mutations import clear, dose, values

pytestmark = pytest.mark.fuzz

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


class Loop:
    """An object that holds itself, and one whose comparison gives no truth value."""

    def __eq__(self, other: object) -> Any:
        return torch.tensor([True, False])

    __hash__ = None  # type: ignore[assignment]


_self: list[Any] = []
_self.append(_self)
ODD_OBJECTS: list[Any] = [
    Loop(), _self, object(), len, int, torch.zeros(2), torch.ones(2, dtype=torch.complex64), nn.Linear(2, 2), b"x",
    10**5000, -(10**5000), {1, 2}, range(3), (4, 3), (10**30, 1), {-1: 16}, {"-1": 10**30}, {10**5000: 1},
    {"9" * 5000: 1}, {(1, 2): 3}, {None: None}, float("nan"),
]  # fmt: skip
anything = st.sampled_from(ODD_OBJECTS) | values

#: Values that a field takes, for configurations that have a chance to be valid.
SENSIBLE: dict[str, Any] = {
    "enable": st.booleans(),
    "num_bits": st.integers(2, 8) | st.sampled_from([(4, 3), (5, 2), (2, 1), "e3m2", "e2m3"]),
    "axis": st.sampled_from([None, 0, -1, 1, (0, 1)]),
    "fake_quant": st.booleans(),
    "unsigned": st.booleans(),
    "narrow_range": st.booleans(),
    "type": st.sampled_from(["static", "dynamic"]),
    "block_sizes": st.sampled_from([
        None, {-1: 16}, {-1: 8, -2: 2}, {-1: None}, {-1: 16, "type": "dynamic"}, {-1: 16, "scale_bits": (4, 3)},
        {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}, {-1: 16, "scale_bits": [4, 3], "four_over_six": True},
        {1: 10**9}, {7: 4},
    ]),
    "bias": st.sampled_from([None, {-1: None}, {0: None, "type": "dynamic"}, {-1: None, "method": "max_min"}]),
    "calibrator": st.sampled_from(["max", "histogram", ("percentile", {"percentile": 99.0}), "mse", "entropy"]),
    "rotate": st.sampled_from([False, True, {"enable": True, "block_size": 4}, {"mode": "rotate_back"}]),
    "pass_through_bwd": st.booleans(),
    "constant_amax": st.none() | st.floats(1e-3, 1e3),
    "use_constant_amax": st.booleans(),
    "format": st.sampled_from([None, "bfp16", "mx6", "mxfp4", "int4_per_group_asym"]),
    "zero_point": st.sampled_from([None, "int", "float"]),
    "effective_bits": st.none() | st.floats(1, 16),
}  # fmt: skip
sensible = st.fixed_dictionaries({}, optional=SENSIBLE)
FIELDS = [*SENSIBLE, "backend", "backend_extra_args", "trt_high_precision_dtype", "nonsense"]


def mended(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """The attributes if they are valid, else None: the refusal says why."""
    return None if clear(QuantizerAttributeConfig, **attributes) is None else attributes


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4), sensible)
def test_attributes(odd: dict[str, Any], good: dict[str, Any]) -> None:
    attributes = clear(QuantizerAttributeConfig, **{**good, **odd})
    if attributes is not None:
        assert QuantizerAttributeConfig(**attributes.to_dict()).to_format() == attributes.to_format()


@dose(0.5)
@given(sensible, sensible)
def test_valid_attributes_quantize_or_say_why_not(attributes: dict[str, Any], more: dict[str, Any]) -> None:
    quantizer = clear(TensorQuantizer, attributes)
    if quantizer is None:
        return
    y = clear(quantizer, X)
    if isinstance(y, torch.Tensor):
        assert y.shape == X.shape
        assert y.dtype == X.dtype
        assert not bool(y.isnan().any())
    before = quantizer.attributes
    clear(quantizer.set_from_attribute_config, more)
    assert quantizer.attributes == before or all(
        quantizer.attributes[name] == QuantizerAttributeConfig(**{name: value})[name]
        for name, value in more.items()
        if name not in ("block_sizes", "format", "bias") and mended({name: value}) is not None
    )


@dose(0.3)
@given(sensible, sensible, st.sampled_from(["max", "mse", None, "gptq", "smoothquant"]), st.booleans())
def test_a_configuration_quantizes_or_leaves_the_model_alone(
    weight: dict[str, Any], inputs: dict[str, Any], algorithm: Any, data: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 4))
    expected = model(X)
    config = {"quant_cfg": {"*weight_quantizer": weight, "*input_quantizer": inputs}, "algorithm": algorithm}
    if clear(detent.quantize, model, config, (lambda m: m(X)) if data else None) is None:
        assert type(model[0]) is nn.Linear
        assert torch.equal(model(X), expected)
        return
    y = clear(model, X)
    assert y is None or (y.shape == expected.shape and not bool(y.isnan().any()))


@given(anything, anything)
def test_configurations(quant_cfg: Any, algorithm: Any) -> None:
    clear(QuantizeConfig.of, {"quant_cfg": quant_cfg, "algorithm": algorithm})
    clear(QuantizeConfig.of, {"quant_cfg": {"*": quant_cfg}})
    clear(QuantizeConfig.of, {"quant_cfg": [{"quantizer_name": "*", "cfg": quant_cfg, "enable": algorithm}]})
    clear(QuantizeConfig.of, quant_cfg)


def functions() -> dict[str, Callable[[Any], Any]]:
    """Everything public that takes a model first."""
    attributes = {"num_bits": 8}
    return {
        "quantize": lambda x: detent.quantize(x, detent.INT8_WEIGHT_ONLY_CFG),
        "calibrate": detent.calibrate,
        "replace_quant_module": detent.replace_quant_module,
        "set_quantizer_by_cfg": lambda x: detent.set_quantizer_by_cfg(x, {"*": attributes}),
        "set_quantizer_attribute": lambda x: detent.set_quantizer_attribute(x, "*", attributes),
        "set_quantizer_attributes_full": lambda x: detent.set_quantizer_attributes_full(x, "*", attributes),
        "enable_quantizer": lambda x: detent.enable_quantizer(x, "*"),
        "disable_quantizer": lambda x: detent.disable_quantizer(x, "*"),
        "fold_weight": detent.fold_weight,
        "compress": detent.compress,
        "print_quant_summary": detent.print_quant_summary,
        "detent_state": detent.detent_state,
        "save": lambda x: detent.save(x, "nowhere/model.safetensors"),
    }


@pytest.mark.parametrize("name", functions())
@pytest.mark.parametrize("model", [None, nn.Linear, "a/path", [nn.Linear(2, 2)]], ids=["none", "class", "str", "list"])
def test_what_is_no_model(name: str, model: Any) -> None:
    with pytest.raises(DetentError, match=r"^model: a torch\.nn\.Module, not "):
        functions()[name](model)


@dose(0.5)
@given(anything)
def test_values_of_a_quantizer(value: Any) -> None:
    def setting(name: str) -> Callable[[], None]:
        return lambda: setattr(TensorQuantizer(), name, value)

    for name in ("amax", "pre_quant_scale", "global_amax"):
        clear(setting(name))
    clear(TensorQuantizer, value)
    clear(lambda: TensorQuantizer(amax=value))
    model = detent.quantize(nn.Sequential(nn.Linear(4, 4)), detent.INT8_WEIGHT_ONLY_CFG)
    clear(detent.set_quantizer_attribute, model, "*", value)
    clear(detent.set_quantizer_attributes_full, model, "*", value)
    if not callable(value):
        clear(detent.enable_quantizer, model, value)
