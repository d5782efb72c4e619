"""Detent beside the tools people use today, on the same model, calibration tokens, bits and group, in one session.

    python -m benchmarks.peers                                   # the sample model and the speed input, everybody
    python -m benchmarks.peers --model DIR --calibration FILE --evaluation FILE     # another trained Llama as well
    python -m benchmarks.peers --quick --peers autoround         # minutes: one method each, 4 bits only
    python -m benchmarks.peers --json results.json --write       # keep the results, update docs/accuracy.md

Every peer is installed into a virtual environment of its own (once, under ~/.cache/detent-peers or --environments) and
runs in a process of its own; a peer that does not run says so in the table. Perplexity is measured by the same code
for all, on the model as the tool leaves it in memory. Seconds are those of the tool's own quantization call. FILE is
running text, or a .json list of documents.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from benchmarks.peers import aims, inputs, tables
from benchmarks.peers.catalog import FEW, MANY, PEERS, QUICK, SCHEMES, SPEED
from benchmarks.peers.environments import ROOT, default_folder
from benchmarks.peers.session import Session

from detent.data import sample_model_dir

INPUTS = ("sample", "outliers", "speed")
PAGE = ROOT / "docs" / "accuracy.md"
START, END = "<!-- made by benchmarks/peers -->", "<!-- end of benchmarks/peers -->"


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="detent-benchmark-") as folder:
        sources = list(accuracy_inputs(arguments, Path(folder)))
        session = Session(
            environments=arguments.environments,
            logs=arguments.logs or Path(folder),
            threads=arguments.threads or 1,
            timeout=arguments.timeout,
            reused=earlier(arguments.json) if arguments.reuse else {},
            store=arguments.json,
        )
        session.logs.mkdir(parents=True, exist_ok=True)
        for source in sources:
            run_accuracy(session, source, arguments)
        speed = None
        if "speed" in arguments.inputs:
            speed = inputs.speed_input(Path(folder, "speed"), sample_model_dir(), FEW, small=arguments.quick)
            session.threads = arguments.threads or os.cpu_count() or 1
            run_speed(session, speed, Path(folder, "speed"), arguments)
    text = page(session, sources, speed)
    print(text)
    if arguments.write:
        write(text)


def accuracy_inputs(arguments: argparse.Namespace, folder: Path) -> Iterator[inputs.Input]:
    if arguments.model:
        texts = arguments.calibration, arguments.evaluation
        yield inputs.accuracy_input(arguments.model, folder / "given", *texts, arguments.group)
    if "sample" in arguments.inputs:
        texts = (ROOT / "src/detent/data/texts/calibration.txt", ROOT / "src/detent/data/texts/evaluation.txt")
        yield inputs.accuracy_input(sample_model_dir(), folder / "sample", *texts, None)
    if "outliers" in arguments.inputs:
        texts = (ROOT / "src/detent/data/texts/calibration.txt", ROOT / "src/detent/data/texts/evaluation.txt")
        yield inputs.accuracy_input(sample_model_dir(), folder / "outliers", *texts, None, outliers=True)


def run_accuracy(session: Session, source: inputs.Input, arguments: argparse.Namespace) -> None:
    """All jobs of an input, as many at a time as asked for."""
    schemes = [s for s in arguments.schemes if source.only is None or s in source.only]
    jobs = [(t, m, s) for s in schemes for t in arguments.peers for m in PEERS[t].methods.get(s, ())]
    if arguments.quick:
        jobs = [(tool, method, scheme) for tool, method, scheme in jobs if scheme == "W4" and method in QUICK[tool]]
    for tool in {tool for tool, _, _ in jobs}:
        session.prepare(tool)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: session.run(source, *job), jobs))


def run_speed(session: Session, source: inputs.Input, folder: Path, arguments: argparse.Namespace) -> None:
    jobs = [job for job in SPEED if job[0] in arguments.peers]
    for tool, method, scheme in jobs:
        session.run(source, tool, method, scheme)
    for _ in range(arguments.repeats - 1):  # in turns, so that slow minutes hit everybody
        for tool, method, scheme in jobs:
            session.again(source, tool, method, scheme)
    many = FEW * 2 if arguments.quick else MANY
    longer = inputs.speed_input(folder, sample_model_dir(), many, small=arguments.quick)
    for tool, method, scheme in jobs:
        if tool == "detent":
            session.run(longer, tool, method, scheme)


def page(session: Session, sources: list[inputs.Input], speed: inputs.Input | None) -> str:
    """All tables, with what they were taken on."""
    import torch

    parts = [
        f"{date.today()}: {platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}. s: the tool's own quantization call; CPU s: the same in processor time. MB: peak "
        "resident memory of its process until then."
    ]
    for source in sources:
        here = [r for r in session.results if r.input == source.title]
        facts = f"{source.facts}. Not quantized: **{source.float_perplexity:.3f}**."
        aimed = "\n".join(aims.accuracy_aims(here))
        parts += [f"## {source.title}: perplexity", facts, tables.accuracy_tables(here), aimed]
    if speed is not None:
        here = [r for r in session.results if r.input == speed.title]
        short = [r for r in here if r.tokens == speed.tokens]
        heading = f"{speed.facts}, threads: {session.threads}. The fastest of the runs, which were taken in turns."
        parts += ["## A random Llama: seconds", heading, tables.speed_table(short), tables.growth_table(here)]
        parts.append("\n".join(aims.speed_aims(short)))
    parts += ["## Tools", tables.versions_table(session.results, session.environment_sizes())]
    return "\n\n".join(part for part in parts if part)


def earlier(path: Path | None) -> dict[tuple[object, ...], tables.Result]:
    """The peers' results kept in a file, by key. Detent itself always runs again."""
    if path is None or not path.is_file():
        raise SystemExit("--reuse needs --json FILE, written by an earlier run")
    kept = [tables.Result(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return {result.key: result for result in kept if result.tool != "Detent" and not result.error}


def write(text: str) -> None:
    old = PAGE.read_text(encoding="utf-8")
    new, count = re.subn(f"{START}.*?{END}", lambda _: f"{START}\n\n{text}\n\n{END}", old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} needs the markers {START} and {END} once")
    PAGE.write_text(new, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=names(PEERS), default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--schemes", type=names(SCHEMES), default=list(SCHEMES), help=f"of {', '.join(SCHEMES)}")
    parser.add_argument("--inputs", type=names(INPUTS), default=list(INPUTS), help=f"of {', '.join(INPUTS)}")
    parser.add_argument("--model", type=Path, help="folder of another Llama, for accuracy; needs the next two")
    parser.add_argument("--calibration", type=Path, help="its calibration text")
    parser.add_argument("--evaluation", type=Path, help="its evaluation text")
    parser.add_argument("--group", type=int, help="its weights per scale (64, or 32 for a narrow model)")
    parser.add_argument("--quick", action="store_true", help="one method each, W4 only, a small speed input")
    parser.add_argument("--threads", type=int, help="of each process (accuracy: 1, speed: all cores)")
    parser.add_argument("--jobs", type=int, default=1, help="accuracy processes at a time (1); speed has always one")
    parser.add_argument(
        "--repeats", type=int, default=2, help="runs of each speed job, taken in turns; the fastest counts"
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one job")
    parser.add_argument("--environments", type=Path, default=default_folder(), help="the peers' virtual environments")
    parser.add_argument("--logs", type=Path, help="keep what the tools print in this folder")
    parser.add_argument("--json", type=Path, help="keep raw results in this file")
    parser.add_argument("--reuse", action="store_true", help="take the peers' results from --json, run Detent")
    parser.add_argument("--write", action="store_true", help="update docs/accuracy.md")
    arguments = parser.parse_args()
    if arguments.model and not (arguments.calibration and arguments.evaluation):
        parser.error("--model needs --calibration and --evaluation")
    return arguments


def names(known):
    def split(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return found

    return split


if __name__ == "__main__":
    sys.exit(main())
