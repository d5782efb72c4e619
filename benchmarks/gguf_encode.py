"""Error and processor time of encoding weights in GGUF's types, beside llama.cpp's own quantizer.

    python benchmarks/gguf_encode.py --library build/bin/libggml-base.so
    python benchmarks/gguf_encode.py --library build/bin/libggml-base.so --types Q4_K Q6_K --record

`--library` is what ``cmake -DBUILD_SHARED_LIBS=ON`` makes of llama.cpp; its functions ``quantize_*`` are those of
``llama-quantize``. Both sides start from the same float32 numbers and end with the bytes of the file, in one thread,
one after the other in every round. *error* is the squared error weighed by importance, ours over theirs; *time* is the
median over the rounds of theirs over ours. `--record` prints llama.cpp's errors as tests/formats/test_search.py has
them.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from detent.checkpoints.gguf.blocks import BLOCKS
from detent.data import sample_model_dir
from detent.formats import GGUF_FORMATS, QTensor, SearchedScale, decode, encode


def problems(rows: int = 64) -> dict[str, Tensor]:
    """Weights of 512 columns: normal, heavy-tailed (Student's t with 3 degrees of freedom), and of a trained model."""
    random = np.random.default_rng(0)
    normal, heavy = random.normal(size=(rows, 512)), random.standard_t(3, size=(rows, 512))
    trained = load_file(sample_model_dir() / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
    trained = trained.repeat(-(-rows // len(trained)), 1)[:rows]
    return {
        "normal": torch.tensor(normal * 0.02, dtype=torch.float32),
        "heavy": torch.tensor(heavy * 0.02, dtype=torch.float32),
        "trained": trained.contiguous(),
    }


def importance_of(columns: int) -> Tensor:
    """Importance that differs as much as it does in language models: a few columns count a hundred times the others."""
    random = np.random.default_rng(1)
    return torch.tensor(random.random(columns) ** 4 * 3 + 0.01, dtype=torch.float32)


def relative_error(values: Tensor, x: Tensor, importance: Tensor | None) -> float:
    """The squared error relative to the weight's own squares, both weighed by importance."""
    weights = torch.ones(x.shape[1]) if importance is None else importance
    return float(((values - x).double().square() * weights).sum() / (x.double().square() * weights).sum())


def ours(name: str, x: Tensor, importance: Tensor | None) -> tuple[QTensor, Tensor]:
    """(codes and scales, bytes)."""
    searched = isinstance(GGUF_FORMATS[name].scale, SearchedScale)
    q = encode(x, GGUF_FORMATS[name], importance=importance if searched else None)
    return q, BLOCKS[name].pack(q)


def llama_cpp(library: str) -> Callable[[str, Tensor, Tensor | None], Tensor]:
    """From (type, weight, importance) to the bytes that llama.cpp makes."""
    functions = ctypes.CDLL(library)

    def quantize(name: str, x: Tensor, importance: Tensor | None) -> Tensor:
        block = BLOCKS[name]
        out = torch.empty(len(x), x.shape[1] // block.elements * block.bytes, dtype=torch.uint8)
        function = getattr(functions, "quantize_" + name.lower().replace("_k", "_K"))
        function.restype = ctypes.c_size_t
        pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, out, importance)]
        function(pointers[0], pointers[1], *(ctypes.c_int64(n) for n in x.shape), pointers[2])
        return out

    return quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--types", nargs="*", default=list(GGUF_FORMATS))
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs = llama_cpp(arguments.library)
    for name in arguments.types:
        errors = []
        for weighted in (False, True):
            for kind, x in problems(64 if arguments.record else arguments.rows).items():
                importance = importance_of(x.shape[1]) if weighted else None
                block, spent = BLOCKS[name], []
                for _ in range(1 if arguments.record else arguments.rounds):
                    start = time.thread_time()
                    data = theirs(name, x, importance)
                    middle = time.thread_time()
                    q, _ = ours(name, x, importance)
                    spent.append((middle - start, time.thread_time() - middle))
                other = block.unpack(data, tuple(x.shape))
                assert isinstance(other, QTensor)
                error = relative_error(decode(other), x, importance)
                errors.append(error)
                if arguments.record:
                    continue
                ratio = statistics.median(a / b for a, b in spent)
                rate = x.numel() / min(b for _, b in spent) / 1e6
                mine = relative_error(decode(q), x, importance)
                print(
                    f"{name:7} {kind:8} {'weighted' if weighted else 'plain':8} error {mine / error:6.3f}"
                    f"   time {ratio:6.2f}   ours {rate:6.1f} M/s"
                )
        if arguments.record:
            print(f'    "{name}": ({", ".join(f"{error:.6g}" for error in errors)}),')


if __name__ == "__main__":
    main()
