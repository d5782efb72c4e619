"""`fold_scale`, `scale_columns` and `tie_scale` against the same written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detent.errors import DetentError
from detent.structure import Fold, find_structure, fold_scale, scale_columns, tie_scale
from structure.by_hand import apply_fold, random_scale
from structure.zoo import make


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt2", "phi3", "mixtral", "llama4_text", "mamba", "gpt_oss"])
def test_the_same_as_by_hand(model_type: str) -> None:
    model = make(model_type)
    by_hand = copy.deepcopy(model)
    for index, site in enumerate(find_structure(model).sites):
        if site.fold is not None:
            scale = random_scale(site, site.fold, index)
            fold_scale(model, site.fold, scale)
            scale_columns(model, site, scale)
            apply_fold(by_hand, site, site.fold, scale)
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name


def test_tied_scales_are_geometric_means() -> None:
    fold = Fold("rows", "v", ("weight",), (0, 1, 0, 1, 2), True)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0])
    expected = torch.tensor([2.0, 4.0, 2.0, 4.0, 3.0])
    assert torch.allclose(tie_scale(fold, scale), expected)
    assert torch.allclose(tie_scale(fold, torch.stack([scale, scale])), torch.stack([expected, expected]))
    assert tie_scale(Fold("rows", "v", ("weight",), None, True), scale) is scale


def test_untied_scales_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    before = model[0].weight.clone()
    fold = Fold("rows", "0", ("weight",), (0, 1, 0, 1, 2), True)
    with pytest.raises(DetentError, match="tie_scale"):
        fold_scale(model, fold, torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]))
    with pytest.raises(DetentError, match="4 channels for 5 channels"):
        fold_scale(model, fold, torch.ones(4))
    assert torch.equal(model[0].weight, before)


def test_low_precision_parameters_keep_their_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 3)).bfloat16()
    weight = model[0].weight.clone()
    fold_scale(model, Fold("rows", "0", ("weight", "bias"), None, True), torch.tensor([1.0, 2.0, 0.3]))
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight[2], (weight[2].float() / 0.3).bfloat16())
