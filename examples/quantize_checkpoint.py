"""Quantize a checkpoint folder from Python, as `detent quantize` does, and look at the report.

python examples/quantize_checkpoint.py [MODEL_DIR] [OUTPUT_DIR]
"""

from __future__ import annotations

import sys

from detent import EvaluationOptions, ModelOptions, SchemeOptions, quantize_checkpoint

model_dir = sys.argv[1] if len(sys.argv) > 1 else None  # None: the sample model
output_dir = sys.argv[2] if len(sys.argv) > 2 else "quantized"

report = quantize_checkpoint(
    ModelOptions(model_dir),
    SchemeOptions("w_int4_per_group_sym", group_size=64),
    output_dir,
    evaluation=EvaluationOptions(windows=4),
)
assert report.perplexity is not None
print(f"perplexity {report.perplexity.before:.3f} -> {report.perplexity.after:.3f}")
for layer in sorted(report.layers, key=lambda layer: -(layer.relative_error or 0))[:3]:
    print(f"{layer.name}: {layer.format}, error {layer.relative_error:.2%}")
