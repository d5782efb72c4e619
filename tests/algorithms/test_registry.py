"""The registry of algorithms: adding one, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.algorithms.registry import Handler, LayerFacts, forget, handler_of, refusals, register
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork
from detent.config import ALGORITHMS, ConfigField, parse_algorithm
from detent.config.algorithm import DataAlgorithmConfig
from detent.errors import DetentError
from detent.formats import Format

W4 = {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*input_quantizer": {"enable": False}}


class MeanCalibConfig(DataAlgorithmConfig):
    method: Literal["mean"] = ConfigField("mean")
    share: float = ConfigField(1.0, gt=0)


@pytest.fixture
def mean() -> Iterator[None]:
    """An algorithm of one file: ranges that follow from what the layer reads."""

    @register(MeanCalibConfig)
    class MeanHandler(Handler[MeanCalibConfig]):
        def wants(self, step: MeanCalibConfig) -> Wanted:
            return Wanted()

        def refusal(self, step: MeanCalibConfig, layer: LayerFacts) -> str | None:
            return "it has inputs that are quantized" if layer.input is not None else None

        def solve(self, step: MeanCalibConfig, site: SiteWork) -> None:
            size = float(site.statistics.mean_abs.mean())
            for layer in site.layers:
                amax = torch.full((len(layer.matrix()), 1), step.share * size)
                site.set_range(layer, -amax, amax)

    yield
    forget(MeanCalibConfig)


def test_an_algorithm_is_its_handler_and_its_configuration(mean: None) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    config = {"quant_cfg": W4, "algorithm": {"method": "mean", "share": 2.0}}
    detent.quantize(model, config, lambda m: m(x))
    amax = model[0].weight_quantizer.amax  # type: ignore[union-attr]
    torch.testing.assert_close(amax, torch.full((4, 1), 2 * float(x.abs().mean())))  # type: ignore[arg-type]
    inputs: dict[str, Any] = {**W4, "*input_quantizer": {"num_bits": 8}}
    with pytest.raises(DetentError, match="mean: 0: it has inputs that are quantized"):
        detent.quantize(nn.Sequential(nn.Linear(8, 4)), {"quant_cfg": inputs, "algorithm": "mean"}, lambda m: m(x))


def test_it_is_gone_afterwards() -> None:
    assert "mean" not in ALGORITHMS
    with pytest.raises(DetentError, match="no handler is registered for MeanCalibConfig"):
        handler_of(MeanCalibConfig())


def test_every_algorithm_has_a_handler_in_the_file_of_its_name() -> None:
    """A newcomer finds it: awq_lite, awq_clip and awq_full in awq.py, each other one under its name."""
    files = {"awq_lite": "awq", "awq_clip": "awq", "awq_full": "awq", "autosmoothquant": "smoothquant"}
    package = Path(detent.algorithms.__file__).parent  # type: ignore[attr-defined]
    for method, config in ALGORITHMS.items():
        if method is not None:
            file = files.get(method, method)
            assert type(handler_of(config(method=method))).__module__ == f"detent.algorithms.{file}"
            assert (package / f"{file}.py").is_file()


def weight(scheme: str) -> Format:
    fmt = detent.parse_scheme(scheme).weight
    assert fmt is not None
    return fmt


GROUPS, MICRO = weight("w_int4_per_group_sym"), weight("w_mx6")
INT8 = weight("w_int8_per_tensor_sym")
CONV = (8, 4, 3, 3)


@pytest.mark.parametrize(
    ("algorithm", "layer", "words"),
    [
        ("gptq", LayerFacts(GROUPS), None),
        ("max", LayerFacts(MICRO), None),
        ("mse", LayerFacts(MICRO), None),
        ("gptq", LayerFacts(None, INT8), None),
        ("gptq", LayerFacts(MICRO), "chooses codes jointly"),
        ("awq_lite", LayerFacts(MICRO), None),
        ("gptq", LayerFacts(GROUPS, None, "Conv2d", CONV), "convolution's scales have to be per tensor or per channel"),
        ("autoround", LayerFacts(GROUPS, twice=True), "quantized twice"),
        ("best", LayerFacts(GROUPS, twice=True), "block_ap: .*quantized twice"),
        ("gptq", LayerFacts(GROUPS, twice=True), None),
        ("svdquant", LayerFacts(INT8, None, "Conv2d", CONV), "a low-rank branch needs a linear layer, not Conv2d"),
        ({"method": "svdquant", "skip_layers": ["l*"]}, LayerFacts(INT8, None, "Conv2d", CONV), None),
        (["svdquant", "svdquant"], LayerFacts(INT8), "name svdquant before svdquant|low-rank branch"),
        (["svdquant", "smoothquant"], LayerFacts(INT8, INT8), "name smoothquant before svdquant"),
        (["svdquant", "smoothquant"], LayerFacts(INT8), None),
        (["smoothquant", "svdquant"], LayerFacts(INT8, INT8), None),
        ("autosmoothquant", LayerFacts(INT8, INT8, "Conv2d", CONV), "alpha is searched for linear layers"),
        ("autosmoothquant", LayerFacts(INT8, INT8, "Conv2d", (8, 4, 1, 1)), None),
        ("smoothquant", LayerFacts(INT8, INT8, "Conv2d", CONV), None),
    ],
)
def test_what_is_refused_by_formats_and_kinds_alone(algorithm: Any, layer: LayerFacts, words: str | None) -> None:
    found = refusals(parse_algorithm(algorithm), {"layer": layer})
    if words is None:
        assert found == []
    else:
        with pytest.raises(DetentError, match=words):
            raise DetentError("; ".join(found))


def test_layers_of_a_plan_and_plain_tuples_are_taken() -> None:
    from detent.checkpoints import LayerFormats

    layers = {
        "a": LayerFormats((8, 8), MICRO, None, None, "Linear"),
        "b": (MICRO, None, "Linear"),
        "c": (GROUPS, None, "Linear"),
    }
    (message,) = refusals(parse_algorithm(["max", "gptq"]), layers)
    assert message.startswith("gptq: a: its format")
    assert message.endswith("(2 layers like it)")


def test_tensors_that_a_weight_algorithm_is_handed() -> None:
    """An algorithm that needs weights alone gives ranges and nothing else."""

    class HalfConfig(detent.QuantizeAlgorithmConfig):
        method: Literal["half"] = ConfigField("half")

    @register(HalfConfig)
    class HalfHandler(Handler[HalfConfig]):
        scope = "weight"

        def range_of(self, step: HalfConfig, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
            amax = weight.abs().amax(1, keepdim=True) / 2
            return -amax, amax

    try:
        model = detent.quantize(nn.Sequential(nn.Linear(8, 4)), {"quant_cfg": W4, "algorithm": "half"})
    finally:
        forget(HalfConfig)
    layer: Any = model.get_submodule("0")
    assert torch.equal(layer.weight_quantizer.amax, layer.weight.abs().amax(1, keepdim=True) / 2)
