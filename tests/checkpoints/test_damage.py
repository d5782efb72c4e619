"""Damaged quantized checkpoints: whatever would give wrong numbers is refused by name, by `inspect` too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints.toy import quantized_llama
from detent import formats as f
from detent.checkpoints import open_quantized
from detent.errors import DetentError
from detent.formats import Format
from detent.report.contents import contents

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"
KV = "model.layers.0.self_attn"
#: Formats of weight and input, by layout; a key/value cache in FP8 beside them.
PLANS: dict[str, tuple[Format | None, Format | None, Format | None]] = {
    "int4": (f.integer(4, f.per_group(32)), None, None),
    "uint4": (f.integer(4, f.per_group(32), symmetric=False), None, None),
    "fp8": (f.fp8(), f.fp8(), None),
    "nvfp4": (f.nvfp4(), f.nvfp4(), None),
    "int3": (f.integer(3, f.per_channel(0)), None, None),
    "detent": (f.bfp16(), f.fp8("e5m2"), None),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, formats in PLANS.items():
        folder = tmp_path_factory.mktemp(name)
        quantized_llama(folder, lambda layer, formats=formats: formats, kv_cache=f.fp8())  # type: ignore[misc]
        folders[name] = folder / "out"
    return folders


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def damaged(
    source: Path,
    folder: Path,
    change: Callable[[Tensors], Any] = lambda tensors: None,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
    note: bool = True,
) -> Path:
    """A copy in which something is changed; without Detent's note, as if another tool had written it."""
    folder.mkdir()
    tensors, metadata = read(source / "model.safetensors")
    change(tensors)
    if not note:
        metadata.pop("detent", None)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    content = json.loads((source / "config.json").read_text())
    config(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read_all(folder: Path) -> None:
    checkpoint = open_quantized(folder)
    checkpoint.kv_scales()
    for name in checkpoint.formats.layers:
        checkpoint.layer(name)


def refused(folder: Path, match: str) -> None:
    """By `inspect`, and by whoever reads all of it."""
    with pytest.raises(DetentError, match=match) as caught:
        contents(folder)
    if "config.json calls for" in str(caught.value):
        return  # what only the model knows, and everyone who makes one
    with pytest.raises(DetentError, match=match):
        read_all(folder)


@pytest.mark.parametrize("note", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_undamaged(name: str, note: bool, written: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(written[name], tmp_path / "m", note=note)
    before, after = open_quantized(written[name]), open_quantized(folder)
    assert len(contents(folder)["tensors"]) == len(contents(written[name])["tensors"])
    for layer in before.formats.layers:
        ours, theirs = before.layer(layer).weight, after.layer(layer).weight
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.codes, theirs.codes)


SCALES = {
    "int4": [f"{Q}.weight_scale", f"{KV}.k_scale", f"{KV}.v_scale"],
    "uint4": [f"{Q}.weight_scale"],
    "fp8": [f"{Q}.weight_scale", f"{Q}.input_scale"],
    "nvfp4": [f"{Q}.weight_scale", f"{Q}.weight_global_scale", f"{Q}.input_global_scale"],
    "int3": [f"{Q}.weight_scale"],
    "detent": [f"{Q}.input.scale", f"{KV}.k.scale", f"{KV}.v.scale"],
}


@pytest.mark.parametrize("note", [True, False])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name, tensors in SCALES.items() for tensor in tensors])
def test_scales(name: str, tensor: str, value: float, note: bool, written: dict[str, Path], tmp_path: Path) -> None:
    if "weight_scale" in tensor and name in ("int4", "int3") and value == -1.0:
        return  # signed integers of weights may have negative scales: see tests/formats/test_stored.py
    if "weight_scale" in tensor and name == "nvfp4" and value == float("inf"):
        value = float("nan")  # E4M3 has no infinity

    def change(tensors: Tensors) -> None:
        tensors[tensor].view(-1)[-1] = value

    words = "positive and finite|not the one Detent wrote"
    refused(damaged(written[name], tmp_path / "m", change, note=note), words)


MISSHAPEN: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda x: None,
    "fewer rows": lambda x: x[:-1].clone(),
    "flat": lambda x: x.flatten() if x.dim() > 1 else x.repeat(2),
    "other dtype": lambda x: x.to(torch.int16),
}


@pytest.mark.parametrize("note", [True, False])
@pytest.mark.parametrize("damage", MISSHAPEN)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("int4", "weight_packed"),
        ("int4", "weight_scale"),
        ("uint4", "weight_zero_point"),
        ("uint4", "weight_packed"),
        ("fp8", "weight"),
        ("nvfp4", "weight_packed"),
        ("nvfp4", "weight_global_scale"),
        ("int3", "weight_packed"),
        ("detent", "weight.codes"),
        ("detent", "weight.scale"),
    ],
)
def test_misshapen(name: str, part: str, damage: str, note: bool, written: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        found = MISSHAPEN[damage](tensors.pop(f"{Q}.{part}"))
        if found is not None:
            tensors[f"{Q}.{part}"] = found

    refused(damaged(written[name], tmp_path / "m", change, note=note), "q_proj|no group of config.json|matrices only")


@pytest.mark.parametrize("shape", [[64, 63], [63, 64], [0, 64], [-64, 64], [1 << 40, 64], [64, 64, 1], [64]])
@pytest.mark.parametrize("note", [True, False])
def test_weight_shape(shape: list[int], note: bool, written: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_shape"] = torch.tensor(shape)

    refused(damaged(written["int4"], tmp_path / "m", change, note=note), "q_proj")


def test_shape_that_detent_wrote_and_others_need(written: dict[str, Path], tmp_path: Path) -> None:
    refused(damaged(written["int4"], tmp_path / "m", lambda t: t.pop(f"{Q}.weight_shape")), "weight_shape is missing")


def test_one_of_two_key_value_scales(written: dict[str, Path], tmp_path: Path) -> None:
    for name, tensor in (("int4", f"{KV}.k_scale"), ("fp8", f"{KV}.v_scale"), ("detent", f"{KV}.k.scale")):
        folder = damaged(written[name], tmp_path / name, lambda tensors, tensor=tensor: tensors.pop(tensor))  # type: ignore[misc]
        refused(folder, tensor)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["config_groups"], "x", "'config_groups' is 'x'"),
        (["config_groups"], {"a": ["Linear"]}, "config_groups.a"),
        (["config_groups", "group_0", "targets"], "Linear", "targets"),
        (["config_groups", "group_0", "targets"], ["re:("], "not a regular expression"),
        (["config_groups", "group_0", "weights", "num_bits"], [], r"num_bits' is \[\]"),
        (["config_groups", "group_0", "weights", "num_bits"], "4", "num_bits' is '4'"),
        (["config_groups", "group_0", "weights", "num_bits"], 4.5, "num_bits' is 4.5"),
        (["config_groups", "group_0", "weights", "num_bits"], 10**30, "num_bits"),
        (["config_groups", "group_0", "weights", "group_size"], 0, "group_size"),
        (["config_groups", "group_0", "weights", "group_size"], None, "positive group_size"),
        (["config_groups", "group_0", "weights", "group_size"], "32", "group_size"),
        (["config_groups", "group_0", "weights", "strategy"], "rows", "strategy' is 'rows'"),
        (["config_groups", "group_0", "weights", "dynamic"], "maybe", "dynamic"),
        (["config_groups", "group_0", "weights", "block_structure"], "axb", "block_structure"),
        (["config_groups", "group_0", "weights", "type"], "uint", "type' is 'uint'"),
        (["ignore"], -1, "'ignore' is -1"),
        (["ignore"], ["re:["], "not a regular expression"),
        (["kv_cache_scheme"], "fp8", "kv_cache_scheme"),
        (["transform_config"], "x", "transform_config"),
        (["sparsity_config"], [], "sparsity_config"),
        (["quantization_status"], 3, "quantization_status"),
    ],
)
@pytest.mark.parametrize("note", [True, False])
def test_configuration(
    path: list[str], value: Any, words: str, note: bool, written: dict[str, Path], tmp_path: Path
) -> None:
    def config(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    folder = damaged(written["int4"], tmp_path / "m", config=config, note=note)
    with pytest.raises(DetentError, match=f"config.json: quantization_config: .*{words}"):
        contents(folder)


def test_codes_that_are_nan(written: dict[str, Path], tmp_path: Path) -> None:
    """Codes are looked at by whoever reads them; `inspect` doesn't read them."""

    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"].view(torch.uint8)[3, 3] = 0x7F

    folder = damaged(written["fp8"], tmp_path / "m", change)
    contents(folder)
    with pytest.raises(DetentError, match="q_proj: the weight holds NaN"):
        open_quantized(folder).layer(Q)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bits": lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=8),
    "symmetry": lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=False),
    "a group less": lambda config: config["config_groups"].clear(),
    "no cache": lambda config: config.update(kv_cache_scheme=None),
}


@pytest.mark.parametrize("edit", CONTRADICTIONS)
def test_a_configuration_that_contradicts_the_weights(edit: str, written: dict[str, Path], tmp_path: Path) -> None:
    """Engines read config.json; Detent reads what it left in the header of the weights. Both have to say the same."""
    folder = damaged(written["int4"], tmp_path / "m", config=CONTRADICTIONS[edit])
    with pytest.raises(DetentError, match="is not what the weights were written with|config_groups"):
        open_quantized(folder)
