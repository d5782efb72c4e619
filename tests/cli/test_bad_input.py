"""What a user can get wrong: one clear message, exit code 2, and everything there stays as it was."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.runner import Outcome, Workplace, contents, detent, save_checkpoint, small
from detent.checkpoints import folder as folder_module
from detent.report import RunReport

Damage = Callable[[Path], Any]


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.strip().splitlines() if not line.startswith("Note:")]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("Error: ")
    assert outcome.out == ""
    for word in words:
        assert word in lines[0]


@pytest.fixture
def copy(place: Workplace, tmp_path: Path) -> Workplace:
    """A checkpoint of its own, to be damaged."""
    shutil.copytree(place.model, tmp_path / "model")
    return replace(place, model=tmp_path / "model")


def config(**values: Any) -> Damage:
    def damage(model: Path) -> None:
        path = model / "config.json"
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def text(name: str, content: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content)


def cut(size: int) -> Damage:
    return lambda model: text("model.safetensors", (model / "model.safetensors").read_bytes()[:size])(model)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        change(found)
        save_file(found, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def one_shard_less(model: Path) -> None:
    shutil.rmtree(model)
    save_checkpoint(model, max_shard_size="100KB")
    sorted(model.glob("model-*.safetensors"))[1].unlink()


def set_value(name: str, value: float) -> Damage:
    return tensors(lambda found: found[name].view(-1)[3:4].fill_(value))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "empty folder": (lambda model: [path.unlink() for path in model.iterdir()], "is empty"),
    "cut short": (cut(-1000), "truncated or corrupt"),
    "header cut short": (cut(20), "truncated or corrupt"),
    "empty file": (cut(0), "truncated or corrupt"),
    "noise": (text("model.safetensors", bytes(range(256)) * 20), "truncated or corrupt"),
    "config is no JSON": (text("config.json", b'{"model_type":'), "is not JSON"),
    "config is no text": (text("config.json", b"\xff\xfe\x00"), "is not JSON"),
    "config is a list": (text("config.json", b"[]"), "list"),
    "no model_type": (config(model_type=None), "model_type"),
    "shard missing": (one_shard_less, "is missing"),
}
#: What shows only when the model is made or its weights are read.
WRONG: dict[str, tuple[Damage, str]] = {
    "unknown architecture": (config(model_type="llamma"), "llamma"),
    "no language model": (config(model_type="clip"), "clip"),
    "word for a number": (config(hidden_size="abc"), "hidden_size"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "heads do not divide": (config(num_attention_heads=3), "attention heads"),
    "negative size": (config(hidden_size=-64), "negative"),
    "other size": (config(intermediate_size=64), "config.json calls for ("),
    "other vocabulary": (config(vocab_size=100), "(100, 64)"),
    "more layers": (config(num_hidden_layers=3), "model.layers.2"),
    "unknown activation": (config(hidden_act="nope"), "nope"),
    "unknown dtype": (config(dtype="int8"), "int8"),
    "NaN": (set_value(UP, float("nan")), UP),
    "infinity": (set_value(UP, float("inf")), UP),
    "NaN beside what is quantized": (set_value("model.norm.weight", float("nan")), "model.norm.weight"),
    "weight missing": (tensors(lambda found: found.pop(UP)), UP),
    "norm missing": (tensors(lambda found: found.pop("model.norm.weight")), "model.norm.weight"),
    "integers": (tensors(lambda found: found.update({UP: found[UP].to(torch.int8)})), UP),
    "no tokenizer": (lambda model: [path.unlink() for path in model.glob("tokenizer*")], "tokenizer"),
    "tokenizer is no JSON": (text("tokenizer.json", b"{"), "tokenizer"),
}


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint(name: str, command: str, copy: Workplace, tmp_path: Path) -> None:
    damage, word = DAMAGED[name]
    damage(copy.model)
    before = contents(tmp_path)
    outcome = copy.quantize(run=detent) if command == "quantize" else detent(command, copy.model)
    refused(outcome, word)
    assert contents(tmp_path) == before


EVALUATED = ("word for a number", "other size", "NaN", "weight missing", "no tokenizer")


@pytest.mark.parametrize(
    ("name", "command"), [*((n, "quantize") for n in WRONG), *((n, "evaluate") for n in EVALUATED)]
)
def test_wrong_model(name: str, command: str, copy: Workplace, tmp_path: Path) -> None:
    damage, word = WRONG[name]
    damage(copy.model)
    before = contents(tmp_path)
    arguments = ["evaluate", copy.model, "--eval_dataset", copy.evaluation, "--device", "cpu"]
    refused(copy.quantize(run=detent) if command == "quantize" else detent(*arguments), word)
    assert contents(tmp_path) == before
    assert not copy.out.exists()


def test_model_that_loads_and_cannot_run(copy: Workplace) -> None:
    values = {"kv_lora_rank": 16, "q_lora_rank": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_experts_per_tok": 2, "head_dim": 16}
    shutil.rmtree(copy.model)
    save_checkpoint(copy.model, small("deepseek_v3", **values, **heads))
    refused(copy.quantize(run=detent), "cannot run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quant_scheme", "w_int9_per_group_sym"], ["int9", "w_int8_per_group_sym"]),
        (["--quant_scheme", "no_quant"], ["quantizes nothing"]),
        (["--quant_scheme", "w_mxfp4", "--group_size", 64], ["blocks of 32"]),
        (["--quant_scheme", "w_fp8_a_fp8", "--group_size", 32], ["no groups"]),
        (["--group_size", 0], ["group"]),
        (["--group_size_per_layer", "*.down_porj", 32], ["'down_proj'"]),
        (["--group_size_per_layer", "*.down_proj", "many"], ["positive size"]),
        (["--exclude_layers", "*.down_porj"], ["'down_proj'"]),
        (["--exclude_layers", "*"], ["every linear layer"]),
        (["--scale_format", "float32"], ["scale_format"]),
        (["--kv_cache_dtype", "fp9"], ["fp8"]),
        (["--min_kv_scale", 1], ["kv_cache_dtype"]),
        (["--min_kv_scale", "nan", "--kv_cache_dtype", "fp8"], ["min_kv_scale"]),
        (["--min_kv_scale", 1, "--kv_cache_dtype", "mxfp4"], ["static"]),
        (["--eval_dataset", "nonsense"], ["nonsense"]),
        (["--eval_dataset", "no/where"], ["no/where"]),
        (["--num_eval_data", 0], ["--skip_evaluation"]),
        (["--eval_batch_size", "many"], ["auto"]),
        (["--device", "tpu"], ["cpu, cuda"]),
        (["--skip_quantization"], ["--quant_scheme"]),
        (["--model_reload"], ["--import_model_dir"]),
        (["--import_model_dir", "x"], ["--model_reload"]),
        (["--model_export", "zip"], ["hf_format"]),
        (["--model_attn_implementation", "flash_attention_2"], ["FlashAttention2"]),
    ],
)
def test_flags(flags: list[object], words: list[str], place: Workplace) -> None:
    refused(place.quantize(*flags, run=detent), *words)
    assert not place.out.exists()


@pytest.mark.parametrize(("name", "content"), [("a.json", '["", " "]'), ("b.txt", ""), ("c.jsonl", '{"n": 1}')])
def test_calibration_file_without_text(name: str, content: str, place: Workplace, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    refused(place.quantize("--dataset", tmp_path / name, scheme="w_fp8_a_fp8", run=detent), name)
    assert not place.out.exists()


def test_quantized_already(place: Workplace, tmp_path: Path) -> None:
    place.quantize("--skip_evaluation")
    config = json.loads((place.out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "bits": 4}
    (place.out / "config.json").write_text(json.dumps(config))
    again = replace(place, model=place.out, out=tmp_path / "again")
    refused(again.quantize(run=detent), "quantized already", "bitsandbytes")
    refused(again.quantize("--skip_quantization", scheme=None, run=detent), "quantized already")
    assert not again.out.exists()
    reload = ["--model_reload", "--import_model_dir", place.model, "--eval_dataset", place.evaluation]
    refused(detent("quantize", *reload), "not quantized")


def test_reloading_as_another_file_format(place: Workplace) -> None:
    place.quantize("--skip_evaluation")
    reload = ["--model_reload", "--import_model_dir", place.out, "--eval_dataset", place.evaluation, "--device", "cpu"]
    for wrong in ("quark_format", "gguf"):
        message = f"is of hf_format (compressed-tensors), not of {wrong}"
        refused(detent("quantize", *reload, "--import_file_format", wrong), message)


class TestOutputFolder:
    def test_source_itself_inside_and_around(self, copy: Workplace) -> None:
        before = contents(copy.model)
        for out in (copy.model, copy.model / "inner", copy.model.parent):
            refused(replace(copy, out=out).quantize("--overwrite", run=detent), "source checkpoint")
        assert contents(copy.model) == before

    def test_file(self, place: Workplace) -> None:
        place.out.write_text("mine")
        refused(place.quantize("--overwrite", run=detent), "is a file")
        refused(replace(place, out=place.out / "deep").quantize(run=detent), "is a file")
        assert place.out.read_text() == "mine"

    def test_of_someone_else(self, place: Workplace) -> None:
        place.out.mkdir()
        (place.out / "thesis.tex").write_text("mine")
        refused(place.quantize("--overwrite", run=detent), "thesis.tex")
        assert contents(place.out).keys() == {"thesis.tex"}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "what"), [(folder_module, "save_file"), (folder_module.shutil, "copyfile"), (RunReport, "write")]
)
def test_disk_full(where: Any, what: str, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """While weights are written, files copied, or the report added: nothing appears, and what was there stays."""
    place.quantize("--skip_evaluation")
    before = contents(place.out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(where, what, full_disk)
        refused(place.quantize("--skip_evaluation", "--overwrite", run=detent), "disk is full")
        elsewhere = replace(place, out=place.out.parent / "deep" / "er")
        refused(elsewhere.quantize("--skip_evaluation", run=detent), "disk is full")
    assert contents(place.out.parent) == before
    assert {path.name for path in place.out.parent.iterdir()} == {"out"}


def test_interrupted(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detent.runs.quantize.verify", interrupt)
    assert place.quantize(run=detent).code == 130
    assert not any(place.out.parent.iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("x")]
)
def test_out_of_memory(error: Exception, place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("detent.runs.stream.LayerStream.layer", fail)
    if str(error) == "x":
        with pytest.raises(RuntimeError, match="x"):  # a bug, not a user's mistake: it isn't hidden
            place.quantize("--skip_evaluation", run=detent)
    else:
        refused(place.quantize("--skip_evaluation", run=detent), "out of memory")
