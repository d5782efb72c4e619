"""`auto_quantize` from end to end, on models of a few layers."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent as mto
import detent as mtq
from detent import DetentError
from detent.nn import TensorQuantizer
from tiny_language_model import VOCABULARY, make_model

INT4 = "w_int4_per_group_g32_sym"
FORMATS = [INT4, mtq.INT8_DEFAULT_CFG]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=generator) for _ in range(count)]


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return (output - batch).square().mean()


def search(model: nn.Module | None = None, bits: Any = 6.5, formats: Any = FORMATS, **options: Any) -> Any:
    options = {"data_loader": batches(), "loss_func": loss, **options}
    constraints = bits if isinstance(bits, dict) else {"effective_bits": bits}
    return mtq.auto_quantize(model or net(), constraints, formats, **options)


def formats_of(state: dict[str, Any]) -> dict[str, str]:
    return {name: row["format"] for row in mtq.auto_quantize_table(state) for name in row["layers"]}


def test_the_guides_snippet(tmp_path: Path) -> None:
    """As it is written there, but for the comma that it lacks after quantization_formats."""
    model = net()
    calib_dataloader = batches()

    def forward_step(model: nn.Module, data: Tensor) -> Any:
        output = model(data)
        return output  # noqa: RET504

    def loss_func(output: Any, data: Any) -> Any:
        loss = (output - data).square().mean()
        return loss  # noqa: RET504

    model, search_state_dict = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 4.8},
        quantization_formats=[mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG],
        data_loader=calib_dataloader,
        forward_step=forward_step,
        loss_func=loss_func,
    )
    mto.save(model, tmp_path / "auto_quantize_model.pt")
    again = mto.restore(net(), tmp_path / "auto_quantize_model.pt")
    assert torch.equal(again(batches()[0]), model(batches()[0]))
    assert search_state_dict["best"]["is_satisfied"]
    assert 4.5 <= search_state_dict["best"]["constraints"]["effective_bits"] <= 4.8


@pytest.mark.parametrize("target", [5.3, 6.0, 7.7, 9.5, 14.0])
def test_it_is_the_best_of_all_assignments(target: float) -> None:
    _, state = search(bits=target)
    units = list(state["candidate_stats"].values())
    elements = sum(sum(unit["elements"]) for unit in units)
    allowed = [
        sum(unit["scores"][pick] for unit, pick in zip(units, picks, strict=True))
        for picks in itertools.product(range(3), repeat=3)
        if sum(unit["costs"][pick] for unit, pick in zip(units, picks, strict=True)) <= target * elements
    ]
    assert state["best"]["score"] == pytest.approx(min(allowed), rel=1e-9)


def test_the_bits_are_those_of_the_formats() -> None:
    model, state = search()
    bits = elements = 0.0
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        quantizer: Any = layer.weight_quantizer
        shape = tuple(layer.weight.shape)
        each = quantizer.format.bits_per_element(shape) if quantizer.is_enabled else 32
        bits, elements = bits + each * layer.weight.numel(), elements + layer.weight.numel()
    assert state["best"]["constraints"]["effective_bits"] == pytest.approx(bits / elements, rel=1e-12)
    rest = sum(layer.bias.numel() for layer in model.modules() if isinstance(layer, nn.Linear)) * 4
    assert state["best"]["constraints"]["bytes"] == pytest.approx(rest + bits / 8, rel=1e-12)


def test_it_computes_what_quantizing_each_layer_so_computes() -> None:
    model, state = search(bits=6.5)
    assert set(formats_of(state).values()) == {INT4, "INT8_DEFAULT_CFG"}
    config = mtq.get_auto_quantize_config(json.loads(json.dumps(state)))
    again = mtq.quantize(net(), config, lambda m: [m(batch) for batch in batches()])
    assert torch.equal(again(batches()[0]), model(batches()[0]))


def test_another_target_needs_no_scores() -> None:
    _, state = search(bits=9)
    assert mtq.get_auto_quantize_config(state, {"effective_bits": 5.3})["algorithm"] == "max"
    expected = formats_of(search(bits=6.5)[1])
    rows = mtq.auto_quantize_table(state, {"effective_bits": 6.5})
    assert {row["layers"][0]: row["format"] for row in rows} == expected
    with pytest.raises(DetentError, match="effective_bits can't be 2: the least that the formats reach is 5.25"):
        mtq.get_auto_quantize_config(state, {"effective_bits": 2})
    curve = mtq.auto_quantize_curve(state)
    bits = [one["constraints"]["effective_bits"] for one in curve]
    assert len(curve) > 2
    assert bits == sorted(bits)


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = mtq.plot_auto_quantize_curve(search()[1], tmp_path / "curve.svg", points=5)
    assert "<svg" in path.read_text()


def test_budgets_in_bytes_and_in_time() -> None:
    everything = sum(p.nbytes for p in net().parameters())
    _, free = search(bits={"bytes": everything})
    assert set(formats_of(free).values()) == {"none"}
    _, state = search(bits={"bytes": f"{everything * 0.4 / 1024}KiB"})
    assert state["best"]["constraints"]["bytes"] <= everything * 0.4
    table = {"*": {INT4: 2, "INT8_DEFAULT_CFG": 1.5, "none": 3}, "4": {"none": 0}}
    _, state = search(bits={"effective_bits": 14, "layer_cost": {"limit": 4, "cost": table}})
    assert formats_of(state)["4"] == "none"
    assert state["best"]["constraints"]["layer_cost"] <= 4
    cost = lambda module, option, elements: elements * (option == "none")  # noqa: E731
    _, state = search(bits={"layer_cost": {"limit": 512, "cost": cost}})
    assert list(formats_of(state).values()).count("none") == 1


def test_every_format_and_name() -> None:
    formats = [2, "w_int3_per_group_g32_sym", mtq.parse_scheme("w_int6_per_channel_sym"), "INT8_WEIGHT_ONLY_CFG", None]
    formats.append(mtq.parse_scheme("w_mxfp4").weight)
    _, state = search(formats=formats)
    unit = state["candidate_stats"]["0.quant_recipe"]
    assert unit["formats"][:4] == [
        "w_int2_per_group_sym",
        "w_int3_per_group_g32_sym",
        "w_int6_per_channel_sym",
        "INT8_WEIGHT_ONLY_CFG",
    ]
    assert unit["costs"] == sorted(unit["costs"][:4]) + unit["costs"][4:]


def test_algorithms_and_what_they_add_are_kept() -> None:
    """AWQ's scales are stored with the layer, and the weights of layers that get another format are as they were."""
    model, state = search(net(), 8.5, ["INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG"])
    unit = state["candidate_stats"]["0.quant_recipe"]
    assert unit["bits"][unit["formats"].index("INT4_AWQ_CFG")] == [32 * 32 * 4 + 32 * 32 + 32 * 32]
    chosen = formats_of(state)
    assert set(chosen.values()) == {"INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG"}
    assert all(model[int(name)].input_quantizer.pre_quant_scale is not None for name in chosen)
    with torch.no_grad():
        assert (model(batches()[0]) - net()(batches()[0])).abs().max() < 0.1
    model, state = search(net(), 32, ["INT4_AWQ_CFG"])
    assert torch.equal(model(batches()[0]), net()(batches()[0]))


def language_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(VOCABULARY, (2, 8), generator=generator)} for _ in range(2)]


def test_layers_that_engines_fuse_share_a_choice() -> None:
    model, state = search(
        make_model(), 12, ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"], data_loader=language_data(), loss_func=None
    )
    groups = [row["layers"] for row in mtq.auto_quantize_table(state)]
    for block in (0, 1):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert [f"model.layers.{block}.{name}" for name in names] in groups
    assert not any("lm_head" in name for names in groups for name in names)  # the presets exclude it
    assert not model.lm_head.weight_quantizer.is_enabled


def test_disabled_layers_count_and_stay() -> None:
    model, state = search(bits=20, disabled_layers=["0", "3"])
    assert formats_of(state)["0"] == "none"
    assert not model[0].weight_quantizer.is_enabled
    with pytest.raises(DetentError, match="the least that the formats reach is 18.75"):
        search(bits=10, disabled_layers="0")
    cost = {"excluded_module_name_patterns": ["0"]}
    assert search(bits={"effective_bits": 6, "cost": cost}, disabled_layers="0")[1]["best"]["is_satisfied"]


def test_search_spaces_and_a_fixed_baseline() -> None:
    spaces = [{"module_name_patterns": ["2"], "quantization_formats": [INT4], "allow_no_quant": False}]
    _, state = search(bits=16, module_search_spaces=spaces)
    assert formats_of(state)["2"] == INT4
    spaces = [{"module_name_patterns": ["2", "4"], "quantization_formats": FORMATS}]
    model, state = search(
        bits=8, formats=None, module_search_spaces=spaces, fixed_quantization_config="FP8_DEFAULT_CFG"
    )
    assert formats_of(state)["0"] == "FP8_DEFAULT_CFG"
    assert model[0].weight_quantizer.num_bits == (4, 3)
    assert model[0].input_quantizer.amax is not None
    # The others are scored with the baseline in use.
    alone = search(bits=24, disabled_layers="0")
    scores = [s["candidate_stats"]["2.quant_recipe"]["scores"] for s in (state, alone[1])]
    assert scores[0] != scores[1]


def test_experts_count_by_the_tokens_they_see() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "mixtral", vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, **common
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    constraints = {"effective_bits": 20, "cost_model": "active_moe"}
    _, state = search(model, constraints, ["FP8_DEFAULT_CFG"], data_loader=language_data(), loss_func=None)
    total = active = 0.0
    for row in mtq.auto_quantize_table(state):
        unit = state["candidate_stats"][f"{row['layers'][0]}.quant_recipe"]
        share = 0.25 if "experts" in row["layers"][0] else 1
        total, active = total + share * row["bits"] * sum(unit["elements"]), active + share * sum(unit["elements"])
        if share < 1:
            assert len(row["layers"]) == 12
    assert state["best"]["constraints"]["effective_bits"] == pytest.approx(total / active)
    with pytest.raises(DetentError, match="cost_model active_moe counts routed experts, and none were found"):
        search(bits=constraints)


def test_an_iterator_is_kept_and_an_empty_one_refused() -> None:
    def once() -> Iterator[Tensor]:
        yield from batches()

    expected = search()[1]["candidate_stats"]
    assert search(data_loader=once())[1]["candidate_stats"] == expected
    used = once()
    list(used)
    with pytest.raises(DetentError, match="data_loader gives no batch; an iterator that was used before is empty"):
        search(data_loader=used)


def test_scores_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    model, state = search(checkpoint=path)
    with monkeypatch.context() as patch:
        patch.setattr("detent.search.data.SearchData.backward", None)
        again, same = search(checkpoint=path)
        assert same == state
        assert torch.equal(again(batches()[0]), model(batches()[0]))
        other, cheaper = search(bits=5.5, checkpoint=str(path))
        assert cheaper["best"]["constraints"]["effective_bits"] <= 5.5
    changed = net()
    nn.init.ones_(changed[0].weight)
    with pytest.raises(DetentError, match="scores of another search: its weights differ"):
        search(changed, checkpoint=path)
    with pytest.raises(DetentError, match="scores of another search: its formats differ"):
        search(formats=[8], checkpoint=path, bits=20)


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.search.search._SAVE_EVERY", -1.0)
    path, data, seen = tmp_path / "scores.json", batches(4), []

    def step(model: nn.Module, batch: Tensor) -> None:
        if len(seen) == 2 and step.__dict__.get("dies", True):
            raise KeyboardInterrupt
        seen.append(batch)
        loss(model(batch), batch).backward()

    with pytest.raises(KeyboardInterrupt):
        search(forward_backward_step=step, loss_func=None, data_loader=data, checkpoint=path)
    step.__dict__["dies"] = False
    _, state = search(forward_backward_step=step, loss_func=None, data_loader=data, checkpoint=path)
    assert len(seen) == 4
    assert state["candidate_stats"] == search(data_loader=data)[1]["candidate_stats"]


def test_flags_gradients_and_modes_are_left_alone() -> None:
    model = net().train()
    model[0].weight.requires_grad_(False)
    model, _ = search(model)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4}, "effective_bits can't be 4: the least that the formats reach is 5.25"),
        ({"bits": {"bytes": 10}}, "bytes can't be 10: the least that the formats reach is"),
        ({"bits": {"effective_bit": 4}}, "Constraints: unknown field 'effective_bit'; did you mean 'effective_bits'?"),
        ({"bits": {"effective_bits": -1}}, "Constraints: effective_bits: input should be greater than 0, not -1"),
        (
            {"bits": {"effective_bits": 9, "cost_model": "flops"}},
            "Constraints: cost_model: input should be 'weight' or 'active_moe', not 'flops'",
        ),
        ({"bits": {"layer_cost": {"limit": 1, "cost": {}}}}, "layer_cost has no cost of none for 0|no cost of w_int4"),
        ({"method": "gradients"}, "unknown method 'gradients'; did you mean 'gradient'?"),
        ({"formats": ["FP8_CFG"]}, "unknown preset 'FP8_CFG'; did you mean"),
        ({"formats": "FP8_DEFAULT_CFG"}, "quantization_formats: a list of configurations or names"),
        ({"formats": [16]}, "integers have 2 to 8 bits, not 16"),
        ({"data_loader": None}, "data_loader: batches to score formats on, not None"),
        ({"disabled_layers": "head"}, "disabled_layers: 'head' matches no module of Sequential"),
        ({"loss_func": None}, "there is no loss to take gradients of: pass loss_func"),
        ({"loss_func": lambda output, batch: output.detach().mean()}, "the loss depends on no layer"),
        ({"loss_func": lambda output, batch: output.sum() * 0}, "every score is zero"),
        ({"loss_func": lambda output, batch: output.sum() * float("inf")}, "isn't finite"),
        ({"num_score_steps": 0}, "num_score_steps: a positive whole number, not 0"),
        ({"fixed_quantization_config": "FP8_DEFAULT_CFG"}, "fixed_quantization_config is for what no entry of"),
        (
            {"module_search_spaces": [{"module_name_patterns": "x"}]},
            "SearchSpace: field 'quantization_formats' is required",
        ),
    ],
)
def test_mistakes_leave_the_model_alone(options: dict[str, Any], said: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DetentError, match=said):
        search(model, **options)
    assert type(model[0]) is nn.Linear
    assert not any(isinstance(module, TensorQuantizer) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
