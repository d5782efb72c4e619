"""The report of a run: what its JSON holds, and what the terminal shows of it."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from detent.errors import DetentError
from detent.report import (
    REPORT_NAME,
    BeforeAfterBytes,
    Calibration,
    Evaluation,
    LayerReport,
    Perplexity,
    RunReport,
    Weights,
    format_bytes,
    format_seconds,
    peak_device_memory_bytes,
    resources,
    summary_table,
)


def make_report(**changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "detent_version": "0.1.0",
        "command": ["detent", "quantize"],
        "model": "folder/[red]model",
        "scheme": "w_int4_per_group_sym",
        "perplexity": Perplexity(before=10.0, after=12.5),
        "evaluation": Evaluation(dataset="eval.json", window=512, tokens=77680),
        "size_bytes": BeforeAfterBytes(before=4096 * 1024, after=1024 * 1024),
        "weights": Weights(
            quantized=7,
            kept=6,
            quantized_parameters=1000,
            kept_parameters=60,
            kept_reasons={
                "lm_head.weight": "excluded by 'lm_head'",
                **{f"layers.{i}.norm.weight": "no linear layer's weight" for i in range(5)},
            },
        ),
        "layers": [
            LayerReport(name=f"layers.{i}.weight", format="int4", relative_error=i / 100, shape=[4, 8])
            for i in range(7)
        ],
        "calibration": Calibration(source="calib.json", samples=128, tokens=65536),
        "seconds": 75.4,
        "peak_memory_bytes": 3 * 1024**3,
        "notices": ["No calibration text was [named]."],
        "output_dir": "exported_model",
    }
    return RunReport(**{**values, **changes})


def shown(report: RunReport, width: int = 140) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(report))
    return console.export_text()


class TestJson:
    def test_fields_that_readers_rely_on(self, tmp_path: Path) -> None:
        path = make_report().write(tmp_path)
        assert path == tmp_path / REPORT_NAME == tmp_path / "detent_report.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["perplexity"] == {"before": 10.0, "after": 12.5}
        assert data["size_bytes"] == {"before": 4194304, "after": 1048576}
        assert data["weights"]["quantized"] == 7
        assert data["weights"]["kept"] == 6
        assert data["weights"]["kept_reasons"]["lm_head.weight"] == "excluded by 'lm_head'"
        assert data["layers"][2] == {
            "name": "layers.2.weight",
            "format": "int4",
            "relative_error": 0.02,
            "shape": [4, 8],
            "bits_per_weight": None,
            "algorithms": [],
        }
        assert data["seconds"] == 75.4
        assert data["peak_memory_bytes"] == 3 * 1024**3
        assert data["calibration"] == {"source": "calib.json", "samples": 128, "tokens": 65536}
        assert data["notices"] == ["No calibration text was [named]."]

    def test_read_back(self, tmp_path: Path) -> None:
        report = make_report()
        report.write(tmp_path)
        assert RunReport.read(tmp_path) == report
        assert RunReport.read(tmp_path / REPORT_NAME) == report

    def test_skipped_parts_are_null(self) -> None:
        report = make_report(perplexity=None, evaluation=None, calibration=None, scheme=None, output_dir=None)
        data = json.loads(report.to_json())
        assert all(data[name] is None for name in ("perplexity", "evaluation", "calibration", "scheme", "output_dir"))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_are_finite(self, value: float) -> None:
        for change in ({"perplexity": {"before": value}}, {"seconds": value}):
            with pytest.raises(ValidationError, match="finite"):
                make_report(**change)
        with pytest.raises(ValidationError, match="finite"):
            LayerReport(name="x", format="int4", relative_error=value)

    def test_unknown_fields_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="Extra inputs"):
            make_report(colour="red")

    @pytest.mark.parametrize("content", [b"{", b"{}", b"\xff"])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / REPORT_NAME).write_bytes(content)
        with pytest.raises(DetentError, match=REPORT_NAME):
            RunReport.read(tmp_path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DetentError, match="there is no report at"):
            RunReport.read(tmp_path)


class TestTerminal:
    def test_everything_is_there(self) -> None:
        text = shown(make_report())
        for part in (
            "folder/[red]model",
            "w_int4_per_group_sym",
            "7 (1,000 parameters)",
            "6 (60 parameters)",
            "excluded by 'lm_head': lm_head.weight",
            "layers.0.norm.weight, layers.1.norm.weight, layers.2.norm.weight, and 2 more",
            "4.00 MiB -> 1.00 MiB (4.00 times smaller)",
            "10.000 -> 12.500 (+25.0%)",
            "eval.json: 77,680 tokens in windows of 512",
            "calib.json: 128 samples, 65,536 tokens",
            "1 min 15 s",
            "3.00 GiB",
            "exported_model",
            "Notice: No calibration text was [named].",
        ):
            assert part in text, part

    def test_worst_layers_first(self) -> None:
        lines = [line for line in shown(make_report()).splitlines() if line.startswith("layers.")]
        assert [line.split()[0] for line in lines] == [f"layers.{i}.weight" for i in (6, 5, 4, 3, 2)]
        assert lines[0].split()[-1] == "6%"

    def test_little_was_done(self) -> None:
        report = make_report(
            scheme=None,
            perplexity=Perplexity(before=10.0),
            size_bytes=BeforeAfterBytes(before=4096),
            layers=[LayerReport(name="a.weight", format="int4")],
            calibration=None,
            notices=[],
            peak_device_memory_bytes=2048,
        )
        text = shown(report)
        assert "nothing quantized" in text
        assert "10.000 before" in text
        assert "4.00 KiB" in text
        assert "on the device 2.00 KiB" in text
        assert "Largest relative errors" not in text
        assert "Notice" not in text
        assert "12.500 after" in shown(make_report(perplexity=Perplexity(after=12.5)))
        assert "perplexity" not in shown(make_report(perplexity=None, evaluation=None))

    @pytest.mark.parametrize("width", [30, 60, 200])
    def test_any_width(self, width: int) -> None:
        assert all(len(line.rstrip()) <= width for line in shown(make_report(), width).splitlines())

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (1024**2, "1.00 MiB"),
            (5 * 1024**5, "5.00 PiB"),
            (5 * 1024**6, "5120.00 PiB"),
        ],
    )
    def test_bytes(self, count: int, text: str) -> None:
        assert format_bytes(count) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1 min 1 s"), (3599.6, "1 h 0 min"), (7805, "2 h 10 min")],
    )
    def test_seconds(self, seconds: float, text: str) -> None:
        assert format_seconds(seconds) == text


class TestMemory:
    @pytest.mark.parametrize("mebibytes", [0, 256])
    def test_main_memory(self, mebibytes: int) -> None:
        """In a process of its own, which must not answer for the larger one that started it."""
        block = bytearray(256 << 20)
        block[::4096] = b"x" * len(block[::4096])
        # The file alone: importing the package would bring in torch.
        code = (
            "import runpy, sys\n"
            f"block = b'x' * ({mebibytes} << 20)\n"
            "del block\n"
            "print(runpy.run_path(sys.argv[1])['peak_memory_bytes']())"
        )
        command = [sys.executable, "-c", code, str(resources.__file__)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert mebibytes << 20 < int(answer.stdout) < (mebibytes + 128) << 20

    def test_device(self) -> None:
        peak = peak_device_memory_bytes()
        assert peak is None or peak >= 0
