"""Time of ``import detent`` over that of ``import torch``, each in fresh processes, in turns: medians.

python benchmarks/import_time.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CODE = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
HEAVY = ("transformers", "datasets", "scipy", "pandas", "rich", "typer", "torch._inductor", "torch._dynamo", "sympy")


def seconds(module: str) -> float:
    done = subprocess.run([sys.executable, "-c", CODE.format(module)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def added_modules() -> list[str]:
    """Of the heavy modules, those that ``import detent`` loads and ``import torch`` doesn't."""
    code = f"import sys, torch; a = set(sys.modules); import detent; print(*(set(sys.modules) - a) & set({HEAVY!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds("torch"), seconds("detent")  # files into the page cache, bytecode onto the disk
    pairs = [(seconds("torch"), seconds("detent")) for _ in range(rounds)]
    torch, detent = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import torch {torch:.2f} s, import detent {detent:.2f} s: {detent / torch:.2f} times, {rounds} rounds")
    print("heavy modules that come with detent alone:", ", ".join(added_modules()) or "none")


if __name__ == "__main__":
    main()
