"""AMD Quark: ``ModelQuantizer`` with the configuration of its Llama template."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.harness import Clock, Job, NotSupported, serve

ALGORITHMS = {"rtn": None, "gptq": "gptq", "awq": "awq", "smoothquant": "smoothquant"}


def scheme(job: Job) -> Any:
    from quark.torch.quantization.config import config as q

    if job.weight == "int" and job.activation is None and job.group:
        spec = {2: q.Int2PerGroupSpec, 3: q.Int3PerGroupSpec, 4: q.Int4PerGroupSpec}[job.bits]
        symmetric = {"symmetric": True, "is_dynamic": False, "scale_type": "float"}
        return q.QLayerConfig(weight=spec(ch_axis=-1, group_size=job.group, **symmetric).to_quantization_spec())
    if job.bits == 8 and job.activation == "int8_tensor":
        weights = q.Int8PerChannelSpec(symmetric=True, ch_axis=0, is_dynamic=False, scale_type="float")
        inputs = q.Int8PerTensorSpec(observer_method="min_max", symmetric=True, is_dynamic=False, scale_type="float")
        return q.QLayerConfig(weight=weights.to_quantization_spec(), input_tensors=inputs.to_quantization_spec())
    raise NotSupported(f"no scheme with one scale per token (wanted: {job.activation})")


def run(job: Job, clock: Clock) -> Any:
    with clock("import"):
        from quark.torch import LLMTemplate, ModelQuantizer
        from torch.utils.data import DataLoader
    name = "nvfp4"
    if job.weight == "int":
        name = "wanted"
        LLMTemplate.register_scheme(name, scheme(job))
    config = LLMTemplate.get("llama").get_config(name, ALGORITHMS[job.method], exclude_layers=["lm_head"])
    model = job.load_model()
    with clock("quantize"):
        quantizer = ModelQuantizer(config)
        model = quantizer.quantize_model(model, DataLoader(list(job.tokens()), batch_size=job.batch))
        return quantizer.freeze(model)


if __name__ == "__main__":
    serve(run, "amd-quark")
