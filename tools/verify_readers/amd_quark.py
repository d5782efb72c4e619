"""Whether amd-quark reads what Detent writes in its layout, and Detent what amd-quark would compute.

    python tools/verify_readers/amd_quark.py [scheme ...]

To be run in an environment that has Detent and amd-quark 0.13. A small Llama is quantized by each scheme and written
with custom_mode quark; amd-quark loads the folder and runs it, and its logits are compared with those of the model that
Detent reads from it. Exit code 1 says that a pair of logits differs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from detent.checkpoints import LayerCheckpoint, ModelFormats, QuantizedWriter, Source, wanted_layouts
from detent.checkpoints.records import Activation, exported_format
from detent.config import parse_scheme
from detent.formats import Format, Scales, encode, scales_from_range
from detent.runs.load import load_quantized

SCHEMES = (
    "w_int4_per_group_sym",
    "w_int4_per_group_asym",
    "w_uint4_per_group_asym",
    "w_uint4_per_group_sym",
    "w_int4_per_channel_sym",
    "w_uint4_per_channel_asym",
    "w_int8_per_group_sym",
    "w_int8_a_int8_per_tensor_sym",
    "w_uint8_a_uint8_per_tensor_asym",
    "w_fp8_a_fp8",
    "w_fp8_a_fp8_o_fp8",
    "ptpc_fp8",
    "w_mxfp4_a_mxfp4",
    "w_mxfp6_e3m2_a_mxfp6_e2m3",
    "w_mxfp4_a_fp8_per_tensor",
    "nvfp4",
    "amdfp4",
    "int4_fp8",
)
#: Both multiply the same float32 numbers; the order of sums may differ.
TOLERANCE = 1e-5


def rows() -> list[harness.Row]:
    """For `make verify-readers`: this script in amd-quark's environment."""
    python = harness.ENVIRONMENTS / "amd_quark" / "bin" / "python"
    told = subprocess.run([python, __file__], capture_output=True, text=True, check=False)
    found = re.findall(r"^(\w+) +(\w+) +logits differ by (\S+)$", told.stdout, re.MULTILINE)
    made = [
        harness.Row(f"quark, {method}", scheme, "amd-quark 0.13", float(difference), TOLERANCE, "relative")
        for scheme, method, difference in found
    ]
    if len(made) < len(SCHEMES):
        made.append(harness.Row("quark", "the rest", "amd-quark 0.13", None, TOLERANCE, told.stderr[-500:]))
    return made


def main() -> int:
    logging.disable(logging.WARNING)
    failed = 0
    for scheme in sys.argv[1:] or SCHEMES:
        for method in ("reorder", "order") if "int4" in scheme else ("reorder",):
            difference = compare(scheme, method)
            failed += not difference <= TOLERANCE
            print(f"{scheme:40} {method:8} logits differ by {difference:.3g}", flush=True)
    return 1 if failed else 0


def compare(scheme: str, method: str) -> float:
    """The relative difference of logits between the two readers of what Detent writes."""
    from quark.torch import import_model_from_safetensors

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        write(source, out, scheme, method)
        tokens = torch.arange(1, 13).reshape(1, 12) * 7 % 96
        model = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager")
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = import_model_from_safetensors(model, str(out))(tokens).logits
            ours = load_quantized(out)(tokens).logits
    return float((theirs - ours).norm() / ours.norm())


def write(source: Path, out: Path, scheme: str, method: str) -> None:
    """A small Llama, and what `scheme` makes of it; activations have ranges that calibration might have found."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(source)
    parsed, opened = parse_scheme(scheme), Source(source)
    records = []
    for name in opened:
        if name.endswith("_proj.weight") and parsed.weight is not None:
            weight = opened.tensor(name)
            q = encode(weight, parsed.weight, name=name)
            sides = [activation(parsed.input), activation(parsed.output)]
            records.append(LayerCheckpoint(name.removesuffix(".weight"), tuple(weight.shape), q, *sides))
    formats = ModelFormats({record.name: record.formats for record in records}, ignored=("lm_head",))
    (layout,) = wanted_layouts("hf_format", "quark", pack_method=method)
    with QuantizedWriter(out, source=opened, formats=formats, layout=layout) as writer:
        for record in records:
            writer.add_layer(record)
        for name in opened:
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, opened.tensor(name))
        writer.finish()


def activation(fmt: Format | None) -> Activation | None:
    if fmt is None:
        return None
    fmt = exported_format(fmt)
    scales: Any = None
    if fmt.has_outer_scale and not fmt.dynamic:
        scales = Scales(torch.empty(0, dtype=fmt.scale.stored_dtype), outer_scale=torch.tensor(4 / (6 * 448)))
    elif not fmt.dynamic:
        scales = scales_from_range(fmt, torch.tensor(-3.5), torch.tensor(4.0))
    return Activation(fmt, scales)


if __name__ == "__main__":
    sys.exit(main())
