"""LoRA adapters stay in float unless a rule names them, and are saved and restored with a quantized base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.model.conversion import named_quantizers

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
INT4 = {"num_bits": 4, "axis": 0}


class LoraLinear(nn.Module):
    """A wrapped layer as peft makes it: ``base_layer`` beside ``lora_A`` and ``lora_B`` by the adapter's name."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def with_adapter(model: Any) -> Any:
    torch.manual_seed(1)
    model[0] = LoraLinear(model[0])
    return model


def on(model: nn.Module) -> set[str]:
    return {name for name, quantizer in named_quantizers(model) if quantizer.is_enabled}


BASE = {"0.base_layer.weight_quantizer", "2.weight_quantizer"}
LORA_A = "0.lora_A.default.weight_quantizer"


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"*weight_quantizer": INT4}, BASE),
        ({"*": INT4, "*put_quantizer": {"enable": False}}, BASE),
        ({"*weight_quantizer": INT4, "*lora_A*weight_quantizer": {"num_bits": 8}}, BASE | {LORA_A}),
        ({"*weight_quantizer": INT4, "*lora_*": {"num_bits": 8}, "*lora_B*": {"enable": False}}, None),
    ],
)
def test_only_a_rule_of_their_own_reaches_adapters(
    cfg: Any, expected: set[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = detent.quantize(with_adapter(base()), {"quant_cfg": cfg, "algorithm": None})
    if expected is None:
        expected = BASE | {f"0.lora_A.default.{side}_quantizer" for side in ("input", "weight", "output")}
    assert on(model) == expected
    told = "stay in float; to quantize them, give them an entry in quant_cfg" in caplog.text
    assert told is (LORA_A not in expected or len(expected) == 3)
    again = detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}, "algorithm": None})
    assert again[0].base_layer.weight_quantizer.num_bits == 8


@pytest.mark.parametrize("order", ["base first", "adapter first", "adapter quantized"])
def test_an_adapter_on_a_quantized_base_is_restored(order: str, tmp_path: Path) -> None:
    cfg: Any = {"*weight_quantizer": INT4}
    if order == "base first":
        model = with_adapter(detent.quantize(base(), {"quant_cfg": cfg}))
    elif order == "adapter first":
        model = detent.quantize(with_adapter(base()), {"quant_cfg": cfg})
    else:
        model = detent.quantize(with_adapter(base()), {"quant_cfg": {**cfg, "*lora_*weight_quantizer": INT4}})
    with torch.no_grad():
        model[0].lora_B["default"].weight.add_(0.25)  # trained
    detent.save(model, tmp_path / "model.safetensors")
    restored = detent.restore(with_adapter(base()), tmp_path / "model.safetensors")
    assert torch.equal(restored(X), model(X))
    assert on(restored) == on(model)


def test_the_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from tiny_language_model import make_model

    ids = torch.tensor([[1, 5, 9, 4]])
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    detent.quantize(model, detent.INT8_WEIGHT_ONLY_CFG)
    assert on(model)
    assert not any("lora_" in name for name in on(model))
    plain = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    detent.save(model, tmp_path / "model.safetensors")
    restored = detent.restore(plain, tmp_path / "model.safetensors")
    assert torch.equal(restored(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = peft.PeftModel.from_pretrained(
        detent.quantize(make_model(), detent.INT8_WEIGHT_ONLY_CFG), tmp_path / "adapter"
    )
    torch.testing.assert_close(base(ids).logits, model(ids).logits)
    with pytest.raises(detent.DetentError, match="is quantized, but save_pretrained"):
        model.get_base_model().save_pretrained(tmp_path / "base")
