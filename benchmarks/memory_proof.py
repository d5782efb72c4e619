"""A checkpoint of many gigabytes, quantized in a few: each run is a process that may not hold more than the limit.

::

    python benchmarks/memory_proof.py [--gigabytes 16] [--limit 4] [--experts 8] [--case "FP8"] [--keep FOLDER]

The limit is a memory control group where one can be made, which counts pages of files too (the system drops those
when they are in the way), or else RLIMIT_DATA, which counts private memory that can be written, used or not. The
model is a random Llama in float32 (or a Mixtral, with ``--experts``), calibrated on a few short samples: memory doesn't
depend on how much each block is shown, but for hidden states, which have a line of their own in the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CASES = {
    "RTN FP8": ("--quant_scheme", "w_fp8_a_fp8"),
    "AWQ INT4": ("--quant_scheme", "w_int4_per_group_sym", "--quant_algo", "awq"),
    "GPTQ INT4": ("--quant_scheme", "w_int4_per_group_sym", "--quant_algo", "gptq"),
}
WIDTH, INNER, VOCABULARY = 2048, 5632, 32000
SAMPLES, LENGTH = 8, 64
GROUPS = Path("/sys/fs/cgroup")


def make_checkpoint(folder: Path, gigabytes: float, experts: int) -> None:
    """Random weights in float32; each shard is a block, and all blocks hold the same numbers, which costs no memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shapes = {f"self_attn.{side}_proj.weight": (WIDTH, WIDTH) for side in "qkvo"}
    if experts:
        shapes["block_sparse_moe.gate.weight"] = (experts, WIDTH)
        for expert in range(experts):
            for name, shape in (("w1", (INNER, WIDTH)), ("w2", (WIDTH, INNER)), ("w3", (INNER, WIDTH))):
                shapes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    else:
        shapes |= {"mlp.gate_proj.weight": (INNER, WIDTH), "mlp.up_proj.weight": (INNER, WIDTH)}
        shapes["mlp.down_proj.weight"] = (WIDTH, INNER)
    block = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    block |= {f"{side}_layernorm.weight": torch.ones(WIDTH) for side in ("input", "post_attention")}
    nbytes = sum(t.numel() * 4 for t in block.values())
    blocks = max(2, round((gigabytes * 1e9 - 2 * VOCABULARY * WIDTH * 4) / nbytes))
    common = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCABULARY, "dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    config = MixtralConfig(**common, num_local_experts=experts) if experts else LlamaConfig(**common)
    config.architectures = ["MixtralForCausalLM" if experts else "LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weight_map = {}

    def shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(blocks):
        shard(f"model-{index:05}.safetensors", {f"model.layers.{index}.{name}": t for name, t in block.items()})
    outside = {name: torch.randn(VOCABULARY, WIDTH) * 0.02 for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shard("model-outside.safetensors", {**outside, "model.norm.weight": torch.ones(WIDTH)})
    index_file = {"metadata": {"total_size": blocks * nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i + 1 for i in range(999)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    texts = [" ".join(f"w{i}" for i in torch.randint(0, 999, (LENGTH,), generator=generator)) for _ in range(SAMPLES)]
    (folder / "texts.json").write_text(json.dumps(texts))


def limited(limit: int) -> tuple[str, Callable[[], None], Callable[[], str]]:
    """(what limits a process, what makes it do so inside the process, what it has counted afterwards)."""
    for root, name in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        group = root / f"detent-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if not (group / name).exists():
                group.rmdir()
                continue
            (group / name).write_text(str(limit))

            def enter(group: Path = group) -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

            def counted(group: Path = group) -> str:
                group.rmdir()
                return ""

            return f"control group, {name}", enter, counted
    return "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), lambda: ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--limit", type=float, default=4, help="GiB")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--keep", type=Path, help="a folder for the checkpoint, made once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = (options.keep or Path(scratch)) / f"{'mixtral' if options.experts else 'llama'}-{options.gigabytes:g}"
        if not model.exists():
            make_checkpoint(model, options.gigabytes, options.experts)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{model.name}: {size / 1e9:.2f} GB, limit {options.limit:g} GiB", flush=True)
        for case in options.case or CASES:
            how, enter, leave = limited(int(options.limit * 2**30))
            out = Path(scratch) / "out"
            command = [sys.executable, "-m", "detent", "quantize", "--model_dir", str(model), "--output_dir", str(out)]
            command += [
                *CASES[case],
                "--dataset",
                str(model / "texts.json"),
                "--seq_len",
                str(LENGTH),
                "--device",
                "cpu",
            ]
            command += ["--num_calib_data", str(SAMPLES), "--skip_evaluation", "--overwrite"]
            began = time.monotonic()
            done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True)  # noqa: PLW1509
            seconds = time.monotonic() - began
            leave()
            if done.returncode:
                print(f"{case}: exit code {done.returncode}\n{done.stderr[-2000:]}", flush=True)
                continue
            report = json.loads((out / "detent_report.json").read_text())
            print(
                f"{case}: {report['weights']['quantized']} weights in {seconds:.0f} s;"
                f" peak anonymous memory {report['peak_anonymous_memory_bytes'] / 2**30:.2f} GiB ({how})",
                flush=True,
            )


if __name__ == "__main__":
    main()
