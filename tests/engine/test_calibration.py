"""`calibrate`: whose data reaches which range, and what happens when something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import detent
import plain_quant
from detent.errors import DetentError
from tiny_language_model import make_model

W8A8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}}


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4))


def signature(model: nn.Module) -> list[Any]:
    """What must not change when something fails."""
    return [
        (name, type(m), m.training, sorted(m._parameters), sorted(m._buffers)) for name, m in model.named_modules()
    ] + [(k, v.clone().tolist()) for k, v in model.state_dict().items()]


BATCHES = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]


def batches() -> Iterator[torch.Tensor]:
    yield from BATCHES


def consume(iterator: Iterator[torch.Tensor]) -> Callable[[nn.Module], None]:
    def loop(model: nn.Module) -> None:
        for batch in iterator:
            model(batch)

    return loop


def test_ranges_are_those_of_the_float_model() -> None:
    plain = mlp().eval()
    hidden = [plain[:3](b) for b in BATCHES]
    model = detent.quantize(mlp(), W8A8, consume(batches()))
    assert torch.equal(model[0].input_quantizer.amax, torch.cat(BATCHES).abs().amax())
    assert torch.equal(model[3].input_quantizer.amax, torch.cat(hidden).abs().amax())
    assert torch.equal(model[0].weight_quantizer.amax, plain[0].weight.abs().amax(1, keepdim=True))


def test_several_algorithms_read_the_data_once() -> None:
    model = detent.quantize(
        mlp(), {**W8A8, "algorithm": ["max", {"method": "mse", "step_size": 0.5}]}, consume(batches())
    )
    assert torch.equal(model[0].input_quantizer.amax, torch.cat(BATCHES).abs().amax())


def test_train_flags_come_back_as_they_were() -> None:
    model = mlp().train()
    model[3].eval()
    seen = []

    def loop(m: nn.Module) -> None:
        seen.append([x.training for x in m.modules()])
        m(BATCHES[0])
        m.train()

    detent.quantize(model, W8A8, loop)
    assert not any(seen[0])
    assert [m.training for m in (model, model[0], model[2], model[3])] == [True, True, True, False]


def test_loop_without_argument_and_loop_over_a_part() -> None:
    model = mlp()
    detent.quantize(model, W8A8, lambda: model(BATCHES[0]))
    assert model[0].input_quantizer.amax is not None
    outer = nn.ModuleDict({"net": mlp()})
    detent.quantize(outer, W8A8, lambda m: m["net"](BATCHES[0]))
    assert outer["net"][0].input_quantizer.amax is not None  # type: ignore[index]


def failing(m: nn.Module) -> None:
    m(BATCHES[0])
    raise KeyError("data set")


FAILURES: list[tuple[Any, Any, type[BaseException], str]] = [
    (W8A8, None, DetentError, "pass a forward_loop"),
    (W8A8, lambda m: None, DetentError, "never called the model"),
    (W8A8, lambda m: m[0](BATCHES[0]), DetentError, r"never reached 1 quantizers \(for instance 3.input_quantizer\)"),
    (W8A8, lambda m: m(BATCHES[0] / 0), DetentError, "0.input_quantizer: NaN or infinity"),
    (W8A8, failing, KeyError, "data set"),
    (W8A8, BATCHES, DetentError, "forward_loop: a function"),
    ({**W8A8, "algorithm": "maxx"}, failing, DetentError, "unknown algorithm 'maxx'; did you mean 'max'"),
    ({**W8A8, "algorithm": {"method": "mse", "steps": 3}}, failing, DetentError, "unknown field 'steps'"),
    ({**W8A8, "algorithm": ["max", "smothquant"]}, failing, DetentError, "did you mean 'smoothquant'"),
    (
        {"quant_cfg": {"*": {"num_bits": 8, "calibrator": "entropy", "axis": 0}}},
        failing,
        DetentError,
        "works per tensor",
    ),
    ({"quant_cfg": {"*wieght_quantizer": {"num_bits": 8}}}, None, DetentError, "did you mean '.weight_quantizer'"),
    ({"quant_cfg": {"*": {"enable": False}}}, None, DetentError, "quantizes nothing"),
    ({"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 5}}}, None, DetentError, "axis 5"),
    ({"quant_cfg": {"*input_quantizer": {"fake_quant": False}}}, None, DetentError, "returns codes"),
]


@pytest.mark.parametrize(
    ("config", "loop", "error", "message", "again"),
    # A model that is calibrated already needs no data, so without any nothing fails there.
    [(*case, again) for case in FAILURES for again in (False, True) if not (again and case[:2] == (W8A8, None))],
)
def test_failures_leave_the_model_as_it_was(
    config: Any, loop: Any, error: type[BaseException], message: str, again: bool
) -> None:
    model = mlp()
    model[3].eval()
    if again:  # quantized once already
        detent.quantize(model, W8A8, lambda m: m(BATCHES[2]))
    before, output = signature(model), model.eval()(BATCHES[1])
    model.train()
    model[3].eval()
    with pytest.raises(error, match=message):
        detent.quantize(model, config, loop)
    assert signature(model) == before
    assert torch.equal(model.eval()(BATCHES[1]), output)


def test_calibrate_that_fails_leaves_ranges_alone() -> None:
    model = detent.quantize(mlp(), W8A8, consume(batches()))
    before = signature(model)
    with pytest.raises(DetentError, match="NaN"):
        detent.calibrate(model, "max", lambda m: m(BATCHES[0] * float("nan")))
    assert signature(model) == before
    expected = model.eval()(BATCHES[0])
    detent.calibrate(model, "max", consume(batches()))
    assert torch.equal(model(BATCHES[0]), expected)


def test_bad_weight_is_named() -> None:
    model = mlp()
    model[3].weight.data[1, 2] = float("nan")
    with pytest.raises(DetentError, match=r"3\.weight: NaN or infinity"):
        detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}})


def test_without_an_algorithm_ranges_come_from_each_tensor() -> None:
    model = detent.quantize(mlp(), {**W8A8, "algorithm": None}).eval()
    x = BATCHES[0]
    layer = model[0]
    weight = plain_quant.integers(layer.weight, layer.weight.abs().amax(1, keepdim=True))
    expected = nn.functional.linear(plain_quant.integers(x, x.abs().amax()), weight, layer.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "calibrator", ["percentile", "entropy", "mse", "histogram", ("percentile", {"percentile": 99.0})]
)
def test_activation_calibrators(calibrator: Any) -> None:
    from detent.formats import integer
    from detent.nn.observers import make_observer

    cfg = {"quant_cfg": {"*0.input_quantizer": {"num_bits": 8, "calibrator": calibrator}}}
    model = detent.quantize(mlp(), cfg, consume(batches()))
    observer = make_observer(calibrator, integer(8, rule="qmax"))
    for batch in BATCHES:
        observer.observe(batch)
    assert torch.equal(model[0].input_quantizer.amax, observer.range(integer(8, rule="qmax"))[1])


def test_rotated_weight_is_calibrated_as_it_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 3, bias=False))
    cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0, "rotate": True}}}
    detent.quantize(model, cfg)
    scipy_linalg = pytest.importorskip("scipy.linalg")
    turned = model[0].weight.detach() @ (torch.tensor(scipy_linalg.hadamard(8), dtype=torch.float32) / 8**0.5)
    torch.testing.assert_close(model[0].weight_quantizer.amax, turned.abs().amax(1, keepdim=True))


def test_sequence_calibrates_each_member_on_what_it_sees() -> None:
    cfg = {"quant_cfg": {"*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 4}}, {"num_bits": (4, 3)}]}}
    model = detent.quantize(mlp(), cfg)
    weight = model[0].weight.detach()
    blocks = weight.view(6, 2, 4)
    first = plain_quant.integers(blocks, blocks.abs().amax(-1, keepdim=True), 4).view(6, 8)
    assert torch.equal(model[0].weight_quantizer[1].amax, first.abs().amax())
    assert torch.equal(model[0].quantized_weight(), plain_quant.small_floats(first, first.abs().amax()))


class Call:
    """Ways to hand a padded batch to a model."""

    @staticmethod
    def keyword(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        model(input_ids=ids, attention_mask=mask)

    @staticmethod
    def position(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        model(ids, mask)

    @staticmethod
    def part(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        model.model(input_ids=ids, attention_mask=mask)

    @staticmethod
    def part_by_position(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        model.model(ids, mask)


@pytest.mark.parametrize("call", [Call.keyword, Call.position, Call.part, Call.part_by_position])
def test_padding_never_enters_statistics(call: Callable[..., None]) -> None:
    """Padding tokens whose embedding is huge change no range: of linear inputs, keys, values."""
    cfg = detent.update_quant_cfg_with_kv_cache_quant(detent.FP8_DEFAULT_CFG, detent.FP8_AFFINE_KV_CFG["quant_cfg"])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    reference = detent.quantize(make_model(), cfg, lambda m: m(ids))
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 1000
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 6).long()[None]
    detent.quantize(model, cfg, lambda m: call(m, padded, mask))
    compared = 0
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, detent.TensorQuantizer) and quantizer.is_enabled and "weight" not in name:
            torch.testing.assert_close(quantizer.amax, reference.get_submodule(name).amax, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == 2 * (7 + 2)


def test_progress_of_bias_needs_data() -> None:
    cfg = {"quant_cfg": {"*input_quantizer": {"type": "dynamic", "bias": {-1: None, "type": "static"}}}}
    with pytest.raises(DetentError, match="pass a forward_loop"):
        detent.quantize(mlp(), cfg)


def test_a_mask_added_to_scores_is_no_padding_mask() -> None:
    """[tokens, tokens] of 0 and -inf, in a batch of as many sequences: every token counts."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.linear(x)

    x = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    x[2, 0, 0] = 50.0
    causal = torch.full((3, 3), float("-inf")).triu(1)
    model = nn.ModuleDict({"part": Part()})
    detent.quantize(model, detent.INT8_DEFAULT_CFG, lambda m: m["part"](x, attention_mask=causal))
    assert model["part"].linear.input_quantizer.amax == 50.0


def test_a_model_without_quantizers_has_nothing_to_calibrate() -> None:
    with pytest.raises(DetentError, match=r"no quantizers.*call quantize\(\) first"):
        detent.calibrate(nn.Sequential(nn.Linear(4, 4)), "max", lambda m: m(torch.ones(1, 4)))
