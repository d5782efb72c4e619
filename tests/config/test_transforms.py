"""What the configurations of rotation, svdquant and hqq take, other tools' spellings included."""

from __future__ import annotations

import json
from typing import Any

import pytest

from detent.config.transforms import HQQConfig, RotationConfig, SVDQuantConfig
from detent.errors import DetentError


def test_defaults() -> None:
    rotation = RotationConfig()
    assert (rotation.method, rotation.r1, rotation.r2, rotation.r3, rotation.r4) == ("rotation", None, True, None, None)
    assert (rotation.random, rotation.rotation_size, rotation.needs_data) == (False, None, False)
    assert (SVDQuantConfig().lowrank, SVDQuantConfig().needs_data) == (32, True)
    assert (HQQConfig().lp_norm, HQQConfig().needs_data) == (1.0, False)


def test_files_of_other_tools_are_taken() -> None:
    """As a file for the --pre_optimization_config_file_path looks."""
    text = """{
        "name": "rotation", "model_decoder_layers": "model.layers", "backbone": "model",
        "scaling_layers": {"first_layer": [{"prev_modules": ["model.embed_tokens"]}]},
        "r1": true, "r2": true, "r3": false, "r4": true, "rotation_size": 32,
        "random_r1": true, "random_r2": false, "online_r1_rotation": false, "trainable": false
    }"""
    rotation = RotationConfig(**json.loads(text))
    assert (rotation.r3, rotation.r4, rotation.rotation_size) == (False, True, 32)
    assert (rotation.random, rotation.random2) == (True, False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r5": True}, "unknown field 'r5'; fields: method, r1"),
        ({"rotation_size": 0}, "rotation_size"),
        ({"trainable": True}, "rotation: trainable isn't supported"),
        ({"online_r1_rotation": True}, "online_r1_rotation isn't supported"),
        ({"optimized_rotation_path": "R.bin"}, "optimized_rotation_path isn't supported"),
        ({"r1": False, "r2": False, "r3": False, "r4": False}, "all off"),
        ({"random": True, "random_r1": True}, "set the same thing"),
    ],
)
def test_what_rotation_refuses(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DetentError, match=words):
        RotationConfig(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SVDQuantConfig, {"lowrank": 0}),
        (SVDQuantConfig, {"alpha": 1.5}),
        (HQQConfig, {"lp_norm": 2}),
        (HQQConfig, {"kappa": 0.5}),
        (HQQConfig, {"iters": 0}),
    ],
)
def test_numbers_out_of_range(kind: type, values: dict[str, Any]) -> None:
    with pytest.raises(DetentError, match=next(iter(values))):
        kind(**values)
