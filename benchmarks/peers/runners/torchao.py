"""torchao: ``quantize_`` with its weight configurations; no calibration data."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, NotSupported, serve


def configuration(job: Job) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    if job.weight == "nvfp4":
        from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

        return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    dtype = getattr(torch, f"int{job.bits}")
    granularity = PerGroup(job.group) if job.group else PerAxis(0)
    algorithm = {"intx_choose_qparams_algorithm": "hqq_scale_only"} if job.method == "hqq" else {}
    if job.activation is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, **algorithm)
    if job.activation == "int8_token":
        # Its activations have zero points; it refuses symmetric ones.
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity, **algorithm)
    raise NotSupported(f"no configuration for {job.activation} activations")


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import torch
        from torchao.quantization import quantize_
    model = job.load_model()
    with clock("quantize"):
        quantize_(model, configuration(job), lambda m, name: isinstance(m, torch.nn.Linear) and name != "lm_head")
    return model


if __name__ == "__main__":
    serve(run, "torchao")
