"""Saving and restoring whole models."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import detent
from detent.errors import DetentError
from tiny_language_model import make_model

X = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def mlp(seed: int = 0, hidden: int = 64) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()


CONFIGS: dict[str, Any] = {
    "int8": detent.INT8_DEFAULT_CFG,
    "nvfp4 static": detent.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
    "sequence": {"quant_cfg": {"*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": (4, 3)}]}},
    "asymmetric": {"quant_cfg": {"*weight_quantizer": {"format": "uint4_per_group_asym"}}},
    "micro-exponents": {"quant_cfg": {"*weight_quantizer": {"format": "mx6"}}, "algorithm": None},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["simulated", "folded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(name: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = mlp().to(dtype), X.to(dtype)
    detent.quantize(model, CONFIGS[name], lambda m: m(x))
    model[0].input_quantizer.pre_quant_scale = torch.rand(128) + 0.5
    if form == "folded":
        detent.fold_weight(model)
    if form == "packed":
        detent.compress(model)
    detent.save(model, tmp_path / "model.pt")
    other = detent.restore(lambda: mlp(seed=1), tmp_path / "model.pt")  # other weights, float32
    assert torch.equal(other(x), model(x))
    assert detent.detent_state(other) == detent.detent_state(model)
    assert {k: (v.dtype, v.shape) for k, v in other.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("preset", ["FP8_KV_CFG", "NVFP4_AFFINE_KV_CFG", "INT8_DEFAULT_CFG"])
def test_language_model(preset: str, tmp_path: Path) -> None:
    model = detent.quantize(make_model(), getattr(detent, preset), lambda m: m(IDS))
    detent.save(model, tmp_path / "model")
    other = detent.restore(make_model(seed=5), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    def make() -> Any:
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
        model[1].weight = model[0].weight
        return model

    model = detent.quantize(make(), {"quant_cfg": {"1.weight_quantizer": {"num_bits": 8}}})
    detent.save(model, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1.5 * model[0].weight.nbytes + 4000
    other = detent.restore(make(), tmp_path / "m")
    assert other[0].weight is other[1]._parameters["weight"]
    assert torch.equal(other(torch.arange(5)), model(torch.arange(5)))


def test_state_and_state_dict_apart() -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    detent.compress(model)
    state = json.loads(json.dumps(detent.modelopt_state(model)))
    other = detent.restore_from_modelopt_state(mlp(seed=1), state)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    with pytest.raises(DetentError, match="quantized already"):
        detent.restore_from_detent_state(other, state)
    with pytest.raises(DetentError, match="no quantizers"):
        detent.detent_state(mlp())


def signature(model: nn.Module) -> Any:
    modules = [
        (n, type(m), sorted(m.__dict__), list(m._modules), list(m._parameters)) for n, m in model.named_modules()
    ]
    return modules, {k: v.clone() for k, v in model.state_dict().items()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garbage(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not safetensors")


def foreign(path: Path) -> None:
    save_file({"w": torch.zeros(2)}, path)


def rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["detent_state"])
        change(tensors, state)
        save_file(tensors, path, metadata={"detent_state": json.dumps(state)})

    return apply


def not_json(path: Path) -> None:
    save_file({"w": torch.zeros(2)}, path, metadata={"detent_state": "{"})


def bad_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(bytes(data))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": truncate,
    "garbage": garbage,
    "foreign": foreign,
    "not json": not_json,
    "header": bad_header,
    "tensor missing": rewritten(lambda tensors, state: tensors.pop("3.bias")),  # type: ignore[arg-type, return-value]
    "range missing": rewritten(lambda tensors, state: tensors.pop("0.input_quantizer._amax")),  # type: ignore[arg-type, return-value]
    "tensor too many": rewritten(lambda tensors, state: tensors.update(x=torch.zeros(1))),
    "version": rewritten(lambda tensors, state: state.update(version=99)),
    "no quantizers": rewritten(lambda tensors, state: state.pop("quantizers")),
    "attributes": rewritten(lambda t, state: state["quantizers"]["0.input_quantizer"]["attributes"].update(bits=3)),
    "packed": rewritten(lambda t, state: state["packed"].update({"9": {}})),
    "shape": rewritten(lambda tensors, state: tensors.update({"3.bias": torch.zeros(5)})),
}


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return rewritten(apply)


def described(*keys: Any, value: Any) -> Callable[[Path], None]:
    """A value of the description, replaced."""

    def apply(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        place: Any = state
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return rewritten(apply)


def first(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


NAN, INF = float("nan"), float("inf")
AMAX, IN = "0.input_quantizer._amax", ("quantizers", "0.input_quantizer")
DAMAGES |= {
    "NaN weight": tensor("3.weight", lambda x: first(x, NAN)),
    "infinite weight": tensor("3.weight", lambda x: first(x, INF)),
    "NaN buffer": tensor("1.running_mean", lambda x: first(x, NAN)),
    "half range": tensor(AMAX, torch.Tensor.half),
    "NaN range": tensor(AMAX, lambda x: first(x, NAN)),
    "infinite range": tensor(AMAX, lambda x: first(x, INF)),
    "negative range": tensor(AMAX, lambda x: first(x, -1)),
    "range of another weight": tensor("0.weight_quantizer._amax", lambda x: x[:3].clone()),
    "ranges undescribed": described(*IN, "buffers", value=[]),
    "range unknown": described(*IN, "buffers", value=["__class__"]),
    "buffers": described(*IN, "buffers", value={"_amax": 1}),
    "enabled": described(*IN, "enabled", value="yes"),
    "quant": described(*IN, "quant", value=None),
    "quantizer": described(*IN, value=3),
    "no steps": described(*IN, value=[]),
    "attributes list": described(*IN, "attributes", value=[]),
    "format": described(*IN, "attributes", value={"format": {"element": 3}}),
    "deep attributes": described(*IN, "attributes", value={"block_sizes": {str(n): {} for n in range(99)}}),
    "quantizers": described("quantizers", value=[]),
    "aliases": described("aliases", value={"a": 3}),
    "alias of nothing": described("aliases", value={"3.bias": "nothing"}),
    "alias extra": described("aliases", value={"extra": "3.bias"}),
    "packed": described("packed", value={"9": {}}),
    "whole-number bias": tensor("0.bias", lambda x: x.to(torch.int8)),
    "two ranges of a whole tensor": tensor("0.input_quantizer._amax", lambda x: torch.stack([x, x])),
}

PACKED_DAMAGES: dict[str, Callable[[Path], None]] = {
    "no codes": rewritten(lambda tensors, state: tensors.pop("0._packed_codes")),  # type: ignore[arg-type, return-value]
    "no scale": rewritten(lambda tensors, state: tensors.pop("0._packed_scale")),  # type: ignore[arg-type, return-value]
    "too many": rewritten(lambda tensors, state: tensors.update({"0._packed_zero_point": torch.zeros(64, 4)})),
    "int8 scale": tensor("0._packed_scale", lambda x: x.to(torch.int8)),
    "half scale": tensor("0._packed_scale", torch.Tensor.half),
    "NaN scale": tensor("0._packed_scale", lambda x: first(x, NAN)),
    "infinite scale": tensor("0._packed_scale", lambda x: first(x, INF)),
    "zero scale": tensor("0._packed_scale", lambda x: first(x, 0)),
    "fewer codes": tensor("0._packed_codes", lambda x: x[:-1]),
    "narrow codes": tensor("0._packed_codes", lambda x: x[:, :-1]),
    "other codes": tensor("0._packed_codes", lambda x: x.to(torch.int32)),
    "smaller": described("packed", "0", "shape", value=[64, 127]),
    "infinite": described("packed", "0", "shape", value=[INF, 128]),
    "fraction": described("packed", "0", "shape", value=[64.0, 128]),
    "terabytes": described("packed", "0", "shape", value=[1 << 30, 1 << 30]),
    "negative": described("packed", "0", "shape", value=[-64, -128]),
    "many axes": described("packed", "0", "shape", value=[1] * 64),
    "dtype": described("packed", "0", "dtype", value="complex64"),
    "format": described("packed", "0", "format", value="int4"),
    "element": described("packed", "0", "format", "element", "bits", value=5),
    "bits": described("packed", "0", "format", "element", "bits", value=4.0),
    "element type": described("packed", "0", "format", "element", "type", value="Table"),
    "granularity": described("packed", "0", "format", "granularity", "blocks", value=[[7, 32]]),
    "group": described("packed", "0", "format", "granularity", "blocks", value=[[-1, 0]]),
    "scale": described("packed", "0", "format", "scale", "dtype", value="e4m3"),
    "other module": described("packed", "1", value={}),
}


@pytest.mark.parametrize("damage", PACKED_DAMAGES)
def test_damaged_packed_weights(damage: str, tmp_path: Path) -> None:
    """Shapes and dtypes are those that the format and the model ask for, not those that the file brings."""
    path = tmp_path / "m"
    config = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 32}}}, "algorithm": "max"}
    model = detent.quantize(mlp(), config)
    detent.compress(model)
    detent.save(model, path)
    PACKED_DAMAGES[damage](path)
    refuses(mlp(seed=3), path)


def test_packed_weight_without_codes_in_a_state_dict() -> None:
    model = detent.quantize(mlp(), detent.INT8_WEIGHT_ONLY_CFG)
    detent.compress(model)
    tensors = model.state_dict()
    other = detent.restore_from_detent_state(mlp(seed=1), detent.detent_state(model))
    with pytest.raises(RuntimeError, match="Missing key.*_packed_codes"):
        other.load_state_dict({name: t for name, t in tensors.items() if name != "0._packed_codes"})
    with pytest.raises(RuntimeError, match="size mismatch for 0._packed_codes"):
        other.load_state_dict({**tensors, "0._packed_codes": tensors["0._packed_codes"][:3]})
    with pytest.raises(RuntimeError, match=r"_packed_scale is torch.int8, but its format has torch.float32"):
        other.load_state_dict({**tensors, "0._packed_scale": tensors["0._packed_scale"].to(torch.int8)})
    other.load_state_dict(tensors)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "~nobody-at-all/x", "a\udcff", None, 3, b"x"])
def test_impossible_paths(path: Any) -> None:
    with pytest.raises(DetentError):
        detent.restore(mlp(), path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    detent.save(detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X)), path)
    DAMAGES[damage](path)
    refuses(mlp(seed=3), path)


@pytest.mark.parametrize(
    "other", [lambda: mlp(hidden=32), lambda: nn.Sequential(nn.Linear(128, 64)), lambda: nn.ReLU()]
)
@pytest.mark.parametrize("packed", [False, True])
def test_other_architectures(other: Callable[[], Any], packed: bool, tmp_path: Path) -> None:
    model = detent.quantize(mlp(), detent.INT8_DEFAULT_CFG, lambda m: m(X))
    if packed:
        detent.compress(model)
    detent.save(model, tmp_path / "m")
    refuses(other(), tmp_path / "m")


def refuses(model: Any, path: Path) -> None:
    modules, tensors = signature(model)
    with pytest.raises(DetentError) as caught:
        detent.restore(model, path)
    assert len(str(caught.value)) > 20
    after_modules, after_tensors = signature(model)
    assert after_modules == modules
    assert after_tensors.keys() == tensors.keys()
    assert all(torch.equal(after_tensors[k], tensors[k]) for k in tensors)


def test_saving_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detent.quantize(mlp(), detent.INT8_WEIGHT_ONLY_CFG)
    path = tmp_path / "m"
    path.write_text("old")

    def full(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DetentError, match="No space left"):
        detent.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert path.read_text() == "old"
    monkeypatch.undo()
    with pytest.raises(DetentError, match="cannot be written"):
        detent.save(model, tmp_path / "no" / "folder")
