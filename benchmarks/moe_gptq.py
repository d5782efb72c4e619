"""GPTQ of a random mixture of experts over GPTQ of a dense model with as many weights and as many tokens a weight.

The mixture has blocks of 64 experts of about a million weights each, of which every token goes to 8; the dense model is
a Llama of the same depth with as many weights, and gets an eighth of the tokens, so that the mean weight of either has
seen as many. Both are quantized in memory to 4 bits in groups of 128, in turns, and the least processor time counts::

    python benchmarks/moe_gptq.py [--layers 8] [--tokens 16384] [--rounds 2] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import time
from contextlib import nullcontext
from typing import Any

import torch

import detent

WIDTH, INNER, EXPERTS, CHOSEN = 512, 640, 64, 8
DENSE_WIDTH, SAMPLE, VOCABULARY = 2048, 512, 1024


def mixture(layers: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=VOCABULARY,
    )


def dense(layers: int) -> Any:
    """As many weights in each block."""
    from transformers import LlamaConfig

    weights = 4 * WIDTH * WIDTH + 3 * EXPERTS * WIDTH * INNER
    inner = round((weights - 4 * DENSE_WIDTH**2) / (3 * DENSE_WIDTH) / 128) * 128
    return LlamaConfig(
        hidden_size=DENSE_WIDTH,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
    )


def run(config: Any, tokens: int) -> tuple[float, float, int]:
    """(processor seconds, seconds, quantized weights) of GPTQ alone, on a model that is in memory."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    batches = torch.randint(0, VOCABULARY, (max(1, tokens // SAMPLE), 1, min(SAMPLE, tokens)))
    settings = {
        "quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}}, "*lm_head*": {"enable": False}}
        | {"*input_quantizer": {"enable": False}, "*gate.*": {"enable": False}, "default": {"enable": False}},
        "algorithm": "gptq",
    }

    def feed(net: Any) -> None:
        for ids in batches:
            net(input_ids=ids, use_cache=False)

    began, cpu = time.monotonic(), processor_seconds()
    detent.quantize(model, settings, feed)
    return processor_seconds() - cpu, time.monotonic() - began, sum(p.numel() for p in model.model.layers.parameters())


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="that the mixture is calibrated on")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="show where the time of the mixture goes, once")
    options = parser.parse_args()
    jobs = {
        "mixture": (mixture(options.layers), options.tokens),
        "dense": (dense(options.layers), options.tokens * CHOSEN // EXPERTS),
    }
    if options.profile:
        with cProfile.Profile() if options.profile else nullcontext() as profile:
            run(*jobs["mixture"])
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    best: dict[str, tuple[float, float, int]] = {}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            best[name] = min(run(*job), best.get(name, (1e9, 1e9, 0)))
    for name, (cpu, wall, weights) in best.items():
        print(f"{name:8} {weights / 1e6:6.1f} M weights {jobs[name][1]:6} tokens {cpu:7.1f} s cpu {wall:7.1f} s")
    print(f"mixture over dense: {best['mixture'][0] / best['dense'][0]:.2f} in processor time")


if __name__ == "__main__":
    main()
