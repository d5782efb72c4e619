"""Algorithms that learn from data, run over models: traversal, statistics, experts, convolutions, failures."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn

import detent
from detent.algorithms.layer import layers_of
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, forget, register
from detent.algorithms.site import Wanted
from detent.config import QuantizeConfig
from detent.engine import quantization
from detent.engine.blocks import BlockChain, NoChain, record_chain
from detent.engine.observe import SiteObserver
from detent.errors import DetentError
from detent.notices import collected_notices
from tiny_language_model import make_model

IDS = torch.randint(3, 60, (6, 2, 24), generator=torch.Generator().manual_seed(0))
W4 = {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}}, "*lm_head*": {"enable": False}}
W4_ONLY = {**W4, "*input_quantizer": {"enable": False}}
W8A8 = {
    "*weight_quantizer": {"num_bits": 8, "axis": 0},
    "*input_quantizer": {"num_bits": 8},
    "*lm_head*": {"enable": False},
}


def loop(model: nn.Module) -> None:
    for ids in IDS:
        model(ids)


def quantized(algorithm: Any, config: dict[str, Any] = W4_ONLY, model: Any = None, feed: Any = loop) -> Any:
    model = make_model() if model is None else model
    return detent.quantize(model, {"quant_cfg": config, "algorithm": algorithm}, feed)


def solved(
    algorithm: Any, config: dict[str, Any] = W4_ONLY, model: Any = None, feed: Any = loop
) -> tuple[Any, dict[str, list[Outcome]]]:
    """The model, and what algorithms did to its layers."""
    model = make_model() if model is None else model
    done = quantization.run(model, QuantizeConfig.of({"quant_cfg": config, "algorithm": algorithm}), feed)
    return model, done.outcomes


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def difference(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        return float(sum((model(ids).logits - reference(ids).logits).square().sum() for ids in IDS))


# ---- statistics of a model ------------------------------------------------------------------------------------------


def test_sites_and_their_statistics_are_those_of_the_tensors_that_layers_read() -> None:
    model = make_model()
    read: dict[str, list[torch.Tensor]] = {}
    for name, module in linears(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0]))
    model = quantized(None, model=model)
    read.clear()
    with torch.no_grad(), SiteObserver(layers_of(model), Wanted(second_moment=True)) as observer:
        loop(model)
    groups = [[layer.name.rpartition(".")[2] for layer in site.layers] for site in observer.sites[:4]]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for site in observer.sites:
        for layer in site.layers:
            x = torch.cat([t.flatten(0, 1) for t in read[layer.name]]).double()
            assert site.statistics.tokens == len(x)
            torch.testing.assert_close(site.statistics.moment().double(), x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(site.statistics.amax.double(), x.abs().amax(0))
            torch.testing.assert_close(site.statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-7)


# ---- traversal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq_full", "local_hessian"])
def test_block_by_block_on_float_inputs_is_the_whole_model_at_once(method: str) -> None:
    blocks = quantized({"method": method, "layerwise": True, "inputs": "float"})
    whole = quantized({"method": method, "layerwise": False})
    for name, module in linears(blocks).items():
        assert torch.equal(module.weight, linears(whole)[name].weight), name
    assert difference(blocks, whole) == 0


def test_inputs_on_disk_change_nothing_and_are_removed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spilled = quantized({"method": "gptq", "spill": True})
    assert difference(spilled, quantized("gptq")) == 0
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_observed_on_what_quantized_blocks_give() -> None:
    """With the first block rounded to nothing, the second sees other inputs than in the float model."""
    rough = {**W4_ONLY, "*layers.0.*weight_quantizer": {"num_bits": 2, "axis": None}}
    seen = quantized({"method": "gptq", "inputs": "quantized"}, rough)
    float_inputs = quantized({"method": "gptq", "inputs": "float"}, rough)
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(linears(seen)[name].weight, linears(float_inputs)[name].weight)


@pytest.mark.parametrize(
    ("bits", "inputs", "expected"), [(4, False, "float"), (3, False, "quantized"), (4, True, "quantized")]
)
def test_gptq_takes_float_inputs_where_these_are_good_enough(bits: int, inputs: bool, expected: str) -> None:
    config: dict[str, Any] = {**W4, "*weight_quantizer": {"num_bits": bits, "block_sizes": {-1: 16}}}
    config["*input_quantizer"] = {"num_bits": 8} if inputs else {"enable": False}
    left = {kind: quantized({"method": "gptq", "inputs": kind}, config) for kind in ("float", "quantized")}
    default = quantized("gptq", config)
    other = {"float": "quantized", "quantized": "float"}[expected]
    name = "model.layers.1.mlp.gate_proj"
    assert torch.equal(linears(default)[name].weight, linears(left[expected])[name].weight)
    assert not torch.equal(linears(default)[name].weight, linears(left[other])[name].weight)


def test_a_block_is_left_once_all_its_layers_were_seen() -> None:
    """Its last layer is called in the recording run, twice in the first batch, where outputs are needed, and at the
    end, when every quantizer that is on has to be seen at work."""
    model, calls = make_model(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    quantized({"method": "gptq", "inputs": "quantized"}, model=model)
    recorded_and_checked, observed, handed_on, used = 2, 1, len(IDS), 1
    assert len(calls) == recorded_and_checked + observed + handed_on + used


class TwiceRead(nn.Module):
    """A block whose first layer is called again after its last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(torch.tanh(self.last(torch.tanh(self.first(x)))))


def test_a_layer_that_is_called_twice_is_observed_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TwiceRead(), TwiceRead())
    batches = [torch.randn(2, 5, 16) for _ in range(3)]

    def feed(m: nn.Module) -> None:
        for x in batches:
            m(x)

    first = copy.deepcopy(model[0])
    config = {"*weight_quantizer": {"num_bits": 3, "axis": 0}, "*input_quantizer": {"enable": False}}
    result, outcomes = solved("gptq", config, model, feed)
    outcome = outcomes["0.first"][0]
    x = torch.cat([b.reshape(-1, 16) for b in batches])
    with torch.no_grad():
        again = torch.tanh(first.last(torch.tanh(first.first(x))))
        difference = (result[0].first.weight - first.first.weight).double()
        rows = torch.cat([x, again]).double()
    assert outcome.after == pytest.approx(float(((rows @ difference.T) ** 2).sum()), rel=1e-3)


def test_the_check_of_blocks_runs_on_one_sequence() -> None:
    model, seen = make_model().eval(), []
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    names = ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        chain = record_chain(model, names, loop)
        assert isinstance(chain, BlockChain)
        ran, seen[:] = [shape for shape in seen if shape[0] == 1], []
        assert len(ran) == 1  # by itself; inside the model its forward is replaced under the hook
        hidden = chain.inputs.get(2, torch.device("cpu"))
        assert hidden.shape[:2] == IDS.shape[1:]
        whole = chain.run(0, 2, hidden)
        for rows in (slice(0, 1), slice(1, 2)):
            torch.testing.assert_close(chain.run(0, 2, hidden, rows=rows), whole[rows])
        expected = model.model.layers[0](hidden, **chain.calls[0][2].kwargs)
    torch.testing.assert_close(whole, expected if isinstance(expected, torch.Tensor) else expected[0])


def test_data_is_asked_for_once_and_replayed() -> None:
    calls = []

    def once(model: nn.Module) -> None:
        calls.append(1)
        loop(model)

    quantized([{"method": "gptq"}], {**W8A8}, feed=once)
    assert calls == [1]


def test_the_model_is_called_once_per_batch_by_smoothquant() -> None:
    model, calls = make_model(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    quantized("smoothquant", W8A8, model)
    assert len(calls) == len(IDS) + 1  # the last sees whether the quantizers take part


def test_a_model_without_blocks_is_taken_as_a_whole_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    with collected_notices() as notices:
        _, outcomes = solved("gptq", {"*weight_quantizer": {"num_bits": 4, "axis": 0}}, model, lambda m: m(x))
    assert any("whole model at once" in text and "no chain of repeated blocks" in text for text in notices)
    assert outcomes["0"][0].after < outcomes["0"][0].before


class Tangled(nn.Module):
    """Blocks that take their input from two blocks before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.zeros_like(x)
        for layer in self.layers:
            x, before = layer(x + before), x
        return x


def test_blocks_that_do_not_follow_each_other_are_recognised() -> None:
    chain = record_chain(Tangled(), ["layers.0", "layers.1", "layers.2"], lambda m: m(torch.ones(2, 16)))
    assert isinstance(chain, NoChain)
    assert "not the output of the block before" in chain.reason


def test_generation_with_a_cache_is_recognised() -> None:
    model = make_model().eval()

    def generate(m: Any) -> None:
        m.generate(IDS[0], max_new_tokens=3, do_sample=False, use_cache=True)

    with torch.no_grad():
        chain = record_chain(model, ["model.layers.0", "model.layers.1"], generate)
    assert isinstance(chain, (NoChain, BlockChain))
    if isinstance(chain, BlockChain):  # transformers was told not to cache, so every call holds the whole sequence
        assert chain.batches == 3
        assert chain.inputs.get(2, torch.device("cpu")).shape[1] == IDS.shape[2] + 2


# ---- what algorithms do to a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq_lite", "awq_clip", "awq_full", "local_hessian"])
def test_outputs_come_nearer_to_the_float_models_than_with_plain_rounding(method: str) -> None:
    reference = make_model()
    rough = {**W4_ONLY, "*weight_quantizer": {"num_bits": 3, "block_sizes": {-1: 16}}}
    assert difference(quantized(method, rough), reference) < difference(quantized("max", rough), reference)


@pytest.mark.parametrize("method", ["gptq", "awq_lite", "awq_clip", "awq_full", "local_hessian"])
def test_objectives_never_rise_and_are_those_of_the_weights(method: str) -> None:
    _, outcomes = solved(method)
    assert len(outcomes) == 14
    for name, done in outcomes.items():
        assert all(outcome.after <= outcome.before for outcome in done), name


def test_gptq_leaves_weights_on_the_grid_of_the_scales() -> None:
    model = quantized("gptq")
    for name, module in linears(model).items():
        if name != "lm_head":
            assert torch.equal(module.quantized_weight(), module.weight), name  # type: ignore[operator]


def test_channel_scales_alone_leave_the_function_unchanged() -> None:
    model = quantized("awq_lite")
    assert any(q.pre_quant_scale is not None for m in model.modules() if (q := getattr(m, "input_quantizer", None)))
    detent.disable_quantizer(model, "*")
    assert difference(model, make_model()) < 1e-6


def test_smoothquant_scales_and_ranges() -> None:
    model = quantized({"method": "smoothquant", "alpha": 0.5}, W8A8)
    plain = make_model()
    x: list[torch.Tensor] = []
    plain.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    with torch.no_grad():
        loop(plain)
    mlp, float_mlp = model.model.layers[0].mlp, plain.model.layers[0].mlp
    amax = torch.cat(x).flatten(0, 1).abs().amax(0)
    wide = torch.maximum(float_mlp.gate_proj.weight.abs().amax(0), float_mlp.up_proj.weight.abs().amax(0))
    scale = (amax / wide).sqrt()
    for layer in (mlp.gate_proj, mlp.up_proj):
        torch.testing.assert_close(layer.input_quantizer.pre_quant_scale, 1 / scale)
        torch.testing.assert_close(layer.input_quantizer.amax, (amax / scale).amax())
        torch.testing.assert_close(layer.weight_quantizer.amax.flatten(), layer.weight.abs().amax(1))
    torch.testing.assert_close(mlp.up_proj.weight, float_mlp.up_proj.weight * scale)


def test_searched_alpha_is_at_least_as_good_on_its_sample() -> None:
    _, outcomes = solved("autosmoothquant", W8A8)
    found = [o for done in outcomes.values() for o in done]
    assert found
    assert all(o.after <= o.before for o in found)


def test_smoothquant_leaves_layers_alone_whose_input_is_not_quantized() -> None:
    model = quantized("smoothquant", W4_ONLY)
    assert difference(model, quantized("max", W4_ONLY)) == 0


@pytest.mark.parametrize("preset", ["W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_FULL_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
def test_what_algorithms_decide_is_saved(preset: str, tmp_path: Any) -> None:
    model = detent.quantize(make_model(), getattr(detent, preset), loop)
    detent.save(model, tmp_path / "model.safetensors")
    again = detent.restore(make_model(), tmp_path / "model.safetensors")
    assert difference(model.eval(), again.eval()) == 0


@pytest.mark.parametrize("preset", ["NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG"])
def test_gptq_rounds_small_floats(preset: str) -> None:
    _, outcomes = solved("gptq", getattr(detent, preset)["quant_cfg"])
    found = [o for done in outcomes.values() for o in done if o.algorithm == "gptq"]
    assert len(found) == 14
    assert sum(o.after for o in found) < 0.8 * sum(o.before for o in found)


def test_composition_runs_in_order() -> None:
    _, outcomes = solved(["awq_lite", "gptq"])
    names = [o.algorithm for o in outcomes["model.layers.1.mlp.down_proj"]]
    assert names == ["awq_lite", "gptq"]


def test_retargeting_needs_float_outputs_and_brings_them_nearer() -> None:
    reference = make_model()
    rough = {**W4_ONLY, "*weight_quantizer": {"num_bits": 2, "block_sizes": {-1: 16}}}
    plain = difference(quantized("gptq", rough), reference)
    assert difference(quantized({"method": "gptq", "retarget": True}, rough), reference) < 1.02 * plain


# ---- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 8, (3, 2), stride=2, dilation=(1, 2), padding="valid"),
        nn.Conv1d(4, 8, 5, padding="same", padding_mode="circular"),
        nn.Conv3d(2, 6, 2),
    ],
    ids=str,
)
def test_convolution_is_its_matrix_times_its_patches(conv: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(conv))
    dims = len(conv.kernel_size)  # type: ignore[arg-type]
    x = torch.randn(3, conv.in_channels, *[9] * dims)  # type: ignore[arg-type]
    quantized(None, {"*weight_quantizer": {"num_bits": 4, "axis": 0}}, model, None)
    layer = layers_of(model)[0]
    with torch.no_grad():
        wanted = conv(x).movedim(1, -1).reshape(-1, conv.out_channels)  # type: ignore[arg-type]
        found = layer.rows(x) @ layer.matrix().T + conv.bias
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_algorithms_serve_convolutions(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 25, 4)
    )
    x = torch.randn(16, 3, 9, 9) * torch.tensor([1.0, 10.0, 0.1]).reshape(1, 3, 1, 1)
    reference = copy.deepcopy(model)
    bits = (4, 8) if method == "gptq" else (8, 4)  # each has its say about one of the two
    config = {"*weight_quantizer": {"num_bits": bits[0], "axis": 0}, "*input_quantizer": {"num_bits": bits[1]}}
    plain = quantized("max", config, copy.deepcopy(model), lambda m: m(x))
    better = quantized(method, config, model, lambda m: m(x))
    with torch.no_grad():
        assert (better(x) - reference(x)).norm() < (plain(x) - reference(x)).norm()


# ---- experts --------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            where = chosen == index
            if index != 3 and where.any():  # the last expert is never asked
                y[where] = expert(x[where])
        return x + y


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(2))
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


EXPERTS = {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*gate*": {"enable": False}, "*unused*": {"enable": False}}


@pytest.mark.parametrize("layerwise", [True, False])
def test_experts_without_tokens_are_named_and_rounded_without_data(layerwise: bool) -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(2))
    with collected_notices() as notices:
        model, outcomes = solved({"method": "gptq", "layerwise": layerwise}, EXPERTS, Mixture(), lambda m: m(x))
    lost = [text for text in notices if "experts.3." in text]
    assert len(lost) == 4  # two layers in each block
    assert all("only 0 tokens" in text for text in lost)
    found = outcomes["blocks.0.experts.0.0"]
    assert found[0].algorithm == "gptq"
    assert model.blocks[0].experts[3][0].weight_quantizer.is_calibrated


def test_layers_that_data_never_reaches_are_an_error() -> None:
    x = torch.randn(50, 16)
    with pytest.raises(DetentError, match=r"never reached 1 layers \(for instance unused\)"):
        quantized(
            "gptq",
            {"*weight_quantizer": {"num_bits": 4, "axis": 0}, "*experts.3*": {"enable": False}},
            Mixture(),
            lambda m: m(x),
        )


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "algorithm", "feed", "message"),
    [
        (W4_ONLY, "gptq", None, "learns from data"),
        (W4_ONLY, "gptq", lambda m: None, "never"),
        (W4_ONLY, {"method": "gptq", "perc_damp": -1}, loop, "perc_damp"),
        (W4_ONLY, {"method": "smoothquant", "alpha": 1.5}, loop, "alpha is between"),
        (W4_ONLY, {"method": "gptq", "damping": 1}, loop, "unknown field"),
    ],
)  # fmt: skip
def test_failures_leave_the_model_as_it_was(config: Any, algorithm: Any, feed: Any, message: str) -> None:
    model, before = make_model(), make_model().state_dict()
    with pytest.raises(DetentError, match=message):
        quantized(algorithm, config, model, feed)
    assert type(model.lm_head) is nn.Linear
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_nan_is_named_and_half_done_work_undone(method: str) -> None:
    model, before = make_model(), make_model().state_dict()
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] * torch.inf,))
    with pytest.raises(
        DetentError, match=r"block model.layers.1, batch 0: the input of model.layers.1.mlp.down_proj: NaN or infinity"
    ):
        quantized({"method": method}, W8A8 if method == "smoothquant" else W4_ONLY, model)
    hook.remove()
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def never(_: nn.Module) -> None:
    raise AssertionError("the loop ran")


@pytest.mark.parametrize("algorithm", ["gptq", "awq_clip", "awq_full", "local_hessian", "autoround", "best", "distill"])
def test_a_format_that_cannot_be_served_is_refused_before_the_loop_runs(algorithm: str) -> None:
    micro = {"*weight_quantizer": {"format": detent.parse_scheme("w_mx6").weight}, "*lm_head*": {"enable": False}}
    with pytest.raises(DetentError, match=r": model.layers.0.self_attn.q_proj: .* chooses codes jointly.*\(14 layers"):
        quantized(algorithm, micro, feed=never)


def test_steps_that_contradict_each_other_are_refused_before_the_loop_runs() -> None:
    steps = [{"method": "awq_lite", "layerwise": False}, {"method": "gptq", "layerwise": True}]
    with pytest.raises(DetentError, match="layerwise: awq_lite asks for False and gptq for True"):
        quantized(steps, feed=never)
    apart = [{"method": "awq_lite", "inputs": "float"}, {"method": "gptq"}]
    assert difference(quantized(apart), quantized([{"method": "awq_lite"}, {"method": "gptq", "inputs": "float"}])) == 0


@pytest.mark.parametrize("door", ["public", "of runs"])
def test_float_weights_are_held_by_the_public_door_alone(door: str) -> None:
    """Whoever can go back holds them until the end; a run lets go of each as it is replaced."""
    model, held = make_model(), []
    values = model.model.layers[0].mlp.up_proj.weight.detach().numpy().copy()
    model.model.layers[0].mlp.up_proj.weight.data = torch.from_numpy(values)  # lives as long as the tensor's memory
    float_weight = weakref.ref(values)
    del values

    class LookConfig(detent.QuantizeAlgorithmConfig):
        method: Literal["look"] = detent.ModeloptField("look")

    @register(LookConfig)
    class LookHandler(Handler[LookConfig]):
        scope = "model"

        def change(self, step: LookConfig, work: Any) -> None:
            held.append(float_weight() is not None)

    try:
        (quantized if door == "public" else solved)(["gptq", "look"], model=model)
    finally:
        forget(LookConfig)
    assert held == [door == "public"]
    assert float_weight() is None
    assert not any("outcome" in name for module in model.modules() for name in module.__dict__)


# ---- custom algorithms ----------------------------------------------------------------------------------------


@pytest.fixture
def halving() -> Any:
    class HalvingConfig(detent.QuantizeAlgorithmConfig):
        method: Literal["halve"] = detent.ModeloptField("halve")
        factor: float = detent.ModeloptField(0.5, gt=0)

    def halve(
        model: nn.Module, config: Any, forward_loop: Callable[..., Any] | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        for module in linears(model).values():
            quantizer: Any = module.weight_quantizer
            if quantizer.is_enabled:
                quantizer.calibrate_on(module.weight)
                quantizer.amax = quantizer.amax * config.factor
        return model, {}

    @detent.CalibrateModeRegistry.register_mode
    class Halving(detent.BaseCalibrateModeDescriptor):
        @property
        def config_class(self) -> Any:
            return HalvingConfig

        @property
        def convert(self) -> Any:
            return halve

    yield Halving
    detent.CalibrateModeRegistry.remove_mode("halve")


def test_an_algorithm_of_ones_own_is_used_by_name(halving: Any) -> None:
    config = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*lm_head*": {"enable": False}}
    model = quantized({"method": "halve", "factor": 0.25}, config, feed=None)
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer.weight_quantizer.amax.flatten(), 0.25 * layer.weight.abs().amax(1))
    with pytest.raises(DetentError, match="unknown field 'fctor'"):
        quantized({"method": "halve", "fctor": 1})


def test_registering_is_checked() -> None:
    class Stolen(detent.QuantizeAlgorithmConfig):
        method: Literal["gptq"] = detent.ModeloptField("gptq")

    with pytest.raises(DetentError, match="one of Detent's own"):

        @detent.CalibrateModeRegistry.register_mode
        class Descriptor(detent.BaseCalibrateModeDescriptor):
            config_class = Stolen

    with pytest.raises(DetentError, match="no custom algorithm"):
        detent.CalibrateModeRegistry.remove_mode("gptq")


# ---- algorithms that learn by gradients -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        {"method": "autoround", "iterations": 30},
        {"method": "block_ap", "steps": 30},
        ["gptq", {"method": "block_ap", "steps": 30, "batch_size": 1}],
        {"method": "best", "steps": 30, "block_steps": 30},
    ],
    ids=str,
)
def test_learned_weights_are_on_the_grid_and_nearer_to_the_float_model(algorithm: Any) -> None:
    reference, rough = make_model(), {**W4_ONLY, "*weight_quantizer": {"num_bits": 3, "block_sizes": {-1: 16}}}
    model, outcomes = solved(algorithm, rough)
    assert difference(model, reference) < 0.9 * difference(quantized("max", rough), reference)
    for name, module in linears(model).items():
        assert all(outcome.after <= outcome.before for outcome in outcomes.get(name, []))
        if name != "lm_head":
            assert torch.equal(module.quantized_weight(), module.weight), name  # type: ignore[operator]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_block_ap_lowers_the_error_of_blocks_that_gptq_rounded() -> None:
    rough = {**W4_ONLY, "*weight_quantizer": {"num_bits": 3, "block_sizes": {-1: 16}}}
    _, outcomes = solved(["gptq", {"method": "block_ap", "steps": 40}], rough)
    last = [done[-1] for done in outcomes.values()]
    assert len(last) == 14
    assert {outcome.algorithm for outcome in last} == {"block_ap"}
    assert all(outcome.after < 0.95 * outcome.before for outcome in last)


@pytest.mark.parametrize("method", ["autoround", "block_ap"])
def test_learning_by_blocks_says_so_where_there_are_none(method: str) -> None:
    with collected_notices() as notices:
        quantized({"method": method, "layerwise": False})
    assert any(f"{method} needs block-by-block processing and was skipped" in text for text in notices)


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_searching_scales_that_are_not_free_says_so(method: str) -> None:
    dynamic = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    with collected_notices() as notices:
        quantized(method, {**W4_ONLY, "*weight_quantizer": dynamic})
    assert sum(f"{method} changed nothing" in text and "dynamic scales" in text for text in notices) == 1


def test_sequences_are_put_together_and_cut_for_a_step() -> None:
    from detent.engine.learn_block import _portions

    sizes = [5, 1, 1, 2]
    with torch.no_grad():
        chain = record_chain(
            make_model().eval(),
            ["model.layers.0", "model.layers.1"],
            lambda m: [m(torch.ones(n, 8, dtype=torch.long)) for n in sizes],
        )
    assert isinstance(chain, BlockChain)
    portions = _portions(chain, 0, chain.inputs, 2)
    whole = None
    assert portions == [
        [(0, slice(0, 2))],
        [(0, slice(2, 4))],
        [(0, slice(4, 6)), (1, whole)],
        [(2, whole), (3, whole)],
    ]


@pytest.mark.slow
def test_distillation_alone_starts_from_plain_rounding() -> None:
    reference, rough = make_model(), {**W4_ONLY, "*weight_quantizer": {"num_bits": 3, "block_sizes": {-1: 16}}}
    model = quantized({"method": "distill", "steps": 40}, rough)
    assert difference(model, reference) < difference(quantized("max", rough), reference)


def test_float_predictions_are_taken_from_the_first_run_of_the_loop() -> None:
    from detent.config.algorithm import DistillCalibConfig
    from detent.engine.data_loop import DataLoop
    from detent.engine.learn_model import predictions

    model, config = make_model().eval(), DistillCalibConfig(batch_size=2)
    rows = torch.randint(0, 63, (7, 8), generator=torch.Generator().manual_seed(3))
    called: list[int] = []
    model.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    data = DataLoop(lambda m: [m(rows[:5]), m(rows[5:])])
    first = predictions(model, [], data, config)
    assert called == [5, 2]
    again = predictions(model, [], data, config)
    assert called[2:] == [2, 2, 1, 2]
    with torch.no_grad():
        truth = model(rows).logits
    for lessons in (first, again):
        assert [lesson.call.sequences for lesson in lessons] == [2, 2, 1, 2]
        assert torch.allclose(torch.cat([lesson.prediction for lesson in lessons]), truth, atol=1e-5)
        assert all(not lesson.call.kwargs for lesson in lessons)


@pytest.mark.slow
def test_best_leaves_distillation_out_where_there_is_too_little_data() -> None:
    rough = {**W4_ONLY, "*weight_quantizer": {"num_bits": 3, "block_sizes": {-1: 16}}}
    made: dict[int, dict[str, Any]] = {}
    for times in (1, 5):
        with collected_notices() as notices:
            _, outcomes = solved("best", rough, feed=lambda m, n=times: [loop(m) for _ in range(n)])
        made[times] = {o.algorithm: o.decided.get("steps") for o in outcomes["model.layers.0.mlp.up_proj"]}
        told = "distill skipped: the calibration data allow 5 steps; at least 24 are needed" in notices
        assert told is (times == 1)
    assert made[1] == {"gptq": None, "block_ap": 80}
    assert made[5] == {"gptq": None, "block_ap": 40, "distill": 26}


@pytest.mark.slow
def test_best_leaves_distillation_out_where_predictions_take_too_much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from detent.engine import learn_model

    monkeypatch.setattr(learn_model, "PREDICTION_BYTES", 4 * 48 * 64 * 4)  # of three to four calls: 48 tokens, 63 words
    with collected_notices() as notices:
        quantized("best", feed=lambda m: [loop(m) for _ in range(5)])
    assert any("the calibration data and the memory for predictions allow" in notice for notice in notices)


def test_token_ids_beyond_the_vocabulary_are_named() -> None:
    with pytest.raises(DetentError, match="token id 99, but the model knows ids from 0 to 62"):
        quantized("gptq", feed=lambda m: m(torch.tensor([[1, 99, 3]])))


def test_calls_are_put_together_and_cut() -> None:
    from detent.engine.calls import Call, regrouped

    rows = torch.arange(14).reshape(7, 2)
    calls = [
        Call((), {"input_ids": rows[:1], "use_cache": False}),
        Call((), {"input_ids": rows[1:6], "use_cache": False}),
    ]
    calls += [Call((), {"input_ids": rows[6:], "use_cache": True})]
    made = regrouped(calls, 2)
    assert [call.sequences for call in made] == [1, 2, 2, 1, 1]
    assert torch.equal(torch.cat([call.kwargs["input_ids"] for call in made]), rows)
    single = regrouped([Call((row[None],), {}) for row in rows], 3)
    assert [call.sequences for call in single] == [3, 3, 1]
    assert torch.equal(torch.cat([call.args[0] for call in single]), rows)
