"""The Python snippets that users of ModelOpt know, run under ``import detent as mtq`` and ``as mto``.

What is left to a user there (the model, the data, the training loop) is small here; the lines of the API are as they
are written there. Calibration algorithms of one's own are not part of it; the search for formats is in
`tests/search/test_auto_quantize.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detent as mto
import detent as mtq
import plain_quant
from detent import _default_disabled_quantizer_cfg
from detent.config import QuantizerAttributeConfig
from detent.distributed import ParallelState
from detent.nn import TensorQuantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.layer1 = nn.Sequential(nn.Linear(144, 128), nn.ReLU())
        self.layer2 = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(self.conv(x).flatten(1)))


def get_model() -> Net:
    torch.manual_seed(0)
    return Net()


def get_dataloader(num_samples: int) -> torch.utils.data.DataLoader[torch.Tensor]:
    images = torch.randn(num_samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(images, batch_size=8)  # type: ignore[arg-type]


def is_on(model: nn.Module) -> dict[str, bool]:
    return {n: q.is_enabled for n, q in model.named_modules() if isinstance(q, TensorQuantizer)}


def test_post_training_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_model()
    config = mtq.INT8_DEFAULT_CFG
    data_loader = get_dataloader(num_samples=32)

    def forward_loop(model: nn.Module) -> None:
        for batch in data_loader:
            model(batch)

    model = mtq.quantize(model, config, forward_loop)
    mtq.print_quant_summary(model)
    printed = capsys.readouterr().out
    assert "layer1.0.weight_quantizer" in printed
    assert "TensorQuantizers found in model" in printed
    images = torch.cat(list(data_loader))
    assert torch.equal(model.conv.input_quantizer.amax, images.abs().amax())
    smooth = mtq.quantize(get_model(), mtq.INT8_SMOOTHQUANT_CFG, forward_loop)
    assert smooth.conv.input_quantizer.pre_quant_scale is not None


def test_quantization_aware_training() -> None:
    config = mtq.INT8_DEFAULT_CFG
    calib_set = list(get_dataloader(32))

    def forward_loop(model: nn.Module) -> None:
        for data in calib_set:
            model(data)

    model = mtq.quantize(get_model(), config, forward_loop)
    images, labels = torch.cat(calib_set), torch.arange(32) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_storing_and_restoring(tmp_path: Path) -> None:
    data = torch.cat(list(get_dataloader(16)))
    model = mtq.quantize(get_model(), mtq.INT8_DEFAULT_CFG, lambda m: m(data))
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(get_model(), tmp_path / "model.pt")
    assert torch.equal(restored(data), model(data))


def test_quantizer_of_ones_own() -> None:
    x = torch.randn(4, 256)
    quantizer = TensorQuantizer()
    quant_x = quantizer(x)
    assert torch.equal(quant_x, plain_quant.integers(x, x.abs().amax()))

    quantizer_custom = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 128}))
    quant_x = quantizer_custom(x)
    blocks = x.view(4, 2, 128)
    assert torch.equal(quant_x, plain_quant.integers(blocks, blocks.abs().amax(-1, keepdim=True), 4).view(4, 256))


def test_basic_modification() -> None:
    config = mtq.INT8_DEFAULT_CFG.copy()
    config["quant_cfg"]["*input_quantizer"]["enable"] = False
    config["quant_cfg"]["*layer1.*"] = {"enable": False}
    model = mtq.quantize(get_model(), config)
    assert {n for n, on in is_on(model).items() if on} == {"conv.weight_quantizer", "layer2.weight_quantizer"}
    assert mtq.INT8_DEFAULT_CFG["quant_cfg"]["*input_quantizer"].get("enable", True)
    assert "*layer1.*" not in mtq.INT8_DEFAULT_CFG["quant_cfg"]


MY_CUSTOM_CONFIG = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}, "enable": True},
        "*input_quantizer": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
        **_default_disabled_quantizer_cfg,
    },
    "algorithm": "max",
}


def test_configuration_from_scratch() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 8)
    x = torch.randn(6, 256)
    model = mtq.quantize(nn.Sequential(nn.Linear(256, 8)), MY_CUSTOM_CONFIG)
    model[0].load_state_dict(plain.state_dict(), strict=False)
    mtq.calibrate(model, "max")
    blocks = plain.weight.view(8, 2, 128)
    weight = plain_quant.integers(blocks, blocks.abs().amax(-1, keepdim=True), 4).view(8, 256)
    tokens = plain_quant.integers(x, x.abs().amax(-1, keepdim=True))
    assert torch.equal(model(x), nn.functional.linear(tokens, weight, plain.bias))


def custom_tensor_parallel_linear_func(input: Any, weight: Any, bias: Any) -> Any:
    return nn.functional.linear(input, weight, bias)


class CustomColumnParallelLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, input: Any) -> Any:
        return custom_tensor_parallel_linear_func(input, self.weight, bias=self.bias)


data_parallel_group = None
tensor_parallel_group = -1


class QuantColumnParallelLinear(CustomColumnParallelLinear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._setup()

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = TensorQuantizer()
        self.parallel_state = ParallelState(
            data_parallel_group=data_parallel_group,
            tensor_parallel_group=tensor_parallel_group,
        )

    def forward(self, input: Any) -> Any:
        input = self.input_quantizer(input)
        weight = self.weight_quantizer(self.weight)
        return custom_tensor_parallel_linear_func(input, weight, bias=self.bias)


@pytest.fixture
def registered() -> Iterator[None]:
    mtq.register(original_cls=CustomColumnParallelLinear, quantized_cls=QuantColumnParallelLinear)
    yield
    mtq.unregister(CustomColumnParallelLinear)


@pytest.mark.usefixtures("registered")
def test_custom_module(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(CustomColumnParallelLinear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    x = torch.randn(5, 16)
    forward_loop: Callable[[nn.Module], Any] = lambda m: m(x)  # noqa: E731
    model = mtq.quantize(build(), mtq.INT8_DEFAULT_CFG, forward_loop)
    layer = model[0]
    assert type(layer) is QuantColumnParallelLinear
    weight = plain_quant.integers(layer.weight, layer.weight.abs().amax(1, keepdim=True))
    assert torch.equal(layer(x), nn.functional.linear(plain_quant.integers(x, x.abs().amax()), weight, layer.bias))
    mto.save(model, tmp_path / "m")
    assert torch.equal(mto.restore(build, tmp_path / "m")(x), model(x))


def test_fast_evaluation() -> None:
    data = torch.cat(list(get_dataloader(16)))
    quantized_model = mtq.quantize(get_model(), mtq.INT8_DEFAULT_CFG, lambda m: m(data))
    expected = quantized_model(data)
    mtq.fold_weight(quantized_model)
    assert torch.equal(quantized_model(data), expected)
    assert not any(on for name, on in is_on(quantized_model).items() if "weight" in name)
