"""Files and folders on the command line: what is refused and when, and what interrupted runs leave."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.runner import Outcome, Workplace, contents, detent
from detent.external import output
from detent.external.output import Workspace


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.strip().splitlines() if not line.startswith(("Note:", "Loading"))]
    assert len(lines) == 1, outcome.err
    for word in words:
        assert word in lines[0]


@pytest.fixture
def copy(place: Workplace, tmp_path: Path) -> Workplace:
    """A checkpoint of its own, to be damaged."""
    shutil.copytree(place.model, tmp_path / "model")
    return replace(place, model=tmp_path / "model")


def set_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "org/name"},
        {"_attn_implementation": "org/name:function"},
        {"attn_implementation": {"": "org/name@main"}},
        {"text_config": {"attn_implementation": "paged|org/name"}},
        {"experts_implementation": "org/name"},
    ],
)
def test_code_on_the_hub_needs_trust(values: dict[str, Any], copy: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the loader of hub kernels was reached")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", reached)
    set_config(copy.model, **values)
    for outcome in (
        copy.quantize(run=detent),
        detent("evaluate", copy.model, "--eval_dataset", copy.evaluation),
        detent("structure", copy.model),
    ):
        refused(outcome, "org/name", "trust_remote_code", "implementation")


@pytest.mark.parametrize(
    "values",
    [
        {"pad_token_id": 600},
        {"torch_dtype": []},
        {"max_position_embeddings": 1},
        {"num_hidden_layers": 2147483648},
        {"architectures": [None]},
        {"rope_parameters": []},
        {"hidden_size": 1 << 62},
    ],
)
def test_odd_values(values: dict[str, Any], copy: Workplace) -> None:
    set_config(copy.model, **values)
    refused(copy.quantize(run=detent), "config.json" if "max_pos" not in str(values) else "max_position_embeddings")
    refused(detent("structure", copy.model), "config.json")


@pytest.mark.parametrize("text", ['{"version": "1.0"}', '{"version": "1.0", "model": {"type": "BPE"}}', "[]", "3", "{"])
def test_broken_tokenizers(text: str, copy: Workplace) -> None:
    (copy.model / "tokenizer.json").write_text(text)
    refused(copy.quantize(run=detent), "tokenizer")


@pytest.mark.parametrize("values", [{"model_max_length": []}, {"added_tokens_decoder": 3}, {"tokenizer_class": 5}])
def test_broken_tokenizer_configs(values: dict[str, Any], copy: Workplace) -> None:
    path = copy.model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refused(copy.quantize(run=detent), "tokenizer_config.json", next(iter(values)))


EARLY: dict[str, tuple[Callable[[Workplace], list[object]], str]] = {
    "output exists": (lambda p: [(p.out.mkdir(), (p.out / "x").write_text("mine"))][:0], "overwrite"),
    "missing texts": (lambda p: ["--dataset", "missing.json"], "missing.json"),
    "missing evaluation": (lambda p: ["--eval_dataset", "nonsense"], "nonsense"),
    "missing model": (lambda p: ["--model_dir", "./nowhere"], "nowhere"),
    "unknown home": (lambda p: ["--output_dir", "~nobody-at-all/x"], "nobody-at-all"),
    "link": (lambda p: [(p.model / "notes.txt").symlink_to("/etc/hostname")][:0], "notes.txt"),
}


@pytest.mark.parametrize("name", EARLY)
def test_before_libraries_are_loaded(name: str, copy: Workplace) -> None:
    more, word = EARLY[name]
    arguments = [
        "quantize",
        "--quant_scheme",
        "w_fp8",
        "--model_dir",
        copy.model,
        "--output_dir",
        copy.out,
        *more(copy),
    ]
    code = (
        "import sys; from detent.cli.app import run; code = run(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert word in run.stderr
    assert run.stdout == "2 []\n", run


def interrupting(number: int) -> Callable[..., None]:
    return lambda *_, **__: signal.raise_signal(number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_by_a_signal(number: int, code: int, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.runs.quantize.verify", interrupting(number))
    assert place.quantize("--skip_evaluation", run=detent).code == code
    assert not any(place.out.parent.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_after_the_swap_come_too_late(number: int, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.quantize("--skip_evaluation")
    monkeypatch.setattr("detent.report.summary_table", lambda report: [signal.raise_signal(number), "done"][1])
    outcome = place.quantize("--skip_evaluation", "--overwrite", run=detent)
    assert (outcome.code, outcome.out) == (0, "done\n")
    assert [path.name for path in place.out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_importing(number: int, code: int) -> None:
    """Whatever the module that is being imported makes of exceptions."""
    program = (
        "import signal\nfrom detent.cli.imports import nothing_to_clean_up\nwith nothing_to_clean_up():\n"
        f"    try:\n        signal.raise_signal({int(number)})\n    except BaseException:\n        raise ImportError\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (code, "")
    assert "Traceback" not in run.stderr


def test_what_a_killed_run_left(place: Workplace) -> None:
    place.quantize("--skip_evaluation")
    before = contents(place.out)
    workspace = Workspace(place.out, "old")
    place.out.rename(workspace.path / "old")
    workspace.close()
    half = Workspace(place.out, "writing")
    half.close()
    outcome = place.quantize("--skip_evaluation", run=detent)
    refused(outcome, "overwrite")
    assert contents(place.out) == before
    half = Workspace(place.out, "writing")
    half.close()
    outcome = place.quantize("--skip_evaluation", "--overwrite", run=detent)
    assert f"Note: removed {half.path}" in outcome.err
    assert any(str(half.path) in notice for notice in place.report["notices"])
    assert [path.name for path in place.out.parent.iterdir()] == ["out"]


def test_edited_output_is_not_overwritten(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.quantize("--skip_evaluation")
    with (place.out / "detent_report.json").open("a") as file:
        file.write("\n")
    before = contents(place.out)
    refused(place.quantize("--overwrite", run=detent), "detent_report.json", "changed after Detent wrote")
    assert contents(place.out) == before
    monkeypatch.setattr(output, "_as_written", lambda path, written: True)
    place.quantize("--overwrite", "--skip_evaluation")


def test_stray_tensor_of_a_quantized_weight(copy: Workplace) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy.model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_g_idx"
    save_file({**tensors, name: tensors["model.norm.weight"].int()}, copy.model / "model.safetensors")
    refused(copy.quantize(run=detent), name, "quantization_config")


def test_default_texts_need_a_package(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, first of all, and not a second time when the texts are loaded."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = ["quantize", "--model_dir", place.model, "--output_dir", place.out, "--device", "cpu"]
    outcome = detent(
        *arguments, "--quant_scheme", "w_fp8_a_fp8", "--num_calib_data", 2, "--seq_len", 16, "--skip_evaluation"
    )
    assert outcome.code == 0, outcome.err
    notes = [line for line in outcome.err.splitlines() if line.startswith("Note:")]
    assert 'pip install "detent[datasets]"' in notes[0]
    assert sum("detent[datasets]" in note for note in notes) == 1


def test_home_in_output_dir(place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    replace(place, out=Path("~/o")).quantize("--skip_evaluation")
    assert (tmp_path / "o" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
