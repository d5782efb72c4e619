"""The models and tokens that everybody gets: written once to a folder, before anyone is run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.harness import perplexity
from safetensors.torch import save_file
from torch import Tensor, nn

#: Tokens in a calibration sequence and in an evaluation window, and the most calibration sequences.
LENGTH, SEQUENCES = 256, 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


@dataclass(frozen=True)
class Input:
    """A model with its tokens, on disk.

    Attributes:
        title: of its table.
        model: folder, float32.
        calibration: safetensors file, ``input_ids`` int64 [sequences, tokens].
        evaluation: the same; None where only time is measured.
        tokens: of calibration.
        group: weights per scale; it divides every width.
        facts: for the line above the table.
        float_perplexity: of the model as it is.
        only: the schemes that it is for; None for all.
    """

    title: str
    model: Path
    calibration: Path
    evaluation: Path | None
    tokens: int
    group: int
    facts: str
    float_perplexity: float = math.nan
    only: tuple[str, ...] | None = None


def accuracy_input(
    source: Path, folder: Path, calibration: Path, evaluation: Path, group: int | None, outliers: bool = False
) -> Input:
    """A trained Llama and texts for it: a ``.json`` list of documents, or running text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    group = group or (64 if model.config.hidden_size % 128 == 0 else 32)
    width = model.config.intermediate_size
    pad_mlp(model, group)
    if outliers:
        plant_outliers(model)
    model.save_pretrained(folder / "model")
    copy_tokenizer(source, folder / "model")
    seen = windows(tokenizer, calibration)[:SEQUENCES]
    unseen = windows(tokenizer, evaluation)
    padded = "" if width % group == 0 else f" (its MLP padded from {width} to {model.config.intermediate_size} neurons)"
    count = sum(parameter.numel() for parameter in model.parameters())
    return Input(
        title=source.name + (" with outlier channels" if outliers else ""),
        model=folder / "model",
        calibration=write_tokens(folder / "calibration.safetensors", seen),
        evaluation=write_tokens(folder / "evaluation.safetensors", unseen),
        tokens=seen.numel(),
        group=group,
        facts=(
            f"{count:,} parameters{padded}; {len(seen)} calibration sequences and {len(unseen)} evaluation windows of "
            f"{LENGTH} tokens; groups of {group}"
        ),
        float_perplexity=perplexity(model, unseen),
        only=("W4A4",) if outliers else None,
    )


def speed_input(folder: Path, tokenizer: Path, sequences: int = 16, small: bool = False) -> Input:
    """A random Llama of 4 layers and random tokens, 512 to a sequence. Some tools want a tokenizer, and use it not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, mlp = (128, 256) if small else (1024, 2816)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    copy_tokenizer(tokenizer, folder / "model")
    tokens = torch.randint(config.vocab_size, (sequences, 512))
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = f"{count:,} parameters, {sequences} sequences of 512 tokens, groups of 128, float32"
    calibration = write_tokens(folder / f"calibration-{sequences}.safetensors", tokens)
    return Input("random Llama", folder / "model", calibration, None, tokens.numel(), 128, facts)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def windows(tokenizer: Any, path: Path) -> Tensor:
    """Token windows [n, LENGTH]: of documents the beginning of each that is long enough, of running text all of it."""
    text = path.read_text(encoding="utf-8")
    documents = json.loads(text) if path.suffix == ".json" else [text]
    encoded = [torch.tensor(tokenizer(document, verbose=False)["input_ids"]) for document in documents]
    if path.suffix == ".json":
        rows = [ids[:LENGTH] for ids in encoded if len(ids) >= LENGTH]
    else:
        rows = [piece for piece in encoded[0].split(LENGTH) if len(piece) == LENGTH]
    if not rows:
        raise SystemExit(f"{path} has no {LENGTH} tokens in a row: give longer texts")
    return torch.stack(rows)


def pad_mlp(model: Any, multiple: int) -> None:
    """Give each MLP zero neurons until the group divides its width: the same function, and most peers demand it."""
    width = model.config.intermediate_size
    added = math.ceil(width / multiple) * multiple - width
    for layer in model.model.layers if added else ():
        rows, columns = (0, 0, 0, added), (0, added)
        for name, padding in (("gate_proj", rows), ("up_proj", rows), ("down_proj", columns)):
            linear = getattr(layer.mlp, name)
            linear.weight = nn.Parameter(nn.functional.pad(linear.weight.data, padding))
            linear.out_features, linear.in_features = linear.weight.shape
    model.config.intermediate_size = width + added


def plant_outliers(model: Any, channels: int = 4, factor: float = 30.0) -> None:
    """Make a few channels of each normalised stream larger, and the weights that read them smaller: the same function.

    Large models have such channels by themselves; small ones don't.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
            for norm, linears in zip((layer.input_layernorm, layer.post_attention_layernorm), readers, strict=True):
                norm.weight[:channels] *= factor
                for linear in linears:
                    linear.weight[:, :channels] /= factor


def write_tokens(path: Path, tokens: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": tokens.contiguous()}, path)
    return path
