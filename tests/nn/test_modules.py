"""Quantized modules against the original modules with weights and inputs quantized by hand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent.errors import DetentError
from detent.nn import QuantLinear, QuantModuleRegistry, TensorQuantizer

INT8_ROWS = {
    "quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}},
    "algorithm": "max",
}
WEIGHTS_ONLY = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*input_quantizer": {"enable": False}}}


def rows(weight: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Quantized per index of axis 0."""
    amax = weight.float().abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    return plain_quant.integers(weight, amax, bits)


def per_output(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Quantized per output channel, channel by channel: brute force for transposed convolutions with groups."""
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return rows(weight)
    out = weight.clone()
    per_group_in = weight.shape[0] // module.groups
    for group in range(module.groups):
        block = slice(group * per_group_in, (group + 1) * per_group_in)
        for channel in range(weight.shape[1]):
            piece = weight[block, channel]
            out[block, channel] = plain_quant.integers(piece, piece.abs().amax())
    return out


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding="same", padding_mode="replicate"), (1, 4, 7, 6)),
    (lambda: nn.Conv3d(2, 4, 3, groups=2, bias=False), (1, 2, 5, 5, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 4)),
    (lambda: nn.ConvTranspose2d(6, 6, 3, groups=3, dilation=2), (2, 6, 5, 4)),
    (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (1, 2, 3, 3, 3)),
]


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
def test_convolutions(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    model = detent.quantize(nn.Sequential(copy.deepcopy(plain)), INT8_ROWS, lambda m: m(x))
    weight: Any = plain.weight
    weight.data = per_output(plain, weight.data)
    expected = plain(plain_quant.integers(x, x.abs().amax()))
    assert torch.equal(model(x), expected)
    out_channels = plain.out_channels  # type: ignore[union-attr]
    assert model[0].weight_quantizer.amax.numel() == out_channels
    detent.compress(model)
    assert torch.equal(model(x), expected)


def test_output_size_of_transposed_convolution() -> None:
    plain = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 4)
    model = detent.quantize(copy.deepcopy(plain), INT8_ROWS, lambda m: m(x))
    assert model(x, output_size=[10, 10]).shape == plain(x, output_size=[10, 10]).shape == (1, 3, 10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16)])
def test_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain = nn.Linear(16, 8).to(dtype)
    data, x = torch.randn(5, 16).to(dtype), torch.randn(shape).to(dtype)
    model = detent.quantize(copy.deepcopy(plain), INT8_ROWS, lambda m: m(data))
    weight = rows(plain.weight)
    assert torch.equal(model(x), nn.functional.linear(plain_quant.integers(x, data.abs().amax()), weight, plain.bias))


def test_weight_that_is_not_contiguous() -> None:
    plain = nn.Linear(6, 4)
    plain.weight = nn.Parameter(torch.randn(6, 4).t())
    model = detent.quantize(copy.deepcopy(plain), WEIGHTS_ONLY)
    x = torch.randn(2, 6)
    assert not model.weight.is_contiguous()
    torch.testing.assert_close(model(x), nn.functional.linear(x, rows(plain.weight, 4), plain.bias))


def test_one_module_used_twice() -> None:
    shared = nn.Linear(4, 4)
    model = detent.quantize(nn.Sequential(shared, nn.ReLU(), shared), WEIGHTS_ONLY)
    assert model[0] is model[2]
    x, weight = torch.randn(3, 4), rows(shared.weight, 4)
    hidden = nn.functional.linear(x, weight, shared.bias).relu()
    assert torch.equal(model(x), nn.functional.linear(hidden, weight, shared.bias))


def test_embedding() -> None:
    plain = nn.Embedding(10, 8, padding_idx=3)
    ids = torch.tensor([[1, 3, 9]])
    cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}}
    model = detent.quantize(nn.Sequential(copy.deepcopy(plain)), cfg)
    assert torch.equal(model(ids), nn.functional.embedding(ids, rows(plain.weight)))
    model.train()
    model(ids).sum().backward()
    assert model[0].weight.grad[3].eq(0).all()
    assert model[0].weight.grad[1].eq(1).all()


def test_embedding_with_a_largest_norm() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(6, 4, max_norm=1.0)
    plain.weight.data *= 3
    ids = torch.tensor([0, 5, 5])
    model = detent.quantize(nn.Sequential(copy.deepcopy(plain)), {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}})
    table = plain_quant.integers(plain.weight, plain.weight.abs().amax())
    expected = nn.functional.embedding(ids, table.clone(), max_norm=1.0)
    for _ in range(2):  # the kept table must not shrink
        torch.testing.assert_close(model(ids), expected)
    assert torch.equal(model[0].weight, plain.weight)


def test_cnn_with_pools_and_norms_under_int8() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()
    x = torch.randn(4, 3, 12, 12)
    reference = net(x)
    for preset in (detent.INT8_DEFAULT_CFG, detent.INT8_WEIGHT_ONLY_CFG, detent.FP8_DEFAULT_CFG):
        model = detent.quantize(copy.deepcopy(net), preset, lambda m: m(x))
        assert 0 < (model(x) - reference).norm() < 0.1 * reference.norm()
        assert not model[1].input_quantizer.is_enabled
        assert not model[5].input_quantizer.is_enabled
        assert model[3].input_quantizer.is_enabled == (preset is not detent.INT8_WEIGHT_ONLY_CFG)


def test_pool_that_returns_indices() -> None:
    x = torch.randn(1, 2, 8)
    model = nn.Sequential(nn.MaxPool1d(2, return_indices=True))
    detent.quantize(model, {"quant_cfg": {"*input_quantizer": {"num_bits": 8}}}, lambda m: m(x))
    values, indices = model(x)
    expected = nn.functional.max_pool1d(plain_quant.integers(x, x.abs().amax()), 2, return_indices=True)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


class Renamed(nn.Linear):
    """A subclass that changes nothing about the computation."""


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_subclasses(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Renamed(4, 4), Doubled(4, 4))
    x = torch.randn(2, 4)
    doubled = model[1](x)
    detent.quantize(model, WEIGHTS_ONLY)
    assert isinstance(model[0], QuantLinear)
    assert isinstance(model[0], Renamed)
    assert torch.equal(model[0](x), nn.functional.linear(x, rows(model[0].weight, 4), model[0].bias))
    assert type(model[1]) is Doubled
    assert torch.equal(model[1](x), doubled)
    assert "1 stays unquantized: Doubled is a Linear with its own forward" in caplog.text


def test_registered_subclass_and_back() -> None:
    class QuantDoubled(Doubled):
        def _setup(self) -> None:
            self.weight_quantizer = TensorQuantizer()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight_quantizer(self.weight), self.bias) * 2

    detent.register(Doubled, QuantDoubled)
    try:
        with pytest.raises(DetentError, match="registered already"):
            detent.register(Doubled, QuantDoubled)
        model = detent.quantize(nn.Sequential(Doubled(4, 4)), {"quant_cfg": {"*weight_quantizer": {"axis": 0}}})
        x = torch.randn(2, 4)
        expected = nn.functional.linear(x, rows(model[0].weight), model[0].bias) * 2
        assert torch.equal(model(x), expected)
        assert model[0].parallel_state.tensor_parallel_group == -1
        detent.fold_weight(model)
        assert torch.equal(model(x), expected)
    finally:
        detent.unregister(Doubled)
    assert Doubled not in QuantModuleRegistry
    with pytest.raises(DetentError, match="not registered"):
        detent.unregister(Doubled)
    with pytest.raises(DetentError, match="_setup"):
        detent.register(Doubled, Doubled)


@pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning")
def test_encoder_layers_do_not_go_around_their_quantizers() -> None:
    """In eval mode PyTorch fuses the whole layer, unless it is told not to."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    cfg = {"quant_cfg": {"*linear?.weight_quantizer": {"num_bits": 2, "axis": 0}}}
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = copy.deepcopy(model)
    for block in plain.layers:
        for linear in (block.linear1, block.linear2):
            linear.weight.data = rows(linear.weight.data, 2)
    detent.quantize(model, cfg)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        ours, theirs = model(x, src_key_padding_mask=padded), plain(x, src_key_padding_mask=padded)
    torch.testing.assert_close(ours[~padded], theirs[~padded], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_computed_weights(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(6, 4))).eval()
    x, weight = torch.randn(2, 6), model[0].weight.detach().clone()
    detent.quantize(model, WEIGHTS_ONLY)
    torch.testing.assert_close(model(x), nn.functional.linear(x, rows(weight, 4), model[0].bias))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(DetentError, match="computed from other parameters"):
        detent.fold_weight(model)
    with pytest.raises(DetentError, match="computed from other parameters"):
        detent.compress(model)


def test_lazy_module_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(DetentError, match="run the model once"):
        detent.quantize(model, WEIGHTS_ONLY)
    assert type(model[0]) is nn.LazyLinear


@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
@pytest.mark.parametrize("packed", [False, True])
def test_copies(preset: str, packed: bool) -> None:
    x = torch.randn(3, 8)
    model = detent.quantize(nn.Sequential(nn.Linear(8, 4), Renamed(4, 4)), getattr(detent, preset), lambda m: m(x))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    if packed:
        detent.compress(model)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert len(calls) == 2
    model[0]._forward_hooks.clear()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), expected)


@pytest.mark.slow
def test_compiled_model_computes_the_same() -> None:
    x = torch.randn(3, 8)
    model = detent.quantize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), detent.INT8_DEFAULT_CFG, lambda m: m(x)).eval()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
