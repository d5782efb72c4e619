"""Runs killed at random moments (SIGKILL), resumed until they end, and compared byte for byte with a run in one go.

::

    python benchmarks/kill_proof.py [--kills 40] [--seed 0] [--case NAME]

Each attempt is a forked process, so that libraries are loaded once. Data-free runs get small files, so that there is
something to resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

CASES = {
    "GPTQ INT4": ("--quant_scheme", "w_int4_per_group_sym", "--group_size", "32", "--quant_algo", "gptq"),
    "AWQ INT4": ("--quant_scheme", "w_int4_per_group_sym", "--group_size", "32", "--quant_algo", "awq"),
    "RTN FP8, static": ("--quant_scheme", "w_fp8_a_fp8", "--kv_cache_dtype", "fp8"),
    "RTN MXFP4, data-free": ("--quant_scheme", "w_mxfp4"),
}
BLOCKS = 12


def make_model(folder: Path) -> None:
    """A random Llama of 12 blocks with the sample model's tokenizer, and texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from detent.data import sample_model_dir

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in Path(sample_model_dir()).glob("*token*"):
        shutil.copy(path, folder)
    words = ["one", "little", "girl", "found", "a", "red", "ball", "and", "went", "home"]
    chosen = random.Random(0)
    texts = [" ".join(chosen.choices(words, k=80)) for _ in range(16)]
    (folder / "texts.json").write_text(json.dumps(texts))


def attempt(arguments: list[str], seconds: float | None) -> tuple[int | None, float]:
    """(exit code, or None if it was killed after `seconds`; how long it took)."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        from detent.cli.app import run

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(run(arguments))
    while seconds is None or time.monotonic() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, time.monotonic() - began


def digests(folder: Path) -> dict[str, str]:
    """Of the files that don't say how long a run took."""
    timed = ("detent_report.json", "detent_manifest.json")
    files = [path for path in sorted(folder.iterdir()) if path.name not in timed]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--kills", type=int, default=40, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import detent.runs.quantize
    import detent.runs.write

    detent.runs.write.SHARD_SIZE = 200_000
    chosen = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        make_model(model)
        for case in options.case or CASES:
            flags = CASES[case]
            command = ["quantize", "--model_dir", str(model), "--output_dir", str(out), *flags, "--device", "cpu"]
            command += ["--dataset", str(model / "texts.json"), "--seq_len", "64", "--num_calib_data", "16"]
            command += ["--skip_evaluation"]
            code, whole = attempt(command, None)
            assert code == 0, case
            wanted = digests(out)
            shutil.rmtree(out)
            kills = runs = resumed = 0
            while kills < options.kills:
                runs += 1
                code, resume = None, []
                while code is None:
                    patience = chosen.uniform(0, whole * 1.1)
                    code, _ = attempt([*command, *resume], patience if kills < options.kills else None)
                    kills += code is None
                    journal = out.parent / f".{out.name}.journal"
                    resume = ["--resume"]
                    resumed += code is None and any(journal.glob("*-*"))
                    if code is None and out.exists() and not journal.exists():
                        code = 0  # killed when there was nothing left to do but to print
                assert code == 0, (case, code)
                assert digests(out) == wanted, f"{case}: other bytes"
                left = [path.name for path in out.parent.iterdir() if path not in (model, out)]
                assert not left, left
                shutil.rmtree(out)
            print(
                f"{case}: {kills} kills in {runs} runs, {resumed} with something to go on from; all ended with the"
                f" bytes of a run in one go ({whole:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
