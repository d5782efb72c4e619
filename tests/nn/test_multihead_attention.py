"""nn.MultiheadAttention and PyTorch's transformer layers against attention written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detent
import plain_quant
from detent.errors import DetentError

CFG = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 4, "axis": 0},
        "*input_quantizer": {"num_bits": 8, "axis": None},
    }
}


def rows(weight: Tensor) -> Tensor:
    return plain_quant.integers(weight, weight.abs().amax(1, keepdim=True), 4)


def attended(module: Any, inputs: list[Tensor], hidden: Tensor | None, rows: Any) -> tuple[Tensor, Tensor]:
    """What goes into the output projection, with in-projections changed by `rows`, and the probabilities."""
    if module.in_proj_weight is not None:
        matrices = rows(module.in_proj_weight).chunk(3)
    else:
        matrices = tuple(rows(getattr(module, f"{s}_proj_weight")) for s in "qkv")
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).flatten(-2), scores.softmax(-1).mean(1)


def by_hand(module: Any, inputs: list[Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """[batch, tokens, channels]; `hidden` [batch, queries, keys]: what isn't seen. Ranges are those of the float
    model's activations, one for the three inputs."""
    amax = max(float(x.abs().amax()) for x in inputs)
    second = attended(module, inputs, hidden, lambda w: w)[0].abs().amax()
    y, seen = attended(module, [plain_quant.integers(x, amax) for x in inputs], hidden, rows)
    return F.linear(plain_quant.integers(y, second), rows(module.out_proj.weight), module.out_proj.bias), seen


class Wrapped(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, **options)

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.attention(*inputs, **options)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 12, "vdim": 8}], ids=["joined", "no bias", "separate"]
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_against_attention_by_hand(options: dict[str, Any], batch_first: bool, masked: bool, itself: bool) -> None:
    if itself and "kdim" in options:
        pytest.skip("keys of another width")
    model = Wrapped(batch_first=batch_first, **options).eval()
    plain = copy.deepcopy(model)
    query = torch.randn(2, 5, 16)
    key = query if itself else torch.randn(2, 7, options.get("kdim", 16))
    value = query if itself else torch.randn(2, 7, options.get("vdim", 16))
    padding = torch.zeros(2, key.shape[1], dtype=torch.bool)
    padding[1, -2:] = masked
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    given = [given[0]] * 3 if itself else given
    more = {"key_padding_mask": padding} if masked else {}
    detent.quantize(model, CFG, lambda m: m(*given, **more))
    hidden = padding.unsqueeze(1).expand(-1, 5, -1) if masked else None
    expected, weights = by_hand(plain.attention, [query, key, value], hidden)
    with torch.no_grad():
        for need in (True, False):
            found, seen = model(*given, need_weights=need, **more)
            torch.testing.assert_close(found if batch_first else found.transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
            assert (seen is None) == (not need)
            if seen is not None:
                torch.testing.assert_close(seen, weights, rtol=1e-4, atol=1e-5)
        before = model(*given, **more)[0]
        state = detent.restore_from_detent_state(copy.deepcopy(plain), detent.detent_state(model))
        state.load_state_dict(model.state_dict())
        assert torch.equal(state(*given, **more)[0], before)
        detent.fold_weight(model)
        torch.testing.assert_close(model(*given, **more)[0], before, rtol=1e-6, atol=1e-6)
        if model.attention.in_proj_weight is not None:
            assert torch.equal(model.attention.in_proj_weight, rows(plain.attention.in_proj_weight))
        detent.disable_quantizer(model, "*")


def test_off_it_computes_what_it_did() -> None:
    model, x = Wrapped(batch_first=True, add_bias_kv=True, add_zero_attn=True).eval(), torch.randn(2, 5, 16)
    plain = copy.deepcopy(model)
    detent.replace_quant_module(model)
    with torch.no_grad():
        assert torch.equal(model(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_layers_use_the_quantized_weights(dtype: torch.dtype) -> None:
    """In eval mode PyTorch fuses the whole layer, unless it is told not to."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).to(dtype).eval(), torch.randn(2, 5, 16, dtype=dtype)
    plain = copy.deepcopy(model)
    for block in plain.layers:
        for module, name in (
            (block.self_attn, "in_proj_weight"),
            (block.self_attn.out_proj, "weight"),
            (block.linear1, "weight"),
            (block.linear2, "weight"),
        ):
            parameter = getattr(module, name)
            parameter.data = rows(parameter.data.float()).to(dtype)
    detent.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}})
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), **close)
        padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        ours, theirs = model(x, src_key_padding_mask=padded), plain(x, src_key_padding_mask=padded)
    torch.testing.assert_close(ours[~padded], theirs[~padded], **close)


class OfItsOwn(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.out_proj.weight)


def test_a_subclass_that_goes_around_its_projection_stays() -> None:
    with pytest.raises(DetentError, match="no module that Detent can quantize"):
        detent.quantize(nn.Sequential(OfItsOwn(8, 2)), detent.INT8_WEIGHT_ONLY_CFG)
