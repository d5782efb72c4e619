"""The guide's flags: all known, spelled either way, with the guide's defaults; and how the shell's words are read."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from cli.runner import detent
from detent.cli.arguments import normalize
from detent.cli.quantize import quantize
from detent.cli.startup import batch_size_of, choose_device, windows
from detent.errors import DetentError

#: Flag -> default, as in the table of the guide's script. Differences that are meant are in `OURS`.
GUIDE = {
    "multi_gpu": False,
    "multi_device": False,
    "model_attn_implementation": "eager",
    "data_type": "auto",
    "seq_len": 512,
    "batch_size": 1,
    "num_calib_data": 512,
    "skip_quantization": False,
    "quant_scheme": None,
    "group_size_per_layer": None,
    "scale_calculation_mode": "even",
    "kv_cache_dtype": None,
    "min_kv_scale": 0.0,
    "fp8_attention_quant": False,
    "moe_experts_second_step_config": None,
    "pre_quantization_optimization": None,
    "pre_optimization_config_file_path": None,
    "quant_algo": None,
    "quant_algo_config_file_path": None,
    "exclude_layers": None,
    "model_export": None,
    "pack_method": "reorder",
    "export_weight_format": "real_quantized",
    "weight_matrix_merge": False,
    "output_dir": "exported_model",
    "torch_compile": False,
    "model_reload": False,
    "import_model_dir": None,
    "params_save": False,
    "save_dir": "model_params",
    "params_load": False,
    "json_path": None,
    "safetensors_path": None,
    "skip_evaluation": False,
    "tasks": None,
    "max_eval_batch_size": None,
    "num_eval_data": -1,
    "num_fewshot": None,
    "apply_chat_template": False,
    "use_ppl_eval_for_kv_cache": False,
    "ppl_eval_for_kv_cache_context_size": 1024,
    "ppl_eval_for_kv_cache_sample_size": 512,
    "ppl_eval_for_kv_cache_patch_size": None,
    "use_mlperf_rouge": False,
    "eval_data_dir": None,
    "save_metrics_to_csv": False,
    "metrics_output_dir": "metrics_output_dir",
    "use_tp": False,
}
#: None where the default depends: on the machine, the network, the scheme, memory, or the folder; and the layout of
#: another tool is a choice.
OURS = dict.fromkeys(
    [
        "custom_mode",
        "model_dir",
        "device",
        "dataset",
        "group_size",
        "scale_format",
        "eval_batch_size",
        "import_file_format",
    ]
)
#: Flags that this version can't follow, with a value that asks for something.
LATER = {
    "multi_gpu": [],
    "multi_device": [],
    "export_weight_format": ["fake_quantized"],
    "weight_matrix_merge": [],
    "torch_compile": [],
    "params_save": [],
    "save_dir": ["x"],
    "params_load": [],
    "json_path": ["x"],
    "safetensors_path": ["x"],
    "tasks": ["a,b"],
    "num_fewshot": ["2"],
    "apply_chat_template": [],
    "use_ppl_eval_for_kv_cache": [],
    "ppl_eval_for_kv_cache_context_size": ["8"],
    "ppl_eval_for_kv_cache_sample_size": ["8"],
    "ppl_eval_for_kv_cache_patch_size": ["8"],
    "use_mlperf_rouge": [],
    "eval_data_dir": ["x"],
    "save_metrics_to_csv": [],
    "metrics_output_dir": ["x"],
    "use_tp": [],
}


def test_flags_and_defaults_are_the_guides() -> None:
    parameters = inspect.signature(quantize).parameters
    defaults = {name: parameters[name].default for name in {**GUIDE, **OURS}}
    assert defaults == {**GUIDE, **OURS}


@pytest.mark.parametrize("flag", LATER)
@pytest.mark.parametrize("hyphens", [False, True])
def test_flags_of_later_say_so(flag: str, hyphens: bool) -> None:
    spelled = "--" + (flag.replace("_", "-") if hyphens else flag)
    outcome = detent("quantize", spelled, *LATER[flag])
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: --{flag}")
    assert "not implemented in this version" in outcome.err


@pytest.mark.parametrize(("flag", "meant"), [("--quant_shceme", "--quant_scheme"), ("--group-sise", "--group_size")])
def test_misspelled_flags_are_corrected(flag: str, meant: str) -> None:
    outcome = detent("quantize", flag, "x")
    assert outcome.code == 2
    assert meant in outcome.err
    assert outcome.out == ""


def test_help_shows_every_flag_whole() -> None:
    help_text = detent("quantize", "--help").out
    for name in {**GUIDE, **OURS}:
        assert f"--{name} " in help_text or f"--{name}\n" in help_text


def test_commands() -> None:
    assert detent("nonsense").code == 2
    assert detent("--version").out.startswith("detent ")
    assert detent("--help").code == 0
    assert detent("inspect").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "schemes --json"])
def test_light_commands_leave_transformers_alone(command: str) -> None:
    code = (
        "import sys; from detent.cli.app import run; run(sys.argv[1:]);"
        " sys.exit(bool({'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--a-b c-d --e-f=g-h", "--a_b c-d --e_f=g-h"),
        ("--exclude-layers a b --device cpu", "--exclude_layers a --exclude_layers b --device cpu"),
        ("--exclude_layers=a", "--exclude_layers=a"),
        ("--group-size-per-layer *.x 3 --y", "--group_size_per_layer *.x=3 --y"),
        ("x -- --a-b", "x -- --a-b"),
        ("evaluate some-folder -h", "evaluate some-folder -h"),
    ],
)
def test_arguments(given: str, read: str) -> None:
    assert normalize(given.split()) == read.split()


@pytest.mark.parametrize("given", [["--exclude_layers"], ["--exclude_layers", "--device", "cpu"]])
def test_exclusions_of_nothing(given: list[str]) -> None:
    assert normalize(given) == ["--exclude_layers", "", *given[1:]]


def test_numbers_and_devices() -> None:
    assert (windows(-1), windows(3)) == (None, 3)
    assert (batch_size_of(None), batch_size_of("auto"), batch_size_of("auto:4"), batch_size_of("3")) == (
        None,
        None,
        None,
        3,
    )
    assert choose_device("cpu") == "cpu"
    for wrong in ("0", "-1", "auto:0", "1.5"):
        with pytest.raises(DetentError):
            batch_size_of(wrong)
    for wrong in ("mps", "nonsense"):
        with pytest.raises(DetentError):
            choose_device(wrong)
