"""A quantizer that is on and that the model goes around is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detent
from detent import DetentError
from detent.model.usage import quantizer_usage

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class GoesAround(nn.Module):
    """Multiplies with the weight of `inner` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.outer(x), self.inner.weight)


@pytest.mark.parametrize("cfg", [{"*weight_quantizer": {"num_bits": 4}}, detent.INT8_DEFAULT_CFG["quant_cfg"]])
def test_a_weight_used_from_outside_is_an_error(cfg: Any) -> None:
    config = {"quant_cfg": [*cfg] if isinstance(cfg, list) else cfg, "algorithm": None}
    model = GoesAround()
    expected = model(X)
    with pytest.raises(DetentError, match=r"computes without them \(for instance inner\.weight_quantizer"):
        detent.quantize(model, config, lambda m: m(X))
    assert torch.equal(model(X), expected)
    assert type(model.inner) is nn.Linear


def test_what_the_data_has_no_use_for_is_told_apart() -> None:
    cfg: Any = {"*weight_quantizer": {"num_bits": 4}, "inner.*": {"enable": False}}
    model = detent.quantize(GoesAround(), {"quant_cfg": cfg}, lambda m: m(X))
    with quantizer_usage(model) as usage:
        model(X)
    assert (usage.bypassed, usage.unreached) == ([], ["spare.weight_quantizer"])


def test_a_loop_that_calls_a_part_is_enough() -> None:
    model = nn.ModuleDict({"part": GoesAround(), "head": nn.Linear(8, 2)})
    with pytest.raises(DetentError, match=r"part\.inner\.weight_quantizer"):
        detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 4}}}, lambda m: m["part"](X))


def test_the_loop_stops_after_its_first_call_where_no_data_is_needed() -> None:
    calls: list[int] = []

    def loop(m: nn.Module) -> None:
        for number in range(4):
            calls.append(number)
            m(X)

    detent.quantize(nn.Sequential(nn.Linear(8, 8)), detent.INT8_WEIGHT_ONLY_CFG, loop)
    assert calls == [0]


def test_attention_that_never_asks_for_its_quantizers_is_seen() -> None:
    from tiny_language_model import make_model

    model = detent.quantize(
        make_model(), {"quant_cfg": {"*[kv]_bmm_quantizer": {"num_bits": (4, 3), "type": "dynamic"}}, "algorithm": None}
    )
    with quantizer_usage(model) as usage:
        model(torch.tensor([[1, 4, 5]]))
    assert not usage.bypassed
    model.config._attn_implementation_internal = "eager"  # as a user's own choice of another implementation does
    with quantizer_usage(model) as usage:
        model(torch.tensor([[1, 4, 5]]))
    assert len(usage.bypassed) == 4


@pytest.mark.parametrize("training", [True, False])
def test_usage_changes_nothing(training: bool) -> None:
    model = detent.quantize(nn.Sequential(nn.Linear(8, 8)), detent.INT8_WEIGHT_ONLY_CFG).train(training)
    expected = model(X)
    with quantizer_usage(model) as usage:
        assert torch.equal(model(X), expected)
    usage.check()
    assert not model[0]._forward_pre_hooks
    assert not model[0].weight_quantizer._forward_pre_hooks
