"""NVIDIA ModelOpt: ``mtq.quantize`` with an algorithm and a configuration of its own presets' form."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, serve

ALGORITHMS: dict[str, Any] = {
    "max": "max",
    "mse": "mse",
    "awq_lite": {"method": "awq_lite", "alpha_step": 0.1},  # as in INT4_AWQ_CFG
    "awq_clip": "awq_clip",
    "awq_full": {"method": "awq_full", "alpha_step": 0.1},
    "gptq": "gptq",
    "smoothquant": "smoothquant",
}


def weight_quantizer(job: Job) -> dict[str, Any]:
    if job.weight == "nvfp4":
        return nvfp4("static" if job.method == "gptq" else "dynamic")
    if job.group is None:
        return {"num_bits": job.bits, "axis": 0}
    return {"num_bits": job.bits, "block_sizes": {-1: job.group, "type": "static"}}


def input_quantizer(job: Job) -> dict[str, Any]:
    match job.activation:
        case "nvfp4":
            return nvfp4("dynamic")
        case "int8_tensor":
            return {"num_bits": 8, "axis": None}
        case "int8_token":
            return {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
    return {}


def nvfp4(kind: str) -> dict[str, Any]:
    return {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": kind, "scale_bits": (4, 3)}}


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import modelopt.torch.quantization as mtq
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight_quantizer(job)},
    ]
    if job.activation is not None:
        rules.append({"quantizer_name": "*input_quantizer", "cfg": input_quantizer(job)})
    rules += [{"quantizer_name": name, "enable": False} for name in ("*lm_head*", "*embed_tokens*")]
    model = job.load_model()
    with clock("quantize"):
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": ALGORITHMS[job.method]}, job.forward_loop)
    return model


if __name__ == "__main__":
    serve(run, "nvidia-modelopt")
