"""Results as Markdown: who reached what, in how long, with how much memory, and whether Detent's aims were met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.catalog import SCHEMES, TABLES


@dataclass(frozen=True)
class Result:
    """What became of one job.

    Attributes:
        input: title of the input.
        scheme: see :data:`benchmarks.peers.catalog.SCHEMES`.
        tool, method: who, and how.
        perplexity: None if it was not measured.
        seconds: by part: "import", "quantize" (the tool's own call), "whole process", ...
        peak_bytes: most resident memory of the process until quantization had ended.
        error: why there is no result; "" if there is one.
        versions: of torch, transformers and the tool.
        tokens: of calibration.
    """

    input: str
    scheme: str
    tool: str
    method: str
    perplexity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    tokens: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.input, self.scheme, self.tool, self.method, self.tokens

    @property
    def wall(self) -> float:
        """Seconds of the tool's own quantization call."""
        return self.seconds.get("quantize", math.nan)

    @property
    def cpu(self) -> float:
        """The same in processor time of all threads, which other work on the machine hardly changes."""
        return self.seconds.get("quantize, cpu", self.wall)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy_tables(results: Sequence[Result]) -> str:
    """The tables of one accuracy input, weights only and with activations, and why some cells are empty."""
    parts, errors = [], Errors()
    for schemes in TABLES:
        wanted = [s for s in schemes if any(r.scheme == s for r in results)]
        if wanted:
            lines = [f"- {name}: {SCHEMES[name].words}" for name in wanted]
            parts += ["\n".join(lines), accuracy_table(results, wanted, errors)]
    return "\n\n".join(parts + errors.paragraphs())


def accuracy_table(results: Iterable[Result], schemes: Sequence[str], errors: Errors) -> str:
    """One row per tool and method, three columns per scheme: perplexity, processor seconds, peak memory."""
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        if result.scheme in schemes:
            rows.setdefault((result.tool, result.method), {})[result.scheme] = result
    best = {s: lowest(row[s].perplexity for row in rows.values() if s in row) for s in schemes}
    head = ["", ""] + [f"{s} {what}" for s in schemes for what in ("ppl", "CPU s", "MB")]
    lines = [line(head), "|---|---|" + "---:|" * (len(head) - 2)]
    for (tool, method), row in rows.items():
        cells = [tool, method]
        for scheme in schemes:
            cells += accuracy_cells(row.get(scheme), best[scheme], errors)
        lines.append(line(cells))
    return "\n".join(lines)


def accuracy_cells(result: Result | None, best: float | None, errors: Errors) -> list[str]:
    if result is None:
        return ["–", "–", "–"]
    if result.error:
        return [errors.note(result.error), "–", "–"]
    text = number(result.perplexity)
    if best is not None and result.perplexity is not None and result.perplexity <= best:
        text = f"**{text}**"
    return [text, seconds(result.cpu), megabytes(result.peak_bytes)]


def speed_table(results: Iterable[Result]) -> str:
    """One row per tool and method; the ratio is over Detent with the same method."""
    results = list(results)
    ours = {(r.scheme, r.method): r for r in results if r.tool == "Detent" and not r.error}
    errors = Errors()
    lines = [
        "| | method | tokens | s | CPU s | times Detent | peak MB | one forward pass, s | whole process, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        head = [r.tool, f"{r.scheme} {r.method}", f"{r.tokens:,}"]
        if r.error:
            lines.append(line([*head, errors.note(r.error), "–", "–", "–", "–", "–"]))
            continue
        same = ours.get((r.scheme, r.method))
        ratio = f"{r.wall / same.wall:.1f}" if same and same.tokens == r.tokens and same is not r else "–"
        forward, whole = (seconds(r.seconds.get(part, math.nan)) for part in ("forward", "whole process"))
        lines.append(line([*head, seconds(r.wall), seconds(r.cpu), ratio, megabytes(r.peak_bytes), forward, whole]))
    return "\n\n".join(["\n".join(lines), *errors.paragraphs()])


def growth_table(results: Iterable[Result]) -> str:
    """How Detent's time beyond the forward passes grows with calibration data."""
    lines = [
        "| Detent | tokens | seconds | one forward pass, s | beyond it, s | inside forward_loop, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if r.tool == "Detent" and not r.error and (forward := r.seconds.get("forward")):
            inside = r.seconds.get("in forward_loop", math.nan)
            cells = [r.wall, forward, r.wall - forward, inside]
            lines.append(line([f"{r.scheme} {r.method}", f"{r.tokens:,}", *map(seconds, cells)]))
    return "\n".join(lines)


def versions_table(results: Iterable[Result], sizes: dict[str, int]) -> str:
    """What ran, how long it takes to import it (the median of all runs) and how large its environment is."""
    tools: dict[str, list[Result]] = {}
    for result in results:
        tools.setdefault(result.tool, []).append(result)
    lines = ["| | versions | import, s | environment |", "|---|---|---:|---:|"]
    for tool, runs in tools.items():
        found = next((r.versions for r in runs if r.versions), {})
        imports = sorted(r.seconds["import"] for r in runs if "import" in r.seconds)
        size = f"{sizes[tool] / 1e9:.1f} GB" if tool in sizes else "–"
        words = ", ".join(f"{name} {version}" for name, version in found.items())
        lines.append(line([tool, words or "–", seconds(imports[len(imports) // 2]) if imports else "–", size]))
    return "\n".join(lines)


class Errors:
    """Reasons why something does not run, each told once, below the table."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def note(self, reason: str) -> str:
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"does not run ({self._reasons.index(reason) + 1})"

    def paragraphs(self) -> list[str]:
        lines = [f"{i}. `{r.replace('`', chr(39))[:200]}`" for i, r in enumerate(self._reasons, 1)]
        return ["Does not run:", "\n".join(lines)] if lines else []


def lowest(values: Iterable[float | None]) -> float | None:
    return min((v for v in values if v is not None and math.isfinite(v)), default=None)


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "NaN" if value is not None else "–"
    return f"{value:.3f}" if value < 100 else f"{value:.4g}"


def seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def megabytes(value: int) -> str:
    return f"{value / 1e6:.0f}" if value else "–"
