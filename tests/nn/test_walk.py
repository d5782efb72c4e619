"""Going through the modules of a model."""

from __future__ import annotations

from torch import nn

from detent.nn.walk import walk


def test_the_order_of_named_modules() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.ModuleDict({"b": nn.ReLU(), "a": nn.Identity()}))
    model.add_module("nothing", None)
    assert walk(model) == list(model.named_modules())
