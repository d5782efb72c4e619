"""GPTQModel, which reads the layouts of GPTQ and AutoAWQ, on the CPU.

It loads the checkpoint and decodes each layer with its own functions, in float32; its kernels would round to float16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import Row, compare, export

READER = "GPTQModel 7.7"
#: The same float32 numbers in another order of sums: 2^-24 of logits up to 20, in each of a few dozen steps.
LIMIT = 1e-4
SCHEMES = (
    ("w_int4_per_group_sym", ()),
    ("w_int4_per_group_asym", ()),
    ("w_uint4_per_group_asym", ("--quant_algo", "awq")),
    ("w_int4_per_channel_sym", ()),
)
MORE = (
    ("w_int2_per_group_asym", ()),
    ("w_int3_per_group_asym", ()),
    ("w_int8_per_group_sym", ()),
    ("w_int4_per_group_sym", ("--gptq_version", "2")),
    ("w_int4_per_group_sym", ("--quant_algo", "gptq")),
    ("w_int4_per_group_sym", ("--group_size_per_layer", "*down_proj", "64")),
)


def rows() -> list[Row]:
    found = []
    for name, schemes in (("awq", SCHEMES), ("gptq", SCHEMES + MORE)):
        for scheme, flags in schemes:
            with export(scheme, "--model_export", name, *flags) as folder:
                what = " ".join([scheme, *flags])
                found.append(compare(__file__, folder, name, what, READER, limit=LIMIT))
    return found


def logits(folder: str, tokens: list[int]) -> Any:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    gptq = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    backend = BACKEND.GPTQ_TORCH if gptq else BACKEND.AWQ_TORCH
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model.float()
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "qweight"):
            if gptq:
                weight = layer.dequantize_weight()
            else:
                weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
            assert weight.dtype == torch.float32
            plain = torch.nn.Linear(*weight.shape, bias=False)
            plain.weight.data = weight.T
            model.set_submodule(name, plain)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]
