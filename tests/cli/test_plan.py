"""`detent plan`: what quantize would do, without a weight being read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.runner import Workplace, detent, save_checkpoint, small, succeed
from detent.checkpoints import Source


def plan(place: Workplace, *more: object, run: Any = succeed) -> Any:
    return run("plan", "--model_dir", place.model, "--device", "cpu", *more)


def planned(place: Workplace, *more: object) -> Any:
    return plan(place, "--json", *more).json


def test_agrees_with_what_is_written(place: Workplace) -> None:
    flags = ("--group_size", 32, "--quant_algo", "gptq")
    will = planned(place, "--quant_scheme", "w_int4_per_group_sym", *flags)
    place.quantize(*flags, "--skip_evaluation")
    assert will["weights"] == place.report["weights"]
    assert will["output_bytes"] == pytest.approx(place.report["size_bytes"]["after"], rel=0.03)  # shapes are extra
    assert will["bits_per_weight"] == 4 + 32 / 32  # a float32 scale for each group of 32
    assert will["layout"] == "compressed-tensors"
    assert will["way"] == "block by block"


def test_no_weight_is_read(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    shown = plan(place, "--quant_scheme", "w_mxfp4").out
    assert "model.layers.*.mlp.down_proj.weight" in shown
    assert "output embedding, kept by default" in shown
    assert "tensor by tensor" in shown


def test_same_refusals_as_quantize(place: Workplace) -> None:
    flags = ("--quant_scheme", "w_int4_per_group_sym", "--exclude_layers", "*.nothing")
    refused = plan(place, *flags, run=detent)
    assert refused.code == 2
    assert refused.err == place.quantize("--exclude_layers", "*.nothing", run=detent).err


def test_flags_without_a_plan(place: Workplace) -> None:
    assert "nothing to plan" in plan(place, "--skip_quantization", run=detent).err


def test_a_budget_that_is_too_small_is_told_the_least(place: Workplace) -> None:
    refused = place.quantize("--memory_budget", "1MiB", "--quant_algo", "gptq", "--group_size", 32, run=detent)
    assert refused.code == 2
    assert "needs at least" in refused.err
    assert "takes a size such as 4GiB" in place.quantize("--memory_budget", "much", run=detent).err


def test_a_budget_for_all_but_hidden_states_has_them_on_disk(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detent.engine.store import TensorStore

    flags = ("--group_size", 32, "--quant_algo", "gptq", "--skip_evaluation")
    place.quantize(*flags)
    will = planned(place, "--quant_scheme", "w_int4_per_group_sym", "--seq_len", 32, "--num_calib_data", 4, *flags)
    assert will["states_bytes"] == 2 * 4 * 32 * 64 * 4
    folders = []
    real = TensorStore.__init__
    monkeypatch.setattr(TensorStore, "__init__", lambda self, f=None: (folders.append(f), real(self, f))[1])
    second = Workplace(place.model, place.calibration, place.evaluation, tmp_path / "second")
    second.quantize(*flags, "--memory_budget", f"{will['peak_memory_bytes'] + 1}")
    assert all(folder is not None for folder in folders)
    first, again = (path.joinpath("model.safetensors").read_bytes() for path in (place.out, second.out))
    assert first == again


@pytest.mark.parametrize(
    ("scheme", "flags"),
    [("w_mxfp4", ()), ("w_fp8_a_fp8", ("--kv_cache_dtype", "fp8")), ("w_int4_per_group_sym", ("--group_size", 32))],
)
def test_a_model_that_does_not_fit_is_measured_block_by_block(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, flags: tuple[str, ...]
) -> None:
    """With the same perplexity, before and after, in a run and of its result."""
    place.quantize(*flags, scheme=scheme)
    expected = place.report["perplexity"]
    second = Workplace(place.model, place.calibration, place.evaluation, tmp_path / "second")
    for module in ("quantize", "evaluate"):
        monkeypatch.setattr(f"detent.runs.{module}.available_memory_bytes", lambda: 10_000)
    monkeypatch.setattr("detent.runs.quantize.spills", lambda *_: False)  # there is less than any run needs
    for module in ("quantize", "evaluate"):
        monkeypatch.setattr(f"detent.runs.{module}.load_model", lambda *_, **__: pytest.fail("loaded whole"))
    outcome = second.quantize(*flags, scheme=scheme)
    assert "perplexity is measured block by block" in outcome.err
    assert second.report["perplexity"] == pytest.approx(expected, rel=1e-6)
    for folder, side in ((place.model, "before"), (second.out, "after")):
        assert place.evaluate(folder=folder)["perplexity"][side] == pytest.approx(expected[side], rel=1e-6)


def test_an_output_disk_that_is_too_small(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 995, 5))
    refused = place.quantize("--skip_evaluation", run=detent)
    assert refused.code == 2
    assert "GB are free" in refused.err
    assert not place.out.exists()


GIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("giant", GIANTS)
def test_a_giant_from_its_configuration_alone(giant: str, tmp_path: Path) -> None:
    model_type, values = GIANTS[giant]
    config = small(model_type, **values)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(tmp_path)
    flags = ("--quant_scheme", "w_int4_per_group_sym", "--quant_algo", "gptq", "--json")
    will = json.loads(succeed("plan", "--model_dir", tmp_path, *flags).out)
    layer = 2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    assert will["weights"]["quantized_parameters"] == 126 * layer
    assert will["planning_seconds"] < 120
    assert "no weights" in " ".join(will["notices"])


def test_a_model_without_its_weights_is_planned_and_not_quantized(place: Workplace, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    bare = Workplace(folder, place.calibration, place.evaluation, place.out)
    assert (
        planned(bare, "--quant_scheme", "w_mxfp4")["weights"] == planned(place, "--quant_scheme", "w_mxfp4")["weights"]
    )
    assert "holds no weights" in bare.quantize(run=detent).err
