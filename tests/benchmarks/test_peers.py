"""The peers' benchmark, without peers: its evaluator, its inputs, its tables, and that one failure stays one cell."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.peers import aims, inputs, session, tables  # noqa: E402
from benchmarks.peers.__main__ import END, PAGE, START  # noqa: E402
from benchmarks.peers.catalog import DETENT, PEERS, SCHEMES, SPEED, TABLES  # noqa: E402
from benchmarks.peers.harness import Clock, Job, NotSupported, first_line, perplexity  # noqa: E402
from benchmarks.peers.tables import Result  # noqa: E402


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def result(tool: str, method: str, perplexity: float | None = None, scheme: str = "W4", **more: Any) -> Result:
    return Result("a model", scheme, tool, method, perplexity, {"quantize": more.pop("took", 1.0)}, **more)


# ---------------------------------------------------------------------------------------------------------- evaluator


def test_perplexity_is_that_of_a_plain_loop_in_float64(llama: Any) -> None:
    windows = torch.randint(50, (5, 12))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in windows:
            chances = llama(input_ids=row[None]).logits[0].double().softmax(-1)
            for position in range(len(row) - 1):
                total -= math.log(chances[position, row[position + 1]].item())
                count += 1
    assert perplexity(llama, windows, batch=2) == pytest.approx(math.exp(total / count), rel=1e-6)


def test_perplexity_of_a_guess_is_the_vocabulary() -> None:
    class Guess(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 37)})

    assert perplexity(Guess(), torch.zeros(2, 9, dtype=torch.int64)) == pytest.approx(37)


# ------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("change", [lambda m: inputs.pad_mlp(m, 32), inputs.plant_outliers])
def test_prepared_models_compute_the_same(llama: Any, change: Any) -> None:
    windows = torch.randint(50, (2, 12))
    before = llama(windows).logits.detach()
    change(llama)
    assert torch.allclose(llama(windows).logits, before, atol=1e-5)


def test_padding_makes_the_group_fit(llama: Any) -> None:
    inputs.pad_mlp(llama, 32)
    assert llama.config.intermediate_size == 64
    assert {m.in_features % 32 for m in llama.modules() if isinstance(m, nn.Linear)} == {0}


def test_windows_of_documents_and_of_running_text(tmp_path: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    numbers = [" ".join(map(str, range(n))) for n in (inputs.LENGTH + 5, 7, inputs.LENGTH)]
    (tmp_path / "documents.json").write_text(json.dumps(numbers))
    (tmp_path / "running.txt").write_text(" ".join(numbers))
    documents = inputs.windows(tokenizer, tmp_path / "documents.json")
    assert torch.equal(documents, torch.arange(inputs.LENGTH).repeat(2, 1))
    running = inputs.windows(tokenizer, tmp_path / "running.txt")
    assert running.shape == (2, inputs.LENGTH)
    assert running[1, :6].tolist() == [inputs.LENGTH + i for i in range(5)] + [0]


# ------------------------------------------------------------------------------------------------------------- tables


def test_accuracy_table_marks_the_best_and_tells_errors_once() -> None:
    rows = [
        result("A", "awq", error="RuntimeError: needs | a GPU"),
        result("B", "awq", error="RuntimeError: needs | a GPU"),
        result("B", "gptq", 5.25, took=12.3, peak_bytes=500_000_000),
        result("Detent", "best", 5.125, took=3.14159),
        result("Detent", "best", math.nan, scheme="W3"),
    ]
    text = tables.accuracy_tables(rows)
    assert "| A | awq | does not run (1) | – | – | – | – | – |" in text
    assert "| B | gptq | 5.250 | 12 | 500 | – | – | – |" in text
    assert "| Detent | best | **5.125** | 3.14 | – | NaN | 1.00 | – |" in text
    assert text.count("needs | a GPU") == 1


def test_speed_table_gives_ratios_of_equal_methods() -> None:
    rows = [
        result("A", "gptq", took=30.0, tokens=100),
        result("Detent", "gptq", took=2.0, tokens=100),
        result("Detent", "awq_lite", took=1.0, tokens=100),
    ]
    lines = tables.speed_table(rows).splitlines()
    assert [line.split("|")[6].strip() for line in lines[2:]] == ["15.0", "–", "–"]


def test_aims_are_decided_by_the_figures() -> None:
    rows = [
        result("A", "awq", 5.5),
        result("A", "gptq", 5.4),
        result("AutoRound", "200 iterations", 5.3, took=100.0),
        result("Detent", "awq_full", 5.45),
        result("Detent", "gptq", 5.41),
        result("Detent", "best", 5.3, took=25.0),
    ]
    awq, gptq, best = aims.accuracy_aims(rows)
    assert awq.startswith("- reached: W4 AWQ")
    assert gptq.startswith("- **not reached**: W4 GPTQ")
    assert best.startswith("- **not reached**: W4 best")
    assert "0.25 of its processor time" in best


def test_catalog_is_consistent() -> None:
    assert {scheme for group in TABLES for scheme in group} == set(SCHEMES)
    for name, peer in PEERS.items():
        assert (ROOT / "benchmarks/peers/runners" / f"{name}.py").is_file()
        assert set(peer.methods) <= set(SCHEMES)
        assert all("==" in package for package in peer.packages)
    assert {m for methods in PEERS["detent"].methods.values() for m in methods} <= set(DETENT)
    assert {tool for tool, _, _ in SPEED} <= set(PEERS)


def test_the_page_has_a_place_for_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(START) == page.count(END) == 1
    assert page.index(START) < page.index(END)


# ------------------------------------------------------------------------------------------------------------ session


@pytest.mark.slow
def test_a_failing_tool_is_a_result_with_its_reason(tmp_path: Path) -> None:
    missing = inputs.Input("missing", tmp_path / "nowhere", tmp_path / "a", None, 256, 32, "")
    store = tmp_path / "results.json"
    run = session.Session(tmp_path, tmp_path, threads=1, timeout=300, store=store)
    found = run.run(missing, "detent", "max", "W4")
    assert found.error
    assert [Result(**entry) for entry in json.loads(store.read_text())] == [found]
    again = session.Session(tmp_path, tmp_path, threads=1, timeout=300, reused={found.key: found})
    assert again.run(missing, "detent", "max", "W4") is found


def test_errors_are_one_line() -> None:
    assert first_line(ValueError("\n first \nsecond")) == "ValueError: first"
    assert first_line(NotSupported("no such format")) == "no such format"


def test_job_survives_its_file(tmp_path: Path) -> None:
    job = Job("m", "c", None, "gptq", group=32, options={"a": 1})
    job.save(tmp_path / "job.json")
    assert Job(**json.loads((tmp_path / "job.json").read_text())) == job


def test_clock_adds_up() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("quantize"):
            pass
    assert set(clock.seconds) == {"quantize", "quantize, cpu"}
    assert clock.peak_bytes > 1 << 20
