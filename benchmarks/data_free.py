"""Processor time of data-free quantization of a checkpoint in three shards, over that of ``cp`` of the same bytes.

Everything is a process of its own, in turns; the least of the rounds counts. What the libraries cost to import is
measured apart and subtracted in the ratio, since it doesn't grow with the checkpoint::

    python benchmarks/data_free.py [--gigabytes 1] [--rounds 3] [--peer PYTHON]

With ``--sample`` it measures `detent quantize` on the built-in sample model, over the import of torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SCHEMES = ("w_fp8_per_channel_static_a_fp8_per_token_dynamic", "w_int4_per_group_sym", "w_mxfp4")
IMPORTS = "import torch, transformers, transformers.modeling_utils, transformers.models.llama.modeling_llama"
SHARDS = 3
#: The same work by llm-compressor's path that loads no model: FP8 per channel, dynamic per token; INT4 has none there.
LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_DYNAMIC", ignore=["lm_head"],
               max_workers=1, device="cpu")
"""


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A random Llama in bfloat16, its tokenizer left out."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    width, vocabulary = 2048, 16384
    a_block = 4 * width * width + 3 * width * 4 * width
    blocks = max(3, round((gigabytes * 5e8 - 2 * vocabulary * width) / a_block))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    names = [(name, p.shape) for name, p in model.named_parameters()]
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16) * 0.02
            for name, shape in part
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def run(command: list[str], **options: object) -> tuple[float, float, int]:
    """(processor seconds, seconds, peak bytes) of a process and its children."""
    import time

    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text.decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start, usage.ru_maxrss * 1024


def detent(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "detent", "quantize", "--overwrite", "--device", "cpu", *arguments]


def compare(gigabytes: float, rounds: int, work: Path, peer: str | None) -> None:
    source, target = work / "source", work / "target"
    make_checkpoint(source, gigabytes)
    size = sum(path.stat().st_size for path in source.iterdir())
    jobs = {"cp": ["cp", "-r", str(source), str(target)], "imports": [sys.executable, "-c", IMPORTS]}
    for scheme in SCHEMES:
        jobs[scheme] = detent(
            "--model_dir", str(source), "--quant_scheme", scheme, "--output_dir", str(target), "--skip_evaluation"
        )
    if peer:
        jobs["llm-compressor model_free_ptq FP8_DYNAMIC"] = [peer, "-c", LLM_COMPRESSOR, str(source), str(target)]
        jobs["imports of llm-compressor"] = [peer, "-c", "from llmcompressor import model_free_ptq"]
    best: dict[str, tuple[float, float, int]] = {}
    for _ in range(rounds):
        for name, command in jobs.items():
            shutil.rmtree(target, ignore_errors=True)
            best[name] = min(run(command), best.get(name, (1e9, 1e9, 0)))
    cp, imports = best["cp"][0], best["imports"][0]
    print(f"{size / 1e9:.2f} GB in {SHARDS} shards; least processor time of {rounds} rounds")
    for name, (cpu, wall, peak) in best.items():
        own = cpu - (best["imports of llm-compressor"][0] if name.startswith("llm-") else imports)
        ratio = "" if name.startswith(("cp", "imports")) else f"  {own / cp:6.1f} times cp beyond the imports"
        print(f"{name:60} {cpu:7.2f} s cpu {wall:7.2f} s {peak / 1e9:5.2f} GB{ratio}")


def sample(rounds: int, work: Path) -> None:
    jobs = {
        "imports": [sys.executable, "-c", IMPORTS],
        "detent quantize, no evaluation": detent("--output_dir", str(work / "out"), "--skip_evaluation"),
    }
    best = {name: min(run(command)[:2] for _ in range(rounds)) for name, command in jobs.items()}
    for name, (cpu, wall) in best.items():
        print(f"{name:40} {cpu:6.2f} s cpu ({cpu / best['imports'][0]:.2f} times the imports) {wall:6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sample", action="store_true", help="the built-in sample model in place of a large checkpoint"
    )
    parser.add_argument("--peer", help="the Python of an environment in which llm-compressor is installed")
    parser.add_argument("--work", help="a folder for the checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.sample:
            sample(options.rounds, Path(folder))
        else:
            compare(options.gigabytes, options.rounds, Path(folder), options.peer)


if __name__ == "__main__":
    main()
