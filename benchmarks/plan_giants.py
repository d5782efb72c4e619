"""Seconds that `detent plan` takes for published shapes of giants, from their config.json alone.

::

    python benchmarks/plan_giants.py [--giant llama-3.1-405b] [--blocks N] [--profile]

Each plan is made in a process of its own; what importing PyTorch and transformers costs isn't counted. Processor time
says more than time on a machine that others use.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

GIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-3.1-405b": (
        "llama",
        "LlamaForCausalLM",
        {
            "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8,
            "topk_group": 4,
        },
    ),
}  # fmt: skip


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def plan(giant: str, blocks: int | None, profiled: bool) -> None:
    import transformers.modeling_utils
    from transformers import AutoConfig

    import detent

    assert transformers.modeling_utils  # what a plan imports in any case
    kind, architecture, values = GIANTS[giant]
    config = AutoConfig.for_model(kind, **values, dtype="bfloat16", architectures=[architecture])
    if blocks is not None:
        config.num_hidden_layers = blocks
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        make, scheme = detent.plan_checkpoint, detent.SchemeOptions("w_fp8_a_fp8", group_size=None)
        profile = cProfile.Profile()
        began, cpu = time.monotonic(), processor_seconds()
        if profiled:
            report = profile.runcall(make, detent.ModelOptions(model_dir=folder), scheme)
        else:
            report = make(detent.ModelOptions(model_dir=folder), scheme)
        print(
            f"{giant:16} {report.weights.quantized:6} weights {processor_seconds() - cpu:7.1f} s cpu"
            f" {time.monotonic() - began:7.1f} s",
            flush=True,
        )
    if profiled:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--giant", choices=GIANTS)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    if options.giant is not None:
        plan(options.giant, options.blocks, options.profile)
        return
    for giant in GIANTS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--giant", giant], check=True)


if __name__ == "__main__":
    main()
