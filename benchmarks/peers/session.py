"""One session: every tool on every input and scheme, one process after the other, results kept as they come."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.catalog import PEERS, SCHEMES
from benchmarks.peers.environments import ROOT, InstallError, environment, interpreter
from benchmarks.peers.harness import Job
from benchmarks.peers.inputs import Input
from benchmarks.peers.tables import Result


@dataclass
class Session:
    """What is the same for every job.

    Attributes:
        environments: folder of the peers' virtual environments.
        logs: folder for what the tools print.
        threads: for each process.
        timeout: seconds; a job that takes longer has no result.
        reused: results of an earlier session on the same machine, taken instead of running a peer again.
        store: JSON file that results are kept in, or None.
    """

    environments: Path
    logs: Path
    threads: int
    timeout: int
    reused: dict[tuple[Any, ...], Result] = field(default_factory=dict)
    store: Path | None = None
    results: list[Result] = field(default_factory=list)
    _interpreters: dict[str, Path | str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, source: Input, tool: str, method: str, scheme: str) -> Result:
        """Do one job and keep its result; results keep the order in which jobs were begun."""
        wanted = _unmeasured(source, tool, method, scheme)
        with self._lock:
            place = len(self.results)
            self.results.append(wanted)
        result = self.reused.get(wanted.key) or self._fresh(wanted, source, tool)
        with self._lock:
            self.results[place] = result
            self._save()
        _tell(result, tool)
        return result

    def again(self, source: Input, tool: str, method: str, scheme: str) -> None:
        """Do a job once more and keep the faster run: what else the machine does only ever adds time."""
        wanted = _unmeasured(source, tool, method, scheme)
        place = next(i for i, result in enumerate(self.results) if result.key == wanted.key)
        before = self.results[place]
        result = self._fresh(wanted, source, tool)
        if not result.error and (before.error or result.wall < before.wall):
            self.results[place] = result
            self._save()
        _tell(result, tool, again=True)

    def environment_sizes(self) -> dict[str, int]:
        """Bytes of each environment that was used, by title of its tool."""
        sizes = {}
        for name, python in self._interpreters.items():
            if isinstance(python, Path) and name != "detent":
                files = (p for p in python.parents[1].rglob("*") if p.is_file() and not p.is_symlink())
                sizes[PEERS[name].title] = sum(p.stat().st_size for p in files)
        return sizes

    def prepare(self, tool: str) -> Path | str:
        """The tool's interpreter, installed if need be, or why there is none. Detent's is the one that runs this."""
        if tool not in self._interpreters:
            found: Path | str = Path(sys.executable)
            if tool != "detent":
                log = self.logs / f"{tool}-install.log"
                try:
                    found = interpreter(self.environments, tool, PEERS[tool].packages, log)
                except InstallError as error:
                    found = f"does not install: {error}"
            self._interpreters[tool] = found
        return self._interpreters[tool]

    def _save(self) -> None:
        """Write what is known so far, reused results that were not asked for yet included."""
        if self.store is not None:
            done = {r.key: r for r in self.results if r.seconds or r.error}
            kept = [*done.values(), *(r for key, r in self.reused.items() if key not in done)]
            self.store.write_text(json.dumps([r.to_dict() for r in kept], indent=1), encoding="utf-8")

    def _fresh(self, wanted: Result, source: Input, tool: str) -> Result:
        python = self.prepare(tool)
        if isinstance(python, str):
            return replace(wanted, error=python)
        scheme = SCHEMES[wanted.scheme]
        job = Job(
            model=str(source.model),
            calibration=str(source.calibration),
            evaluation=str(source.evaluation) if source.evaluation else None,
            method=wanted.method,
            weight=scheme.weight,
            bits=scheme.bits,
            group=source.group if scheme.by_group else None,
            activation=scheme.activation,
            threads=self.threads,
            options={**PEERS[tool].options, "time_forward": True} if source.evaluation is None else PEERS[tool].options,
        )
        log = self.logs / f"{source.title} {wanted.scheme} {tool} {wanted.method}.log".replace(" ", "-")
        found, whole = self._process(python, tool, job, log)
        spent = {**found.get("seconds", {}), "whole process": whole}
        return replace(
            wanted,
            perplexity=found.get("perplexity"),
            seconds=spent,
            peak_bytes=found.get("peak_bytes", 0),
            error=found.get("error", ""),
            versions=found.get("versions", {}),
        )

    def _process(self, python: Path, tool: str, job: Job, log: Path) -> tuple[dict[str, Any], float]:
        """Run a runner in a scratch folder: what it wrote, and the seconds of its whole process."""
        with tempfile.TemporaryDirectory(prefix="detent-peer-") as scratch, log.open("w", encoding="utf-8") as output:
            job_file, result_file = Path(scratch, "job.json"), Path(scratch, "result.json")
            job.save(job_file)
            command = [str(python), "-m", f"benchmarks.peers.runners.{tool}", str(job_file), str(result_file)]
            start = time.perf_counter()
            try:
                done = subprocess.run(
                    command,
                    cwd=scratch,
                    env=environment(self.threads, *([ROOT / "src"] if tool == "detent" else [])),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                return {"error": f"not done within {self.timeout} s"}, float(self.timeout)
            whole = time.perf_counter() - start
            if result_file.is_file():
                return json.loads(result_file.read_text(encoding="utf-8")), whole
            return {"error": f"the process ended with {done.returncode} and no result"}, whole


def _unmeasured(source: Input, tool: str, method: str, scheme: str) -> Result:
    return Result(source.title, scheme, PEERS[tool].title, method, tokens=source.tokens)


def _tell(result: Result, tool: str, *, again: bool = False) -> None:
    """A line on the standard error about a job that has ended."""
    took = f"{result.wall:.1f} s ({result.cpu:.1f} of processor time)"
    ending = result.error or (took if again else f"perplexity {result.perplexity}, {took}")
    what = f"{result.input} {result.scheme} {tool} {result.method}" + " again" * again
    print(f"{time.strftime('%H:%M:%S')} {what}: {ending}", file=sys.stderr, flush=True)
