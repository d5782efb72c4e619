"""What every runner shares, inside a peer's own environment: the job, the clock and the one evaluator.

Nothing but torch, transformers and safetensors is imported here: this file runs under each peer's pinned versions.
A runner is started as ``python -m benchmarks.peers.runners.NAME JOB.json RESULT.json``.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One quantization: the same for whoever does it, `method` excepted.

    Attributes:
        model: folder of a causal language model in Hugging Face layout, computed in float32.
        calibration: safetensors file with ``input_ids``, int64 [sequences, tokens].
        evaluation: the same for the windows whose perplexity is measured; None where only time matters.
        method: what the runner does, in its own words.
        weight: ``"int"`` (symmetric integers) or ``"nvfp4"``.
        bits: of a weight.
        group: weights along a row that share a scale; None for the whole row.
        activation: None (kept), ``"int8_token"`` or ``"int4_token"`` (one scale per token, taken at run time),
            ``"int8_tensor"`` (one scale per tensor, from calibration) or ``"nvfp4"``.
        threads: for torch.
        batch: sequences in a calibration batch.
        options: whatever else the runner wants to know.
    """

    model: str
    calibration: str
    evaluation: str | None
    method: str
    weight: str = "int"
    bits: int = 4
    group: int | None = None
    activation: str | None = None
    threads: int = 2
    batch: int = 8
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def load_model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, torch_dtype=torch.float32).eval()

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def tokens(self) -> Any:
        """The calibration tokens, int64 [sequences, tokens]."""
        return read_tokens(self.calibration)

    def batches(self) -> list[Any]:
        return list(self.tokens().split(self.batch))

    def forward_loop(self, model: Any) -> None:
        """Show the model all calibration data."""
        import torch

        with torch.no_grad():
            for batch in self.batches():
                model(input_ids=batch, use_cache=False)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


class NotSupported(Exception):
    """The peer has no way to do this job; its message goes into the table."""


class Clock:
    """Seconds by name, and the process's peak resident memory at the end of what was timed last.

    Beside the wall clock's ``name`` stands ``name, cpu``: the time of all threads, which other work on the machine
    does not lengthen.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, start_cpu = time.perf_counter(), time.process_time()
        yield
        self.add(name, time.perf_counter() - start)
        self.add(f"{name}, cpu", time.process_time() - start_cpu)
        self.peak_bytes = peak_memory()

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


#: Quantizes the model of a job. Its own call is timed as ``clock("quantize")``, imports as ``clock("import")``. The
#: result computes what the quantized model computes: weights decoded, activations rounded on the way.
Run = Callable[[Job, Clock], Any]


def peak_memory() -> int:
    """The most bytes of this process that were resident at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent had when it started this process, too
        return next(int(s.split()[1]) * 1024 for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_tokens(path: str) -> Any:
    from safetensors.torch import load_file

    return load_file(path)["input_ids"]


def perplexity(model: Any, windows: Any, batch: int = 16) -> float:
    """The perplexity of a causal language model over windows of token ids [windows, tokens]: the only evaluator here.

    Logits as the model gives them, cross-entropy in float32, summed in float64. Every token but the first of a window
    is predicted from those before it in the window.
    """
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for rows in windows.split(batch):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            targets = rows[:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += losses.double().sum().item()
            count += targets.numel()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf  # NaN stays NaN


def serve(run: Run, *packages: str) -> None:
    """Do the job named on the command line and write the result, or why there is none."""
    job_file, result_file = sys.argv[1:3]
    job = Job(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    clock = Clock()
    result: dict[str, Any] = {}
    try:
        with clock("import torch"):
            import torch
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        model = run(job, clock)
        result["peak_bytes"] = clock.peak_bytes
        if job.evaluation is not None and model is not None:
            with clock("evaluate"):
                result["perplexity"] = perplexity(model, read_tokens(job.evaluation))
    except Exception as error:  # a peer may raise anything; the table says so
        traceback.print_exc()
        result["error"] = first_line(error)
    result["seconds"] = clock.seconds
    result["versions"] = {name: installed_version(name) for name in ("torch", "transformers", *packages)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, NotSupported):
        return lines[0]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
