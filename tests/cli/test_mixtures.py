"""Mixtures of experts on the command line: what is asked for of experts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from cli.runner import Workplace, detent, logits, save_checkpoint, small
from detent.runs.load import load_quantized

MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SECOND = ("--moe_experts_second_step_config", "w_int4_per_channel_sym")


def of(place: Workplace, folder: Path, model_type: str = "mixtral", **values: Any) -> Workplace:
    return replace(place, model=save_checkpoint(folder / "model", small(model_type, **{**MIXTRAL, **values})))


def test_a_second_step(place: Workplace, tmp_path: Path) -> None:
    """Recipe 10: FP8 with one scale, then four bits per output channel on its codes."""
    place = of(place, tmp_path)
    outcome = place.quantize("--kv_cache_dtype", "fp8", *SECOND, "--skip_evaluation", scheme="w_fp8_a_fp8")
    assert "compressed-tensors does not hold model.layers.0.mlp.experts.0.gate_proj: progressive" in outcome.err
    weight = load_file(place.model / "model.safetensors")["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    first = weight.abs().max() / 448
    codes = (weight / first).to(torch.float8_e4m3fn).double()
    second = (codes.abs().amax(1, keepdim=True).float() / 7.5).double()
    expected = (codes / second).round().clamp(-8, 7) * second * first.double()
    read = load_quantized(place.out).get_parameter("model.layers.1.mlp.experts.2.down_proj.weight")
    torch.testing.assert_close(read.double(), expected, rtol=1e-6, atol=0)
    formats = {layer["name"]: layer["format"] for layer in place.report["layers"]}
    assert sum("on the codes of" in text for text in formats.values()) == 2 * 4 * 3
    assert "on the codes of" not in formats["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("model_type", "scheme", "said"),
    [
        ("llama", "w_fp8_a_fp8", "the model has no mixture of experts"),
        ("mixtral", "w_int8_per_channel_sym", "the base of a progressive format is a float format per tensor"),
        ("mixtral", "w_fp8_per_channel_static_a_fp8_per_token_dynamic", "it goes with a scheme such as w_fp8_a_fp8"),
    ],
)
def test_a_second_step_on_something_else(
    model_type: str, scheme: str, said: str, place: Workplace, tmp_path: Path
) -> None:
    outcome = of(place, tmp_path, model_type).quantize(*SECOND, scheme=scheme, run=detent)
    assert outcome.code == 2
    assert "moe_experts_second_step_config: " in outcome.err
    assert said in outcome.err


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_every_expert_sees_every_token(model_type: str, place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path, model_type, **({"head_dim": 16} if model_type == "gpt_oss" else {}))
    options = ("--group_size", 32, "--skip_evaluation", "--quant_algo", "gptq", "--seq_len", 8, "--num_calib_data", 2)
    outcome = place.quantize(*options)
    assert "tokens reached it (gptq needs" in outcome.err
    outcome = replace(place, out=tmp_path / "other").quantize(*options, "--calibrate_all_experts")
    assert "tokens reached it" not in outcome.err


def test_experts_that_route_themselves(place: Workplace, tmp_path: Path) -> None:
    sizes = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    values = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    place = of(place, tmp_path, "dbrx", **values, attn_config=sizes, ffn_config=experts)
    outcome = place.quantize("--calibrate_all_experts", scheme="w_fp8_a_fp8", run=detent)
    assert outcome.code == 2
    assert "calibrate_all_experts: " in outcome.err
    place.quantize("--skip_evaluation", scheme="w_fp8_a_fp8")
    assert torch.isfinite(logits(load_quantized(place.out))).all()


@pytest.mark.parametrize(
    "options",
    [
        ("w_fp8_a_fp8", "--kv_cache_dtype", "fp8"),
        ("w_int8_a_int8_per_tensor_sym",),
        ("w_fp8_a_fp8", "--kv_cache_dtype", "fp8", *SECOND),
    ],
)
def test_recipes(options: tuple[str, ...], place: Workplace, tmp_path: Path) -> None:
    place = of(place, tmp_path)
    scheme, *more = options
    place.quantize(*more, scheme=scheme)
    assert place.report["weights"]["quantized"] == 32
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]


@pytest.mark.slow
def test_reading_experts_makes_no_tensor_of_all_of_them(place: Workplace, tmp_path: Path) -> None:
    """Of a large mixture, that would be a second copy of a block. (Memory that nothing is written to costs nothing.)"""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta and "empty" not in str(func):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return made

    place = of(place, tmp_path, num_local_experts=36, num_hidden_layers=1)
    place.quantize("--skip_evaluation", scheme="w_fp8_per_channel_static_a_fp8_per_token_dynamic")
    with Largest():
        load_quantized(place.out)
    assert Largest.numel < 36 * 64 * 128
