"""Command lines put together at random: each ends with exit code 0 or 2, and without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.runner import detent, save_checkpoint, save_text
from fuzz.mutations import dose

pytestmark = pytest.mark.fuzz

WORDS = [
    "", "-1", "0", "1", "32", "1e9", "nan", "x", "auto", "fp8", "int8", "~nobody-at-all/x", "a\0b", "\udcff", "x" * 300,
    "org/name", "../x", "*", "[", "w_fp8", "w_int4_per_group_sym", "w_int8_a_int8_per_tensor_sym", "awq,gptq",
]  # fmt: skip
FLAGS = [
    "--quant_scheme", "--group_size", "--group_size_per_layer", "--scale_format", "--scale_calculation_mode",
    "--kv_cache_dtype", "--min_kv_scale", "--exclude_layers", "--quant_algo", "--quant_algo_config_file_path",
    "--pre_quantization_optimization", "--model_export", "--data_type", "--dataset", "--seq_len", "--batch_size",
    "--num_calib_data", "--eval_dataset", "--num_eval_data", "--eval_batch_size", "--max_eval_batch_size",
    "--overwrite", "--skip_quantization", "--model_reload", "--import_model_dir", "--revision", "--tasks", "--nonsense",
    "--output_dir",
]  # fmt: skip
pairs = st.tuples(st.sampled_from(FLAGS), st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=2))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_checkpoint(folder / "model")
    save_text(folder / "texts.json")
    return folder


@dose(0.1)
@given(pairs=st.lists(pairs, min_size=1, max_size=3))
def test_quantize(files: Path, tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, list[str]]]) -> None:
    place = tmp_path_factory.mktemp("out")
    arguments = ["--model_dir", files / "model", "--output_dir", place / "out", "--dataset", files / "texts.json"]
    arguments += [
        "--quant_scheme",
        "w_fp8",
        "--seq_len",
        16,
        "--num_calib_data",
        2,
        "--skip_evaluation",
        "--device",
        "cpu",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # where relative output folders go
        outcome = detent("quantize", *arguments, *(part for flag, words in pairs for part in (flag, *words)))
    assert outcome.code in (0, 2), outcome
    assert not list(place.glob(".*.writing-*"))


paths = st.sampled_from([*WORDS, ".", "/", "/proc/self", "/dev/null", "/etc/hostname"]) | st.text(max_size=9)


@dose(0.2)
@given(st.sampled_from(["evaluate", "inspect", "structure", "schemes", "nonsense"]), st.lists(paths, max_size=2))
def test_other_commands(command: str, arguments: list[str]) -> None:
    if command == "evaluate" and not arguments:
        return  # the built-in model, in full
    outcome = detent(command, *arguments)
    assert outcome.code in (0, 2), outcome
