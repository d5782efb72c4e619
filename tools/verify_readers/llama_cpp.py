"""Proves files against llama.cpp: what `detent` writes as GGUF runs there, and gives the same perplexity.

    python tools/verify_readers/llama_cpp.py BIN [--types F16 Q8_0 Q4_K_M] [--architectures llama gemma2]

BIN is a folder with llama.cpp's programs; without one they are built from the source distribution of llama-cpp-python.
Two proofs, each a line of a table: the sample model in several types, and a tiny random model of every architecture in
float32, whose matrices are large enough for its logits to depend on all of them. The perplexity of transformers is
computed as llama.cpp does it: windows that begin with the first token, of which the second half counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch

import detent
from detent.checkpoints.gguf.container import read_header
from detent.data.builtin import builtin_text, sample_model_dir
from detent.runs.load import load_quantized

_MODELS = harness.load("gguf_models")
#: Relative difference of perplexities: llama.cpp rounds activations to 8 bits where weights are quantized.
CLOSE, QUANTIZED = 5e-4, 1e-2
WINDOW = 128
#: Keys and values as they are computed.
CACHE = ("-ctk", "f32", "-ctv", "f32")


def rows() -> list[harness.Row]:
    """For `make verify-readers`: this script, with the programs that LLAMA_CPP names or that are built once."""
    programs = Path(os.environ.get("LLAMA_CPP") or harness.ENVIRONMENTS / "llama_cpp" / "build" / "bin")
    if not (programs / "llama-perplexity").exists():
        build(harness.ENVIRONMENTS / "llama_cpp")
    told = subprocess.run([sys.executable, __file__, programs], capture_output=True, text=True, check=False)
    found = re.findall(r"^(.+?) +detent +(\S+) +llama.cpp +(\S+) +(\S+) *(FAILED)?$", told.stdout, re.MULTILINE)
    made = [
        harness.Row("gguf", name, "llama.cpp", float(off), 0.0 if bad else float(off), f"perplexity {ours}; {theirs}")
        for name, ours, theirs, off, bad in found
    ]
    failed = [line for line in told.stdout.splitlines() if " FAILED " in line] or told.stderr.splitlines()[-3:]
    if told.returncode:
        made.append(harness.Row("gguf", "failed", "llama.cpp", None, QUANTIZED, "; ".join(failed)[:500]))
    return made


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("binaries", type=Path, nargs="?")
    parser.add_argument("--types", nargs="*", default=["F16", "BF16", "Q8_0", "Q4_K_M", "Q4_1", "IQ4_XS", "TQ2_0"])
    parser.add_argument("--architectures", nargs="*")
    parser.add_argument("--quantizer", action="store_true", help="read what llama-quantize makes of these types, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        programs = options.binaries or build(work / "llama.cpp")
        text = work / "text.txt"
        text.write_text(builtin_text("evaluation")[:6000])
        failed = 0
        for kind in options.types:
            failed += compare(kind, sample_model_dir(), work / kind, kind, programs, text)
        if options.quantizer:
            for kind in options.types:
                failed += compare_quantizer(kind, work, programs, text)
        for name in options.architectures if options.architectures is not None else sorted(_MODELS.MODELS):
            source = _MODELS.tiny(name, work / f"{name}-float")
            for kind in ("F32", "Q8_0"):
                failed += compare(
                    f"{name} {kind}", source, work / f"{name}-{kind}", kind, programs, text, 3 * QUANTIZED
                )
    return int(failed > 0)


def compare(
    name: str, source: Path, out: Path, kind: str, programs: Path, text: Path, rounded: float = QUANTIZED
) -> bool:
    """Whether the two perplexities differ by more than llama.cpp's arithmetic explains; a line about them."""
    try:
        detent.quantize_checkpoint(
            detent.ModelOptions(str(source)),
            detent.SchemeOptions(export=detent.ExportOptions("gguf", gguf_type=kind)),
            out,
            evaluation=detent.EvaluationOptions(skip=True),
        )
        windows, theirs = perplexity_there(programs, out / "model.gguf", text)
        ours = perplexity_here(out, text, windows)
    except (detent.DetentError, RuntimeError) as error:
        print(f"{name:20} FAILED {str(error)[-900:]}", flush=True)
        return True
    difference = abs(theirs / ours - 1)
    bad = not difference <= (CLOSE if kind in ("F32", "F16", "BF16") else rounded)
    print(
        f"{name:20} detent {ours:10.4f}  llama.cpp {theirs:10.4f}  {difference:.2e} {'FAILED' if bad else ''}",
        flush=True,
    )
    return bad


def compare_quantizer(kind: str, work: Path, programs: Path, text: Path) -> bool:
    """Whether llama-quantize gives tensors other types than we, or its file means something else to us; a line."""
    floats, theirs = work / "F16" / "model.gguf", work / f"theirs-{kind}" / "model.gguf"
    theirs.parent.mkdir()
    shutil.copy(sample_model_dir() / "tokenizer.json", theirs.parent)
    command = [programs / "llama-quantize", floats, theirs, kind, "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{kind:16} llama-quantize doesn't make it", flush=True)
        return False
    kinds = [
        {name: entry.kind for name, entry in read_header(file).tensors.items()}
        for file in (theirs, work / kind / "model.gguf")
    ]
    wrong = {name: (kind, kinds[1].get(name)) for name, kind in kinds[0].items() if kinds[1].get(name) != kind}
    windows, there = perplexity_there(programs, theirs, text)
    here = perplexity_here(theirs, text, windows)
    bad = bool(wrong) or not abs(there / here - 1) <= QUANTIZED
    print(f"{kind:16} by llama-quantize: read as {here:10.4f}, there {there:10.4f}; other types: {wrong}", flush=True)
    return bad


def perplexity_there(programs: Path, file: Path, text: Path) -> tuple[int, float]:
    """(how many windows it is of, the perplexity): of what it prints as it goes on, the end may be lost."""
    command = [programs / "llama-perplexity", "-m", file, "-f", text, "-c", str(WINDOW), "-b", str(WINDOW)]
    done = subprocess.run(
        [*map(str, command), "-fa", "off", "-t", "1", "--no-warmup", *CACHE],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"\[(\d+)\]([\d.]+),", done.stdout)
    if not found:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line or "fail" in line]
        raise RuntimeError(f"exit code {done.returncode}: " + "; ".join(lines[:4] or done.stderr.splitlines()[-3:]))
    return int(found[-1][0]), float(found[-1][1])


@torch.no_grad()
def perplexity_here(folder: Path, text: Path, windows: int) -> float:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str((folder.parent if folder.suffix else folder) / "tokenizer.json"), bos_token="<s>"
    )
    model = load_quantized(folder, dtype=torch.float32)
    ids = tokenizer(text.read_text()).input_ids
    begins = ids[0] == tokenizer.bos_token_id
    total = count = 0.0
    for start in range(0, windows * WINDOW, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        if begins:
            window[0, 0] = tokenizer.bos_token_id
        scores = model(window).logits[0].log_softmax(-1)
        for at in range(WINDOW // 2, WINDOW - 1):
            total -= float(scores[at, window[0, at + 1]])
            count += 1
    return math.exp(total / count)


def build(folder: Path) -> Path:
    """llama.cpp's programs, built from the source distribution of llama-cpp-python."""
    wanted = ["llama-perplexity", "llama-quantize"]
    folder.mkdir(parents=True, exist_ok=True)
    run = lambda *command: subprocess.run([str(part) for part in command], check=True)  # noqa: E731
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "llama-cpp-python", "-d", folder)
    run("tar", "-xf", *folder.glob("*.tar.gz"), "-C", folder)
    source = next(folder.glob("*/vendor/llama.cpp"))
    run("cmake", "-S", source, "-B", folder / "build", "-DLLAMA_CURL=OFF", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", folder / "build", "--target", *wanted, "-j")
    return folder / "build" / "bin"


if __name__ == "__main__":
    print(json.dumps({"detent": detent.__version__, "torch": torch.__version__}))
    sys.exit(main())
