"""Time of fake quantization, in copies of the same tensor, beside ModelOpt and torchao where they are installed.

    python benchmarks/fake_quantize.py                       # 64 Mi elements, float32 and bfloat16
    python benchmarks/fake_quantize.py --elements 4194304 --formats int8,nvfp4 --peers none

Everything about one format and dtype is timed in turns, round after round, and medians are printed, so that a noisy
machine slows all of them alike. Scales are taken from the tensor each time (weights; dynamic activations). A copy is
``x.clone()``, which like fake quantization returns a new tensor; ``copy_`` into a tensor that is there already, which
spares the system clearing and mapping fresh pages, is printed beside it.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import detent.formats as df
from detent.formats import Format

Run = Callable[[Tensor], Any]
WIDTH = 4096
#: A peer that takes longer than this is not run again: the noise of one run doesn't matter then.
SLOW_SECONDS = 5.0

MX = {"scale_bits": (8, 0), "type": "dynamic"}


@dataclass(frozen=True)
class Case:
    """One format, and what its nearest relatives are called elsewhere (None: there is none)."""

    format: Format
    modelopt: dict[str, Any] | None = None
    torchao: tuple[Any, ...] | None = None
    aim: bool = field(default=False, kw_only=True)


CASES = {
    "int8": Case(df.integer(8), {"num_bits": 8, "axis": None}, ("integer", 8, (WIDTH, None), "symmetric"), aim=True),
    "int8_channel": Case(
        df.integer(8, df.per_channel(0)), {"num_bits": 8, "axis": 0}, ("integer", 8, (1, None), "symmetric"), aim=True
    ),
    "int4_g128": Case(
        df.integer(4, df.per_group(128)),
        {"num_bits": 4, "block_sizes": {-1: 128}},
        ("integer", 4, (1, 128), "symmetric"),
        aim=True,
    ),
    "uint4_g128_asymmetric": Case(
        df.integer(4, df.per_group(128), signed=False, symmetric=False),
        None,
        ("integer", 4, (1, 128), "asymmetric"),
    ),
    "fp8": Case(df.fp8(), {"num_bits": (4, 3), "axis": None}, ("float8",), aim=True),
    "mxfp8": Case(df.mx("e4m3"), {"num_bits": (4, 3), "block_sizes": {-1: 32, **MX}}, ("mx", "float8_e4m3fn")),
    "mxfp6": Case(df.mx("e3m2"), {"num_bits": (3, 2), "block_sizes": {-1: 32, **MX}}, ("mx", "fp6_e3m2")),
    "mxfp4": Case(
        df.mx("e2m1"),
        {"num_bits": (2, 1), "block_sizes": {-1: 32, **MX}},
        ("mx", "float4_e2m1fn_x2"),
        aim=True,
    ),
    "nvfp4": Case(
        df.nvfp4(),
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3), "type": "dynamic"}},
        ("nvfp4",),
        aim=True,
    ),
    "mx6": Case(df.micro_exponent(6)),
    "mx9": Case(df.micro_exponent(9)),
    "bfp16": Case(df.bfp16()),
    "nf4": Case(df.nf4()),
}


def modelopt_run(config: dict[str, Any]) -> Run:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(**config)).eval()
    return lambda x: quantizer(x)


def torchao_run(kind: str, *arguments: Any) -> Run:
    from torchao.quantization import quant_primitives as primitives

    if kind == "integer":
        return torchao_integer_run(*arguments)
    if kind == "float8":

        def float8(x: Tensor) -> Tensor:
            scale = primitives._choose_scale_float8(x, block_size=list(x.shape))
            codes = primitives._quantize_affine_float8(x, scale)
            return primitives._dequantize_affine_float8(codes, scale, x.dtype)

        return float8
    if kind == "mx":
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        dtype = getattr(torch, arguments[0], arguments[0])
        return lambda x: MXTensor.to_mx(x, dtype, 32).dequantize(x.dtype)
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def nvfp4(x: Tensor) -> Tensor:
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax())).dequantize(x.dtype)

    return nvfp4


def torchao_integer_run(bits: int, block: tuple[int, int | None], symmetry: str) -> Run:
    from torchao.quantization import quant_primitives as primitives

    symmetric = symmetry == "symmetric"
    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    dtype = torch.int8 if symmetric else torch.uint8

    def run(x: Tensor) -> Tensor:
        size = (x.shape[0] if block[0] == WIDTH else block[0], block[1] or x.shape[1])
        scale, zero = primitives.choose_qparams_affine(x, mapping, size, dtype, low, high, scale_dtype=torch.float32)
        return primitives._fake_quantize_affine(x, size, scale, zero, dtype, low, high)

    return run


def contenders(case: Case, peers: set[str]) -> dict[str, Run]:
    """What to time, by name."""
    found: dict[str, Run] = {
        "copy": lambda x: x.clone(),
        "detent": lambda x: df.fake_quantize(x, case.format),
    }
    if "modelopt" in peers and case.modelopt is not None:
        found["ModelOpt"] = modelopt_run(case.modelopt)
    if "torchao" in peers and case.torchao is not None:
        found["torchao"] = torchao_run(*case.torchao)
    return found


def measure(runs: dict[str, Run], x: Tensor, rounds: int) -> dict[str, float | str]:
    """Median seconds of each contender, or why there are none; ``copy_`` is added."""
    room = torch.empty_like(x)
    runs = {"copy_": lambda x: room.copy_(x), **runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            ours = name.startswith(("copy", "detent"))
            if name in failed or (not ours and seconds[name] and max(seconds[name]) > SLOW_SECONDS):
                continue
            try:
                spent = once(run, x)
            except Exception as error:  # a peer may raise anything, and the table says so
                if ours:
                    raise
                failed[name] = f"raises {type(error).__name__}: {' '.join(str(error).split())[:90]}"
                continue
            if turn > 0 or (not ours and spent > SLOW_SECONDS):  # the first turn compiles and warms up
                seconds[name].append(spent)
    return {name: failed.get(name) or statistics.median(seconds[name]) for name in runs}


def once(run: Run, x: Tensor) -> float:
    synchronize(x)
    start = time.perf_counter()
    result = run(x)
    synchronize(x)
    spent = time.perf_counter() - start
    del result
    return spent


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def installed(wanted: str) -> set[str]:
    """The peers that can be imported, of those asked for."""
    found = set()
    for name in [] if wanted == "none" else wanted.split(","):
        try:
            if name == "modelopt":
                import modelopt.torch.quantization  # noqa: F401
            else:
                import torchao  # noqa: F401
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            found.add(name)
    return found


def describe(value: float | str, unit: float) -> str:
    return value if isinstance(value, str) else f"{value / unit:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help="per tensor, a multiple of 4096 (64 Mi)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", default=",".join(CASES), help="comma-separated; all: " + " ".join(CASES))
    parser.add_argument("--peers", default="modelopt,torchao", help="comma-separated, or none")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    unknown = set(args.formats.split(",")) - set(CASES)
    if unknown or args.elements % WIDTH:
        parser.error(f"unknown formats: {sorted(unknown)}" if unknown else f"--elements: a multiple of {WIDTH}")

    peers = installed(args.peers)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.elements} elements, ", end="")
    print(f"{args.rounds} rounds. Ratios: over x.clone() / over copy_.\n")
    print("| format | | float32 | bfloat16 | float32, s | bfloat16, s |\n|---|---|---|---|---|---|", flush=True)
    torch.manual_seed(0)
    floats = torch.randn(args.elements // WIDTH, WIDTH).to(args.device)
    missed = []
    for name in args.formats.split(","):
        case = CASES[name]
        times = {}
        for dtype in (torch.float32, torch.bfloat16):
            gc.collect()
            x = floats.to(dtype)
            if not df.same_bits(df.fake_quantize(x, case.format), df.decode(df.encode(x, case.format), dtype)):
                raise AssertionError(f"{name}, {dtype}: simulated and encoded values have different bits")
            times[dtype] = measure(contenders(case, peers), x, args.rounds)
        for who in times[torch.float32]:
            cells = [
                describe(t[who], t["copy"]) + ("" if isinstance(t[who], str) else f" / {t[who] / t['copy_']:.2f}")  # type: ignore
                for t in times.values()
            ]
            seconds = ["–" if isinstance(t[who], str) else f"{t[who]:.3f}" for t in times.values()]
            print(f"| {name} | {who} | {' | '.join(cells)} | {' | '.join(seconds)} |", flush=True)
            if case.aim and who == "detent":
                missed += [f"{name} {dtype}" for dtype, t in times.items() if t[who] > 3 * t["copy"]]  # type: ignore
    print("\nMore than 3 copies: " + (", ".join(missed) or "none of the formats with that aim"))


if __name__ == "__main__":
    sys.exit(main())
