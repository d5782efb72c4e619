"""Scores against their definitions in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
from detent.search.scores import WHOLE, Curvature, layer_of
from tiny_language_model import VOCABULARY, make_model

FORMATS = ["w_int4_per_group_g32_sym", "INT8_DEFAULT_CFG"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=generator) for _ in range(count)]


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return (output - batch[:, :4]).square().sum()


def search(model: nn.Module, data: Any, method: str, formats: list[Any] = FORMATS, **options: Any) -> Any:
    return detent.auto_quantize(model, {"effective_bits": 16}, formats, data, method=method, **options)


def scores_of(state: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (name.removesuffix(".quant_recipe"), option): score
        for name, unit in state["candidate_stats"].items()
        for option, score in zip(unit["formats"], unit["scores"], strict=True)
    }


def rounded(x: Tensor, amax: Tensor, bits: int, scale: float) -> Tensor:
    """Integers in float64, with a scale of amax / `scale` that is a float32: on which side of a tie the largest lies
    depends on it."""
    unit = (amax.float() / scale).double()
    return (x / unit).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * unit


def change(layer: nn.Linear, option: str, rows: Tensor) -> Tensor:
    """What an option changes in a layer's output for these rows [n, 32], float64: one group is one row here."""
    weight, four = layer.weight.detach().double(), option == FORMATS[0]
    amax = weight.abs().amax(1, keepdim=True)
    new = rounded(weight, amax, 4, 7.5) if four else rounded(weight, amax, 8, 127)
    x = rows if four else rounded(rows, rows.abs().amax(), 8, 127)
    return x @ new.T - rows @ weight.T


def inputs_and_gradients(model: nn.Sequential, data: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (its inputs, the gradients at its outputs)}, all rows, float64, by plain autograd."""
    model = copy.deepcopy(model).double()
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {str(i): ([], []) for i in (0, 2, 4)}
    for batch in data:
        x, outputs = batch.double(), {}
        for index, module in enumerate(model):
            if str(index) in seen:
                seen[str(index)][0].append(x.detach().clone())
                x = module(x)
                x.retain_grad()
                outputs[str(index)] = x
                x = x.clone()
            else:
                x = module(x)
        loss(x, batch.double()).backward()
        for name, y in outputs.items():
            assert y.grad is not None
            seen[name][1].append(y.grad)
    return {name: (torch.cat(rows), torch.cat(grads)) for name, (rows, grads) in seen.items()}


def test_gradient_scores_are_those_of_autograd() -> None:
    model, data = net(), batches()
    _, state = search(copy.deepcopy(model), data, "gradient", loss_func=loss)
    found = scores_of(state)
    for name, (rows, gradients) in inputs_and_gradients(model, data).items():
        for option in FORMATS:
            expected = float((gradients * change(model[int(name)], option, rows)).square().sum())
            assert found[name, option] == pytest.approx(expected, rel=1e-3)
        assert found[name, "none"] == 0


def test_curvature_scores_are_the_trace() -> None:
    """``tr(H_O D H_I D^T) / 2`` per token, and with rounded activations the error of what really is computed."""
    model, data = net(), batches()
    _, state = search(copy.deepcopy(model), data, "curvature", loss_func=loss)
    found = scores_of(state)
    for name, (rows, gradients) in inputs_and_gradients(model, data).items():
        left, right = gradients.T @ gradients, rows.T @ rows
        d = change(model[int(name)], FORMATS[0], torch.eye(32, dtype=torch.float64)).T
        expected = float(torch.trace(left @ d @ right @ d.T)) / (2 * len(rows) ** 2)
        assert found[name, FORMATS[0]] == pytest.approx(expected, rel=1e-3)
        rounding = change(model[int(name)], FORMATS[1], rows)
        expected = float(torch.einsum("ti,ij,tj->", rounding, left, rounding)) / (2 * len(rows) ** 2)
        assert found[name, FORMATS[1]] == pytest.approx(expected, rel=1e-3)


def test_of_many_outputs_the_curvature_is_a_diagonal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WHOLE + 8))
    detent.replace_quant_module(model)
    curvature = Curvature(layer_of(model, "0"))
    x, g, d = torch.randn(6, 4), torch.randn(6, WHOLE + 8), torch.randn(6, WHOLE + 8)
    curvature.see(x, g)
    expected = (d.double().square().sum(0) * g.double().square().sum(0)).sum() / (2 * 6 * 6)
    assert curvature.score(d) == pytest.approx(float(expected), rel=1e-5)


def test_a_convolution_is_the_matrix_of_its_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    data = [torch.randn(2, 3, 4, 4)]
    weight, image = model[0].weight.detach().double(), data[0]
    grads: list[Tensor] = []
    y = model[0](image)
    y.register_hook(grads.append)
    model[2](model[1](y)).square().sum().backward()
    config = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}, "algorithm": "max"}
    model, state = search(model, data, "curvature", [config], loss_func=lambda out, batch: out.square().sum())
    rows = nn.functional.unfold(image.double(), 3, padding=1).transpose(1, 2).reshape(-1, 27)
    g = grads[0].double().movedim(1, -1).reshape(-1, 8)
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 7
    d = ((weight / scale).round().clamp(-8, 7) * scale - weight).reshape(8, 27)
    expected = float(torch.trace(g.T @ g @ d @ rows.T @ rows @ d.T)) / (2 * len(rows) ** 2)
    assert scores_of(state)["0", "format 1"] == pytest.approx(expected, rel=1e-3)


def tokens(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return [
        {"input_ids": torch.randint(VOCABULARY, (2, 8), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def test_divergence_is_that_of_the_predictions() -> None:
    """Each unit alone, by a model quantized in just these layers; padding doesn't count."""
    data = tokens()
    _, state = search(make_model(), data, "kl_div", ["w_int4_per_channel_sym"], disabled_layers="lm_head")
    unit = state["candidate_stats"]["model.layers.0.self_attn.q_proj.quant_recipe"]
    assert unit["module_names"] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    alone = make_model()
    fmt = detent.parse_scheme("w_int4_per_channel_sym").weight
    cfg = {f"model.layers.0.self_attn.{x}_proj.weight_quantizer": {"format": fmt} for x in "qkv"}
    detent.quantize(alone, {"quant_cfg": cfg})
    expected = 0.0
    for batch in data:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            p = make_model()(**batch).logits[real].double().log_softmax(-1)
            q = alone(**batch).logits[real].double().log_softmax(-1)
        expected += float((p.exp() * (p - q)).sum())
    assert scores_of(state)["model.layers.0.self_attn.q_proj", "w_int4_per_channel_sym"] == pytest.approx(
        expected, rel=1e-3
    )
