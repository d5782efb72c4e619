"""What the sample model's card says: measurements of a saved model folder, and the text around them."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

WINDOW = 512  # tokens


@dataclass
class Run:
    """What happened so far."""

    threads: int
    tokens_per_step: int
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # minutes, tokens, held-out loss


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, length: int = WINDOW) -> float:
    """exp of the mean next-token loss over consecutive windows of `length` tokens (int64 vector `ids`), no overlap.

    The last window may be shorter. Every window is seen on its own, so the first token of each is given, not scored.
    """
    total, count = 0.0, 0
    for window in ids.split(length):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None]).logits[0].float()
        total += nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int, group: int = 128) -> None:
    """Round every linear weight except the output head in place: symmetric, groups along the input, scale amax/half."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            groups = module.weight.data.reshape(module.out_features, -1, group)
            scale = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
            module.weight.data = ((groups / scale).round().clamp(low, high) * scale).reshape(module.weight.shape)


def rounded_perplexities(folder: Path, texts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Perplexity of the saved model on each text: as stored, and rounded to nearest in 8, 4 and 3 bits."""
    results: dict[str, dict[str, float]] = {name: {} for name in texts}
    for label, bits in (("bfloat16 weights", None), ("8 bits", 8), ("4 bits", 4), ("3 bits", 3)):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if bits is not None:
            round_weights(model, bits)
        for name, ids in texts.items():
            results[name][label] = perplexity(model, ids)
    return results


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@dataclass
class Card:
    """Measures a saved folder and describes it."""

    run: Run
    trained: list[str]  # names of books
    held_out: dict[str, Tensor]  # name of a book: its tokens
    train_tokens: int
    evaluation: Path  # the built-in evaluation text, left out while it does not exist
    tokenizer: Tokenizer
    parameters: int
    sample: int = 8192  # how many tokens of each held-out novel are scored

    def texts(self) -> dict[str, Tensor]:
        """Name and tokens of everything that perplexity is measured on."""
        held_out = {f"held-out novel {name}": ids[: self.sample] for name, ids in self.held_out.items()}
        if not self.evaluation.is_file():
            return held_out
        ids = self.tokenizer.encode(self.evaluation.read_text(encoding="utf-8")).ids
        return {"built-in evaluation text": torch.tensor(ids), **held_out}

    def write(self, folder: Path) -> None:
        """Write ``README.md`` into the folder of a saved model."""
        results = rounded_perplexities(folder, self.texts())
        (folder / "README.md").write_text(self.describe(results, folder_size(folder)), encoding="utf-8")

    def describe(self, results: dict[str, dict[str, float]], size: int) -> str:
        """The card's text; `results` as from `rounded_perplexities`, `size` in bytes."""
        run, labels = self.run, list(next(iter(results.values())))
        training = (
            f"{run.seconds / 60:.0f} minutes on {run.threads} thread{'s' if run.threads > 1 else ''} of a shared CPU, "
            f"bfloat16 autocast; {run.steps} steps of {run.tokens_per_step} tokens, {run.tokens / 1e6:.1f} million "
            f"tokens in all ({run.tokens / self.train_tokens:.1f} times the training text). {RECIPE}"
        )
        corpus = (
            f"Made by `tools/train_sample_model.py` on {len(self.trained)} English novels, "
            f"{self.train_tokens / 1e6:.2f} million tokens: {', '.join(self.trained)}. "
            f"Kept out of training entirely, tokenizer included: {', '.join(self.held_out)}."
        )
        return TEMPLATE.format(
            parameters=self.parameters,
            size=size / 1e6,
            corpus=textwrap.fill(corpus, 118, break_on_hyphens=False),
            training=textwrap.fill(training, 118, break_on_hyphens=False),
            curve="\n".join(f"| {m:.1f} | {t / 1e6:.2f} | {loss:.3f} |" for m, t, loss in thinned(run.curve)),
            head="| text | " + " | ".join(labels) + " |",
            rule="|---|" + "---|" * len(labels),
            rows="\n".join(
                f"| {name} | " + " | ".join(f"{row[label]:.3f}" for label in labels) + " |"
                for name, row in results.items()
            ),
            sample=self.sample,
        )


def thinned(curve: list[tuple[float, int, float]], most: int = 12) -> list[tuple[float, int, float]]:
    """About `most` points, evenly spaced in time, the first and the last among them."""
    step = max(1, math.ceil((len(curve) - 1) / most))
    return [*curve[:-1:step], *curve[-1:]]


RECIPE = (
    "Muon for the matrices of the blocks and AdamW for the rest; sequences of 512 tokens, then of 1024; a learning "
    "rate that falls linearly over the last 55 %; the stored weights are an exponential moving average over about "
    "the last hundred steps."
)

TEMPLATE = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Detent's sample model

A very small Llama, trained from nothing so that Detent can be tried, tested and demonstrated without a network. It
writes sentences that look like those of an old novel and knows nothing else. It is of no use as an assistant.

- Architecture: `LlamaForCausalLM`, {parameters:,} parameters; hidden 256, intermediate 512, 4 layers, 4 query heads and
  2 key-value heads of 64, embeddings tied to the output head, context 1024
- Tokenizer: byte-level BPE, 2048 tokens
- Stored as bfloat16 safetensors; {size:.2f} MB without this card
- Licence: Apache-2.0, as the rest of Detent. The novels were published between 1847 and 1917

## Training

{corpus}

{training}

Loss on the held-out novels (mean over a fixed sample, natural logarithm per token):

| minutes | million tokens | loss |
|---|---|---|
{curve}

## Perplexity

Measured in float32 on consecutive windows of 512 tokens, without overlap, the first token of each window not scored;
of each held-out novel the first {sample} tokens. The columns after the first round every linear weight but that of the
output head to nearest: symmetric, groups of 128, scale amax / ((2^bits - 1) / 2), no calibration.

{head}
{rule}
{rows}

Perplexity is per token of this tokenizer and cannot be compared with that of models with another one.
"""
