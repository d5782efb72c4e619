"""Perplexity of the sample model's exports, in vLLM on the CPU and in Detent, over the same windows of tokens.

Left out, because vLLM computes something else or nothing on a CPU: calibrated int8 inputs (its kernel makes scales of
its own), NVFP4 and MX.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What is exported; None is the model as it is, which shows how far apart the two are without any quantization.
SCHEMES = (
    None,
    "w_int4_per_group_sym",
    "w_int4_per_group_asym",
    "w_int8_a_int8_per_token_dynamic",
    "w_fp8_per_channel_static_a_fp8_per_token_dynamic",
)
#: Both compute in bfloat16, whose 8 bits round each intermediate result by up to 0.4 %, in another order; that moved
#: these perplexities by up to half a percent. What a reader can get wrong moves them by far more: the least of it, one
#: of q, k and v under its neighbour's scale, or zero points off by one.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Row:
    """The perplexities of one export, and whose kernel multiplied in vLLM."""

    scheme: str
    detent: float
    vllm: float
    kernel: str


def compare(scratch: Path) -> Iterator[Row]:
    """Export, and measure on both sides, each in a process of its own."""
    from detent.data.builtin import sample_model_dir

    for scheme in SCHEMES:
        folder = sample_model_dir() if scheme is None else scratch / scheme
        if scheme is not None:
            _run("-m", "detent", "quantize", "--quant_scheme", scheme, "--output_dir", str(folder), "--skip_evaluation")
        ours = json.loads(_run("-m", "detent", "evaluate", str(folder), "--eval_dataset", "builtin", "--json"))
        window, tokens = ours["evaluation"]["window"], ours["evaluation"]["tokens"]
        theirs = json.loads(_run(__file__, str(folder), str(window)).splitlines()[-1])
        if theirs["tokens"] != tokens:
            raise SystemExit(f"{scheme}: {theirs['tokens']} tokens were predicted in vLLM, {tokens} in Detent")
        measured = ours["perplexity"]["before" if scheme is None else "after"]
        yield Row(scheme or "(not quantized)", measured, theirs["perplexity"], theirs["kernel"])


def _run(*arguments: str) -> str:
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr[-4000:]}")
    return process.stdout


def measure(folder: str, window: int) -> dict[str, float | int | str]:
    """The perplexity of a checkpoint in vLLM, from the log-probabilities of its prompts."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from detent.data.builtin import builtin_text
    from detent.evaluation import evaluation_ids

    kernel = _plain_int4_kernel()
    ids = evaluation_ids(builtin_text("evaluation"), AutoTokenizer.from_pretrained(folder)).tolist()
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [tokens for tokens in windows if len(tokens) > 1]
    # One place more than a window, since vLLM always generates a token.
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=window + 1, skip_tokenizer_init=True)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in windows], sampling, use_tqdm=False)
    nll, count = 0.0, 0
    for tokens, output in zip(windows, outputs, strict=True):
        for token, found in zip(tokens[1:], output.prompt_logprobs[1:], strict=True):
            nll -= found[token].logprob
            count += 1
    return {"perplexity": math.exp(nll / count), "tokens": count, "kernel": kernel}


def _plain_int4_kernel() -> str:
    """vLLM's int4 kernel needs AVX-512. On other processors, multiply by what vLLM loaded, unpacked by its function."""
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32 as unpack

    if torch.cpu._is_avx512_supported():
        return "vLLM's"

    def prepare(kernel: CPUWNA16LinearKernel, layer: torch.nn.Module) -> None:
        kind, scale = kernel.config.weight_type, layer.weight_scale.float()
        codes = unpack(layer.weight_packed.data, kind, 1)
        group = codes.shape[1] // scale.shape[1]
        offset = torch.full_like(scale, kind.bias)
        if kernel.config.zero_points:
            offset = unpack(layer.weight_zero_point.data, kind, 0)
        weight = (codes - offset.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
        layer.plain_weight = weight.to(layer.weight_scale.dtype)

    def apply(
        kernel: CPUWNA16LinearKernel, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain_weight, bias)

    CPUWNA16LinearKernel.process_weights_after_loading = prepare
    CPUWNA16LinearKernel.apply_weights = apply
    return "vLLM's (int4: a plain product, for want of AVX-512)"


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
