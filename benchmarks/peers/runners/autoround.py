"""Intel AutoRound: rounding and clipping learned block by block (``iters=0``: its optimised rounding to nearest)."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, NotSupported, serve

ITERATIONS = {"0 iterations": 0, "200 iterations": 200}


def scheme(job: Job) -> dict[str, Any]:
    weights = {"bits": job.bits, "group_size": job.group or -1, "sym": True, "data_type": "int"}
    match job.activation:
        case None if job.weight == "int":
            return {**weights, "act_bits": 16}
        case "int8_token" | "int4_token":
            bits = 8 if job.activation == "int8_token" else 4
            return {**weights, "act_bits": bits, "act_group_size": -1, "act_sym": True, "act_dynamic": True}
        case "int8_tensor":
            return {**weights, "act_bits": 8, "act_group_size": 0, "act_sym": True, "act_dynamic": False}
    raise NotSupported(f"no runner for {job.weight} weights with {job.activation} activations")


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        from auto_round import AutoRound
        from torch.utils.data import DataLoader
    tokens = job.tokens()
    model = job.load_model()
    with clock("quantize"):
        rounder = AutoRound(
            model,
            job.load_tokenizer(),
            scheme="NVFP4" if job.weight == "nvfp4" else scheme(job),
            dataset=DataLoader(list(tokens), batch_size=job.batch),
            iters=ITERATIONS[job.method],
            nsamples=len(tokens),
            seqlen=tokens.shape[1],
            batch_size=job.batch,
            device_map="cpu",
            **job.options,
        )
        model, _ = rounder.quantize()
    return model.float()


if __name__ == "__main__":
    serve(run, "auto-round")
