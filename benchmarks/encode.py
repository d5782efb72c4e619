"""Processor time of encoding a weight, per weight, beside a copy of the same bytes and a matrix product with it.

    python benchmarks/encode.py                          # a bfloat16 weight of 4096 x 4096, all formats, one thread
    python benchmarks/encode.py --dtype float32 --formats int4,mxfp4 --peers none

Processor time (all threads, system included) is what a data-free run on a machine with other work pays. *packed* goes
from the weight to packed bytes and scales; *check* compares two encoded weights, as a run does after writing. The
copy goes into memory that is there already; the product is with one batch of 128 tokens. The least of some rounds is
printed, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import detent.formats as df
from detent.formats import Format

FORMATS = {
    "fp8": df.fp8(),
    "fp8_channel": df.fp8("e4m3", df.per_channel(0)),
    "fp8_block128": df.fp8("e4m3", df.per_block({0: 128, 1: 128})),
    "int8": df.integer(8),
    "int8_channel": df.integer(8, df.per_channel(0)),
    "int8_g128": df.integer(8, df.per_group(128)),
    "int4_channel": df.integer(4, df.per_channel(0)),
    "int4": df.integer(4, df.per_group(128)).with_scale_dtype("bfloat16"),
    "uint4_asymmetric": df.integer(4, df.per_group(128), signed=False, symmetric=False).with_scale_dtype("bfloat16"),
    "mxfp4": df.mx("e2m1"),
    "mxfp8": df.mx("e4m3"),
    "nvfp4": df.nvfp4(),
}
TOKENS = 128


def peers_of(name: str, wanted: bool) -> dict[str, Callable[[Tensor], object]]:
    """The same by torchao, where it can be imported: range, scale and codes."""
    if not wanted:
        return {}
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.quantization import quant_primitives as primitives
    except ImportError:
        return {}

    def integer(x: Tensor, bits: int, block: tuple[int, int]) -> object:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        symmetric = primitives.MappingType.SYMMETRIC
        scale, zero = primitives.choose_qparams_affine(x, symmetric, block, torch.int8, low, high)
        return primitives.quantize_affine(x, block, scale, zero, torch.int8, low, high)

    runs: dict[str, Callable[[Tensor], object]] = {
        "int8_channel": lambda x: integer(x, 8, (1, x.shape[1])),
        "int4": lambda x: integer(x, 4, (1, 128)),
        "mxfp4": lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32),
        "mxfp8": lambda x: MXTensor.to_mx(x, torch.float8_e4m3fn, 32),
    }
    return {"torchao": runs[name]} if name in runs else {}


def least(run: Callable[[], object], rounds: int) -> float:
    run()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        spent.append(time.process_time() - start)
        del result
    return min(spent)


def row(name: str, x: Tensor, fmt: Format, rounds: int, peers: bool) -> dict[str, float]:
    q = df.encode(x, fmt)
    same = df.QTensor(fmt, q.shape, **{n: t.clone() for n, t in q.tensors().items()})
    runs: dict[str, Callable[[], object]] = {
        "packed": lambda: df.encode_packed(x, fmt),
        "encode": lambda: df.encode(x, fmt),
        "decode": lambda: df.decode(q, x.dtype),
        "fake": lambda: df.fake_quantize(x, fmt),
        "check": lambda: q == same,
    }
    runs |= {who: lambda run=run: run(x) for who, run in peers_of(name, peers).items()}  # type: ignore[misc]
    return {what: least(run, rounds) for what, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated; all: " + " ".join(FORMATS))
    parser.add_argument("--peers", choices=["torchao", "none"], default="torchao")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    unknown = set(args.formats.split(",")) - set(FORMATS)
    if unknown:
        parser.error(f"unknown formats: {sorted(unknown)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.width, args.width).mul_(0.02).to(getattr(torch, args.dtype))
    room, tokens = torch.empty_like(x), torch.randn(TOKENS, args.width).to(x.dtype)
    copy = least(lambda: room.copy_(x), 4 * args.rounds)
    product = least(lambda: tokens @ x.T, args.rounds)
    per = 1e9 / x.numel()
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {args.threads} threads, {args.width}^2 {args.dtype}")
    print(f"copy {copy * per:.2f} ns a weight; product with {TOKENS} tokens {product * per:.2f} ns a weight\n")
    print("| format | packed, ns | in copies | in products | encode, ns | decode | fake | check | torchao |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.formats.split(","):
        t = row(name, x, FORMATS[name], args.rounds, args.peers == "torchao")
        cells = [t["packed"] * per, t["packed"] / copy, t["packed"] / product]
        cells += [t[what] * per for what in ("encode", "decode", "fake", "check")]
        peer = f"{t['torchao'] * per:.2f}" if "torchao" in t else "–"
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {peer} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
