"""mlx-lm, on MLX's package for the CPU.

It loads the checkpoint and MLX decodes each layer, in float32: its products of a bfloat16 model round to bfloat16, in
an order that depends on the kernel. A last row has these, under a limit of their size.
"""

from __future__ import annotations

from typing import Any

from harness import Row, compare, export

READER = "mlx-lm 0.32.2"
#: The same float32 numbers in another order of sums: 2^-24 of logits up to 20, in each of a few dozen steps.
LIMIT = 1e-4
SCHEMES = (
    *((f"w_int{bits}_per_group_sym", ("--group_size", "64")) for bits in (2, 3, 4, 5, 6, 8)),
    ("w_int4_per_group_asym", ("--group_size", "32", "--group_size_per_layer", "*down_proj", "128")),
    ("w_int4_per_group_sym", ("--group_size", "64", "--quant_algo", "gptq")),
    ("w_mxfp4", ()),
    ("w_mxfp8", ()),
)


def rows() -> list[Row]:
    found = []
    for scheme, flags in SCHEMES:
        with export(scheme, "--model_export", "mlx", *flags) as folder:
            found.append(compare(__file__, folder, "mlx", " ".join([scheme, *flags]), READER, limit=LIMIT))
    return found


def logits(folder: str, tokens: list[int]) -> Any:
    from pathlib import Path

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    plain = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            scales, biases = layer.scales, layer.get("biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            weight = mx.dequantize(
                layer.weight, scales, biases, layer.group_size, layer.bits, layer.mode, dtype=mx.float32
            )
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = weight
            plain.append((name, linear))
    assert plain
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(plain))
    model.update(tree_map(lambda value: value.astype(mx.float32), model.parameters()))
    return model(mx.array([tokens]))[0].tolist()
