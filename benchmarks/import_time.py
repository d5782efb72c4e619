"""Time of ``import detent`` over that of ``import torch``, each in fresh processes, in turns: medians.

``import detent`` alone puts off even torch, so the time until ``detent.quantize`` is there is printed too.

python benchmarks/import_time.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
TORCH, DETENT, QUANTIZE = "import torch", "import detent", "import detent; detent.quantize"
HEAVY = ("transformers", "datasets", "scipy", "pandas", "rich", "typer", "torch._inductor", "torch._dynamo", "sympy")


def seconds(statement: str) -> float:
    done = subprocess.run([sys.executable, "-c", CODE.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def added_modules() -> list[str]:
    """Of the heavy modules, those that ``import detent`` loads and ``import torch`` doesn't."""
    code = f"import sys, torch; a = set(sys.modules); {QUANTIZE}; print(*(set(sys.modules) - a) & set({HEAVY!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    statements = (TORCH, DETENT, QUANTIZE)
    for statement in statements:  # files into the page cache, bytecode onto the disk
        seconds(statement)
    turns = [[seconds(statement) for statement in statements] for _ in range(rounds)]
    torch, *ours = (statistics.median(times) for times in zip(*turns, strict=True))
    print(f"{TORCH}: {torch:.2f} s (medians of {rounds} rounds)")
    for statement, median in zip((DETENT, QUANTIZE), ours, strict=True):
        print(f"{statement}: {median:.2f} s, {median / torch:.2f} times")
    print("heavy modules that come with it:", ", ".join(added_modules()) or "none")


if __name__ == "__main__":
    main()
