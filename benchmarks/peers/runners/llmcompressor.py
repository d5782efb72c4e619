"""llm-compressor: ``oneshot`` with its modifiers; the model it leaves in memory rounds as its checkpoint would."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, NotSupported, serve


def scheme(job: Job) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    if job.weight == "nvfp4":
        return preset_name_to_scheme("NVFP4", ["Linear"])
    integers: dict[str, Any] = {"type": "int", "symmetric": True}
    by_group = {"strategy": "group", "group_size": job.group} if job.group else {"strategy": "channel"}
    inputs = {
        "int8_token": {"strategy": "token", "dynamic": True},
        "int4_token": {"strategy": "token", "dynamic": True},
        "int8_tensor": {"strategy": "tensor", "dynamic": False},
    }.get(job.activation or "")
    bits = 4 if job.activation == "int4_token" else 8
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=job.bits, **integers, **by_group),
        input_activations=inputs and QuantizationArgs(num_bits=bits, **integers, **inputs),
    )


def recipe(job: Job) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    wanted: dict[str, Any] = {"config_groups": {"group_0": scheme(job)}, "ignore": ["lm_head"]}
    match job.method:
        case "rtn":
            return [QuantizationModifier(**wanted)]
        case "gptq":
            return [GPTQModifier(**wanted)]
        case "awq":
            return [AWQModifier(), QuantizationModifier(**wanted)]
        case "smoothquant":
            return [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(**wanted)]
        case "smoothquant, gptq":
            return [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**wanted)]
        case "spinquant":
            return [SpinQuantModifier(rotations=["R1", "R2", "R4"]), QuantizationModifier(**wanted)]
        case "spinquant, gptq":
            return [SpinQuantModifier(rotations=["R1", "R2", "R4"]), GPTQModifier(**wanted)]
    raise NotSupported(f"no method {job.method}")


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import torch
        from llmcompressor import oneshot
        from torch.utils.data import DataLoader
    tokens = job.tokens()
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    model = job.load_model()
    with clock("quantize"):
        oneshot(
            model=model,
            dataset=DataLoader(rows, batch_size=job.batch),
            recipe=recipe(job),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )
    return model


if __name__ == "__main__":
    serve(run, "llmcompressor", "compressed-tensors")
