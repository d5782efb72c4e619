"""Two processes share a run: what they write is what one process writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cli.one_process import Work
from cli.runner import detent, save_checkpoint, save_text, small, succeed
from detent import INT8_WEIGHT_ONLY_CFG, quantize
from detent.algorithms.layer import layers_of
from detent.algorithms.site import Wanted
from detent.engine import observed_block
from detent.engine.blocks import BlockChain, record_chain
from detent.engine.data_loop import DataLoop
from tiny_language_model import make_model

pytestmark = pytest.mark.slow

SCHEMES: dict[str, list[object]] = {
    "gptq": ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 32, "--quant_algo", "gptq"],
    "awq": ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 32, "--quant_algo", "awq"],
    "fp8": ["--quant_scheme", "w_fp8_a_fp8", "--kv_cache_dtype", "fp8"],
    "mixtral": ["--quant_scheme", "w_int4_per_group_sym", "--group_size", 32, "--quant_algo", "gptq"],
}
#: The share of codes that may differ: GPTQ's second moments are float32 sums, which depend on the order.
UNLIKE = {"gptq": 0.002, "awq": 0.0, "fp8": 0.0, "mixtral": 0.002}
#: Calibration samples.
SAMPLES = {"gptq": 40, "mixtral": 9, "few": 1}
#: Which process fails, and where: at a block, and when all is written but not yet in its place.
FAILURES = {"block": (1, "detent.engine.traversal", "_account_for"), "end": (0, "detent.runs.quantize", "verify")}


@dataclass
class Runs:
    """The commands of one process, and of two.

    Attributes:
        folder: what they wrote is in ``one-NAME`` and ``two-NAME`` there.
        results: by name, of each process.
        work: of one process with GPTQ.
    """

    folder: Path
    results: dict[str, list[dict[str, Any]]]
    work: int


def arguments(folder: Path, name: str, model: str, count: str) -> list[str]:
    fixed: list[object] = ["quantize", "--model_dir", folder / model, "--output_dir", folder / f"{count}-{name}"]
    fixed += ["--dataset", folder / "texts.json", "--seq_len", 32, "--num_calib_data", SAMPLES.get(name, 6)]
    fixed += ["--device", "cpu", "--skip_evaluation"]
    return [str(argument) for argument in [*fixed, *SCHEMES.get(name, SCHEMES["gptq"])]]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def in_processes(folder: Path, cases: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """The results of each case, by process."""
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    script, shared = Path(__file__).with_name("one_process.py"), {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "cases.json"), str(folder / f"results-{rank}.json")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
        )
        for rank in range(count)
    ]
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * count
    finally:
        for process in running:
            process.kill()
    results = [json.loads((folder / f"results-{rank}.json").read_text("utf-8")) for rank in range(count)]
    return [list(each) for each in zip(*results, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    save_checkpoint(folder / "llama")
    save_checkpoint(folder / "mixtral", small("mixtral", num_local_experts=4, num_experts_per_tok=2))
    save_text(folder / "texts.json", documents=40)
    names = {name: "mixtral" if name == "mixtral" else "llama" for name in SCHEMES}
    asked = {name: arguments(folder, name, model, "two") for name, model in names.items()}
    asked["few"] = arguments(folder, "few", "llama", "two")
    asked |= {name: arguments(folder, name, "llama", "two") for name in FAILURES}
    cases = [
        {"arguments": asked[name], "port": port, "counted": name == "gptq", "fails": FAILURES.get(name)}
        for name, port in zip(asked, free_ports(len(asked)), strict=True)
    ]
    results = dict(zip(asked, in_processes(folder, cases, 2), strict=True))
    counter = Work()
    for name, model in names.items():
        with counter if name == "gptq" else nullcontext():
            succeed(*arguments(folder, name, model, "one"))
    return Runs(folder, results, counter.total)


def parts(packed: Tensor) -> Tensor:
    """The codes of a tensor: of packed 4 bits, one a byte."""
    if packed.dtype == torch.int32:
        return (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return packed.view(torch.uint8)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_checkpoint_is_that_of_one_process(runs: Runs, name: str) -> None:
    assert [result["code"] for result in runs.results[name]] == [0, 0], runs.results[name]
    one, two = (load_file(runs.folder / f"{count}-{name}" / "model.safetensors") for count in ("one", "two"))
    assert {key: (value.dtype, value.shape) for key, value in one.items()} == {
        key: (value.dtype, value.shape) for key, value in two.items()
    }
    unlike = codes = 0
    for key, value in one.items():
        if value.dtype == torch.float32:
            close = torch.isclose(two[key], value, rtol=1e-5, atol=1e-7)
            assert close.all(), key
        elif value.is_floating_point() or key.endswith("weight_packed"):
            unlike += int((parts(two[key]) != parts(value)).sum())
            codes += parts(value).numel()
        else:
            assert torch.equal(two[key], value), key
    assert codes
    assert unlike <= UNLIKE[name] * codes


def test_each_process_does_half_of_the_work(runs: Runs) -> None:
    """Counted by PyTorch: what all matrix products multiply."""
    for result in runs.results["gptq"]:
        assert 0 < result["work"] <= 0.55 * runs.work, (result["work"], runs.work)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_first_process_speaks(runs: Runs, name: str) -> None:
    first, second = runs.results[name]
    assert "weights quantized" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    one, two = (json.loads((runs.folder / f"{n}-{name}" / "detent_report.json").read_text()) for n in ("one", "two"))
    assert two["calibration"]["samples"] == SAMPLES.get(name, 6)
    assert (two["calibration"], two["notices"]) == (one["calibration"], one["notices"])
    errors = [{layer["name"]: layer["relative_error"] for layer in report["layers"]} for report in (one, two)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_a_process_that_fails_ends_all(runs: Runs) -> None:
    first, second = runs.results["block"]
    assert [first["code"], second["code"]] == [2, 2]
    assert "Error: process 1 of 2: the disk is full" in first["err"]
    assert second["err"] == ""
    assert not list(runs.folder.glob("*two-block*"))


def test_the_first_process_fails_at_the_end(runs: Runs) -> None:
    first, second = runs.results["end"]
    assert [first["code"], second["code"]] == [2, 2]
    assert "the disk is full" in first["err"]
    assert "the disk is full" not in second["err"]
    assert not list(runs.folder.glob("*two-end*"))


def test_fewer_batches_than_processes(runs: Runs) -> None:
    first, second = runs.results["few"]
    assert [first["code"], second["code"]] == [2, 2]
    assert "2 processes share 1 batches" in first["err"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--quant_scheme", "w_int4_per_group_sym"], "needs no calibration data"),
        ([*SCHEMES["gptq"][:-1], "autoround"], "autoround trains weights"),
        ([*SCHEMES["gptq"], "--resume"], "resume goes on"),
    ],
)
def test_what_processes_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object], why: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = save_checkpoint(tmp_path / "model")
    outcome = detent("quantize", "--model_dir", model, "--output_dir", tmp_path / "out", *more, "--device", "cpu")
    assert outcome.code == 2
    assert "started as one of 2 processes (WORLD_SIZE=2)" in outcome.err
    assert why in outcome.err
    assert "start it without torchrun" in outcome.err


def test_processes_that_do_not_know_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    save_checkpoint(tmp_path / "llama")
    save_text(tmp_path / "texts.json")
    outcome = detent(*arguments(tmp_path, "gptq", "llama", "one"))
    assert outcome.code == 2
    assert "start them with torchrun, or unset WORLD_SIZE" in outcome.err


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_batch_is_that_of_the_first_process(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sites there are, where they are solved one after the other, is decided by the very first batch: experts
    that others reach come later, as with one process."""
    model = quantize(make_model(), INT8_WEIGHT_ONLY_CFG)
    loop = DataLoop(lambda m: m(input_ids=torch.tensor([[5, 9, 2]]), use_cache=False))
    chain = record_chain(model, ["model.layers.0", "model.layers.1"], loop)
    assert isinstance(chain, BlockChain)
    layers = [layer for layer in layers_of(model) if layer.name.startswith("model.layers.0.")]
    monkeypatch.setattr(observed_block, "rank", lambda: number)
    monkeypatch.setattr(observed_block, "size", lambda: 2)
    observed = observed_block.ObservedBlock(chain, 0, chain.inputs, None, Wanted(), False, loop)
    assert len(observed.sites(layers, batches=1)) == (0 if number else 4)
