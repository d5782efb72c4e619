"""Rotation of published architectures: what can be rotated is, and the function stays, with an image as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import detent
from detent.checkpoints import Source
from detent.config.transforms import RotationConfig
from detent.pretrained.loading import load_config, load_model
from detent.structure import find_structure
from detent.transforms.rotation import random_tokens, rotate_model
from models.published import make, row

_FOUR: dict[str, Any] = {"num_bits": 4, "type": "dynamic", "block_sizes": {-1: None}}
_CFG = {
    "*weight_quantizer": {"num_bits": 4, "axis": 0},
    "*input_quantizer": _FOUR,
    "*[kv]_bmm_quantizer": _FOUR,
    **dict.fromkeys(("*lm_head*", "*vision*", "*projector*", "*embed*"), {"enable": False}),
}
#: {row: the rotations that it gets}
ROTATED = {
    "google/gemma-2-*": ["R2", "R3", "R4"],
    "allenai/OLMo-2-*": ["R2", "R3", "R4"],
    "hpcai-tech/grok-1": ["R2", "R3", "R4"],
    "microsoft/phi-2": ["R1", "R2", "R3", "R4"],
    "ibm-granite/granite-3.*": ["R1", "R2", "R3", "R4"],
    "Qwen/Qwen3-Next-80B-A3B": ["R1", "R3", "R4"],
    "llava-hf/llava-1.5-*": ["R2", "R3", "R4"],
    "meta-llama/Llama-3.2-*B-Vision(-Instruct)": ["R2", "R3", "R4"],
}


def loaded(name: str, folder: Path) -> Any:
    remote = row(name).remote
    source = Source(make(row(name), folder, torch.float32))
    config = load_config(folder, trust_remote_code=remote)
    return load_model(source, config, dtype=torch.float32, trust_remote_code=remote)


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    """The logits on text, and on text with an image where the model takes one."""
    found = [random_tokens(model)(model).logits.double()]
    image = getattr(model.config, "image_token_index", None)
    if model.config.model_type == "llava":
        ids = torch.tensor([[5, *[image] * 4, 7, 9]])
        pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        found.append(model(input_ids=ids, pixel_values=pixels).logits.double())
    if model.config.model_type == "mllama":
        pixels = torch.randn(1, 1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        ids, ones = torch.tensor([[image, 5, 7, 9]]), torch.ones(1, 1, dtype=torch.long)
        more = {
            "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[None],
            "cross_attention_mask": torch.ones(1, 4, 1, 1),
        }
        found.append(model(input_ids=ids, pixel_values=pixels, **more).logits.double())
    return found


@pytest.mark.parametrize("name", ROTATED)
def test_function_is_unchanged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.transforms.rotation._objective", lambda *_: None)  # whatever rounding makes of it
    model = loaded(name, tmp_path / "m")
    before = outputs(model)
    detent.quantize(model, {"quant_cfg": _CFG, "algorithm": None}, strict=False)
    report = rotate_model(model, find_structure(model), RotationConfig(random=True, random2=True))
    assert [part.name for part in report.parts if part.where] == ROTATED[name]
    detent.disable_quantizer(model, "*")
    for ours, theirs in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_blocks_that_text_does_not_run_do_not_interrupt_the_chain(tmp_path: Path) -> None:
    """Cross-attention stands between blocks, and is passed over without an image."""
    structure = find_structure(loaded("meta-llama/Llama-3.2-*B-Vision(-Instruct)", tmp_path / "m"))
    assert structure.blocks == tuple(f"model.language_model.layers.{index}" for index in (0, 2, 3))
