"""Detent, through its public interface and in the environment that runs the benchmark."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers.catalog import DETENT
from benchmarks.peers.harness import Clock, Job, serve

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
INPUTS: dict[str | None, dict[str, Any]] = {
    None: {"enable": False},
    "int8_token": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    "int4_token": {"num_bits": 4, "type": "dynamic", "block_sizes": {-1: None}},
    "int8_tensor": {"num_bits": 8, "axis": None},
    "nvfp4": NVFP4,
}


def weights(job: Job) -> dict[str, Any]:
    if job.weight == "nvfp4":
        return NVFP4
    return {"num_bits": job.bits, **({"block_sizes": {-1: job.group}} if job.group else {"axis": 0})}


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import detent

        quantize = detent.quantize
    model = job.load_model()
    if job.options.get("time_forward"):
        job.forward_loop(model)  # the first one is slower for everybody
        with clock("forward"):
            job.forward_loop(model)

    def forward_loop(model: Any) -> None:
        start = time.perf_counter()
        job.forward_loop(model)
        clock.add("in forward_loop", time.perf_counter() - start)

    rules = {
        "default": {"enable": False},
        "*weight_quantizer": weights(job),
        "*input_quantizer": INPUTS[job.activation],
        "*lm_head*": {"enable": False},
        "*embed_tokens*": {"enable": False},
    }
    with clock("quantize"):
        return quantize(model, {"quant_cfg": rules, "algorithm": DETENT[job.method]}, forward_loop)


if __name__ == "__main__":
    serve(run)
