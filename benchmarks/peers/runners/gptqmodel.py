"""GPTQModel: load, quantize, save, and the saved checkpoint read back by its CPU kernel."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.peers.harness import Clock, Job, serve


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        import torch
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens()]
    config = QuantizeConfig(bits=job.bits, group_size=job.group or -1, sym=True, device="cpu")
    wrapper = GPTQModel.load(job.model, config, dtype=torch.float32)
    with clock("quantize"):
        wrapper.quantize(rows, batch_size=job.batch)
    folder = tempfile.mkdtemp(dir=".")
    wrapper.save(folder)
    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float32).model


if __name__ == "__main__":
    serve(run, "gptqmodel")
