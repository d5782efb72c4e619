"""hqq: half-quadratic quantization; no calibration data, and always with zero points."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, serve


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    model = job.load_model()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
    with clock("quantize"):
        for name, linear in linears:
            model.set_submodule(name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


if __name__ == "__main__":
    serve(run, "hqq")
