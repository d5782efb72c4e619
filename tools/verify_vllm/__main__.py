"""Whether vLLM reads what Detent writes: `make verify-vllm`.

    python tools/verify_vllm [--only formats|perplexity]

First every scheme, preset and key/value cache that compressed-tensors holds is written as a small checkpoint, which
vLLM's own code takes in (`loading`), and the outcome is compared with the table in `expected`. Then exports of the
sample model run in vLLM on the CPU, and their perplexities are compared with Detent's simulation (`perplexity`).
Exit code 1 says that something differs from what this folder states.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from expected import TABLE, rows_of
from rich.console import Console
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that vLLM reads what Detent writes.")
    parser.add_argument("--only", choices=("formats", "perplexity"), help="one of the two parts")
    only = parser.parse_args().only
    console = Console(width=160, soft_wrap=False)
    with tempfile.TemporaryDirectory() as scratch:
        failures = [] if only == "formats" else check_perplexity(Path(scratch), console)
        failures += [] if only == "perplexity" else check_formats(Path(scratch), console)
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False)
    return 1 if failures else 0


def check_formats(scratch: Path, console: Console) -> list[str]:
    """Let vLLM load every case, print what it does, and return what isn't in the table."""
    from cases import all_cases, write_case, write_source
    from loading import CAPABILITY, load, start

    write_source(scratch / "source")
    config = start(scratch / "source", scratch)
    table = Table("format", "vLLM", "note", title="What vLLM takes", title_justify="left")
    cases = all_cases()
    failures = [f"{row.names}: in the table, and no such case" for row in TABLE if not _matches(row.names, cases)]
    for case in cases:
        if case.formats is None:
            continue
        write_case(case, scratch / "source", scratch / "case")
        described = json.loads((scratch / "case" / "config.json").read_text())["quantization_config"]
        verdict = load(config, scratch / "case", described)
        found = ", ".join(verdict.schemes) if verdict.refusal is None else f"refused: {verdict.refusal[:90]}"
        rows = rows_of(case.name)
        table.add_row(case.name, found or "nothing to do", rows[0].note if rows else "")
        if len(rows) != 1:
            failures.append(f"{case.name}: {len(rows)} rows in expected.py; vLLM: {found}")
        elif rows[0].scheme is None and verdict.refusal is None:
            failures.append(f"{case.name}: {found}, although expected.py says that vLLM refuses it")
        elif rows[0].scheme is None and not re.search(rows[0].says, verdict.refusal or ""):
            failures.append(f"{case.name}: refused, but for another reason: {verdict.refusal}")
        elif rows[0].scheme is not None and (verdict.refusal or found != _full(rows[0].scheme)):
            failures.append(f"{case.name}: {verdict.refusal or found} instead of {_full(rows[0].scheme) or 'nothing'}")
    console.print(table)
    held = sum(case.formats is not None for case in cases)
    console.print(
        f"{held} of {len(cases)} formats are held by compressed-tensors. Faked while vLLM built its models: compute"
        f" capability {CAPABILITY.as_version_str()}, and the kernels."
    )
    return failures


def _matches(pattern: str, cases: list) -> bool:
    return any(case.formats is not None and re.fullmatch(pattern, case.name) for case in cases)


def _full(scheme: str) -> str:
    return f"CompressedTensors{scheme}" if scheme else ""


def check_perplexity(scratch: Path, console: Console) -> list[str]:
    """Run exports in vLLM and in Detent, print both perplexities, and return where they differ too much."""
    from perplexity import TOLERANCE, compare

    table = Table("export", "Detent", "vLLM", "difference", "kernel", title="Perplexity", title_justify="left")
    failures = []
    for row in compare(scratch):
        apart = row.vllm / row.detent - 1
        console.print(f"{row.scheme}: {apart:+.2%}")
        table.add_row(row.scheme, f"{row.detent:.3f}", f"{row.vllm:.3f}", f"{apart:+.2%}", row.kernel)
        if abs(apart) > TOLERANCE:
            failures.append(f"{row.scheme}: perplexity {row.vllm:.4f} in vLLM, {row.detent:.4f} in Detent")
    console.print(table)
    console.print(f"On the built-in text, in bfloat16; they may differ by {TOLERANCE:.0%} (perplexity.py says why).")
    return failures


if __name__ == "__main__":
    sys.exit(main())
