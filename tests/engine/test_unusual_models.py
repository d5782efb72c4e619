"""Models that calibration meets seldom: short rows, layers of many shapes, experts without tokens, fast paths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent.engine import store
from detent.errors import DetentError
from detent.notices import collected_notices
from tiny_language_model import make_model

OF_SITES = ["awq_lite", "awq_clip", "awq_full", "local_hessian", "gptq", "autoround", "svdquant", "smoothquant"]
GROUPS_OF_128 = {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}}, "*input_quantizer": {"enable": False}}
PER_CHANNEL = {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*input_quantizer": {"enable": False}}


def data(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) * torch.linspace(0.2, 3, shape[-1]) for _ in range(2)]


def quantized(model: nn.Module, algorithm: Any, config: Any, batches: list[torch.Tensor]) -> Any:
    model = copy.deepcopy(model)
    return detent.quantize(model, {"quant_cfg": config, "algorithm": algorithm}, lambda m: [m(x) for x in batches])


def error(model: nn.Module, reference: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - reference(x)).double().square().sum()) for x in batches)


@pytest.mark.parametrize("width", [48, 200])
@pytest.mark.parametrize("algorithm", OF_SITES)
def test_rows_that_groups_do_not_divide(algorithm: str, width: int) -> None:
    """Shorter than a group, or with a short last one; smoothquant leaves layers with float inputs alone."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(width, 32)), data(96, width)
    rounded = error(quantized(model, "max", GROUPS_OF_128, batches), model, batches)
    better = error(quantized(model, algorithm, GROUPS_OF_128, batches), model, batches)
    if algorithm == "smoothquant":
        assert better == rounded
    elif algorithm == "awq_lite":  # may find no scale that is better
        assert better <= rounded
    else:
        assert better < rounded


def shapes_in_turn(kind: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes = ((16, 24), (24, 40), (40, 8))
    if kind == "layers":
        return nn.Sequential(*(nn.Linear(i, o) for i, o in sizes)), data(64, 16)
    if kind == "blocks":
        return nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in sizes)), data(32, 4, 16)
    stages = (nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in ((3, 8), (8, 16), (16, 8)))
    return nn.Sequential(*stages), [torch.randn(4, 3, 16, 16) for _ in range(2)]


@pytest.mark.parametrize("kind", ["layers", "blocks", "stages"])
@pytest.mark.parametrize("algorithm", [*OF_SITES, "best", "block_ap"])
def test_lists_of_alike_modules_whose_shapes_change(algorithm: str, kind: str) -> None:
    model, batches = shapes_in_turn(kind)
    if (algorithm, kind) == ("svdquant", "stages"):
        with pytest.raises(DetentError, match="svdquant: 0.0: a low-rank branch needs a linear layer, not Conv2d"):
            quantized(model, algorithm, PER_CHANNEL, batches)
        return
    with collected_notices() as notices:
        better = quantized(model, algorithm, PER_CHANNEL, batches)
    plain = quantized(model, "max", PER_CHANNEL, batches)
    assert error(better, model, batches) <= 1.05 * error(plain, model, batches)
    if algorithm != "smoothquant":
        assert any("whole model at once instead of block by block" in text for text in notices)


@pytest.mark.parametrize("algorithm", ["gptq", "awq_lite", "smoothquant", "svdquant"])
def test_codes_in_place_of_values(algorithm: str) -> None:
    """`fake_quant: False` gives the values that simulating gives, also where data is too little for the algorithm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    packed: dict[str, Any] = copy.deepcopy(PER_CHANNEL)
    packed["*weight_quantizer"]["fake_quant"] = False
    for batches in (data(4, 16), data(64, 16)):
        real, simulated = (quantized(model, algorithm, config, batches) for config in (packed, PER_CHANNEL))
        with torch.no_grad():
            assert torch.equal(real(batches[0]), simulated(batches[0]))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Mixture(nn.Module):
    """Four experts in each of two layers; the last one is never chosen unless `all_chosen`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(4))}) for _ in "ab")
        self.all_chosen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = torch.zeros_like(x)
            for index, expert in enumerate(layer["experts"]):  # type: ignore[index, arg-type]
                rows = slice(index * 8, index * 8 + 8)
                if index < 3 or self.all_chosen:
                    y[rows] = expert(x[rows])
            x = x + y
        return x


W8A8 = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}


@pytest.mark.parametrize("algorithm", ["max", "gptq", "smoothquant"])
def test_an_expert_without_tokens_takes_the_range_of_the_others(algorithm: str) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    with collected_notices() as notices:
        model = quantized(Mixture(), algorithm, W8A8, [x])
    experts = model.layers[0].experts
    for part in ("up", "down"):
        ranges = [getattr(expert, part).input_quantizer.amax for expert in experts]
        assert torch.equal(ranges[3], torch.stack(ranges[:3]).amax(0))
    name = "layers.0.experts.3.up.input_quantizer"
    assert sum(text.startswith(f"{name}: no token reached this expert") for text in notices) == 1
    with torch.no_grad():
        model.all_chosen = True
        assert bool(torch.isfinite(model(x)).all())


def test_ranges_shared_by_experts_are_those_of_the_float_model() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    up = quantized(Mixture(), "max", W8A8, [x]).layers[0].experts[3].up
    assert torch.equal(up.input_quantizer.amax, x[:24].abs().amax())
    rounded = plain_quant.integers(x[24:], x[:24].abs().amax())
    with torch.no_grad():
        torch.testing.assert_close(up.input_quantizer(x[24:]), rounded)


class FastPath(nn.Module):
    """Multiplies with a layer's weight without calling the layer, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skipped = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) @ self.skipped.weight.T


@pytest.mark.parametrize("algorithm", ["max", "gptq"])
def test_a_layer_that_a_fast_path_bypasses_is_named_with_what_to_do(algorithm: str) -> None:
    with pytest.raises(
        DetentError, match=r"never reached 1 (layers|quantizers) \(for instance skipped.*fast path.*exclude"
    ):
        quantized(FastPath(), algorithm, W8A8, data(32, 16))
    rest = {**W8A8, "*skipped*": {"enable": False}}
    assert quantized(FastPath(), algorithm, rest, data(32, 16)).first.input_quantizer.is_calibrated


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    config = {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "*input_quantizer": {"enable": False}}
    with pytest.raises(DetentError, match="spill: .*No space left on device.*TMPDIR"):
        quantized(make_model(), {"method": "gptq", "spill": True}, config, [torch.arange(24)[None]])
