"""Train the built-in sample model: a small Llama on plain-text novels, small enough to live in the repository.

    python tools/train_sample_model.py --texts DIR [--minutes 42] [--out src/detent/data/sample_model]

``DIR`` holds plain UTF-8 text files, one book each. The books named by ``--held-out`` are never trained on. The output
folder is a complete Hugging Face checkpoint (bfloat16 safetensors, tokenizer, model card) and is rewritten at every
``--save-every`` minutes, so a run that is stopped early still leaves a usable model.

The model exists to be quantized, so the script ends by measuring what rounding its weights to nearest does, and writes
that into the card together with what it was trained on and for how long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sample_model_card import Card, Run, folder_size, perplexity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "src" / "detent" / "data"
SIZE_LIMIT = 6_000_000  # bytes, the whole folder
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TOKENS_PER_STEP = 4096
# Shorter sequences first, because attention over them is cheaper; the full context comes last. Each pair: from which
# fraction of the run, and the sequence length from there on.
LENGTH_SCHEDULE = ((0.0, 512), (0.8, 1024))
WARMUP_STEPS, DECAY_FROM, FINAL_LR_FRACTION = 60, 0.45, 0.02
EMA_DECAY = 0.99
FINAL_SAMPLE = 65536  # how many tokens of each held-out novel the finished model is measured on


# ---------------------------------------------------------------------------------------------------------- the texts


def read_book(path: Path) -> str:
    """The book's paragraphs, each on one line, separated by a blank line (some sources wrap their lines)."""
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig").replace("\r", ""))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip()) + "\n"


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer, which can spell any text and so needs no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for text in texts for p in re.split(r"(?<=\n\n)", text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one int64 vector, each between its begin and end token."""
    end = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer.encode(text).ids)
        ids.append(end)
    return torch.tensor(ids)


def sample_batch(stream: Tensor, length: int, bos: int, generator: torch.Generator) -> Tensor:
    """Random windows ``[TOKENS_PER_STEP / length, length + 1]``; every other one starts with the begin token.

    Perplexity is measured on windows cut from a stream, where only the first one starts with the begin token, so the
    model has to be at home with both.
    """
    rows = TOKENS_PER_STEP // length
    starts = torch.randint(len(stream) - length - 1, (rows,), generator=generator)
    batch = torch.stack([stream[s : s + length + 1] for s in starts.tolist()])
    batch[::2, 0] = bos
    return batch


# ---------------------------------------------------------------------------------------------------------- the model


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Hidden 256, four layers, four heads of 64 that share two key-value heads: 2.9 million parameters."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what adds to the residual stream starts smaller
            parameter.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms, with comparable step sizes."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, fraction: float) -> float:
    """Linear warm-up over the first steps, a plateau, then a linear decay over the last part of the time."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, (1.0 - fraction) / (1.0 - DECAY_FROM))
    return warmup * max(FINAL_LR_FRACTION, decay)


# ------------------------------------------------------------------------------------------------------------ the run


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, in a form that transformers 4 and 5 and other engines read."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    path = folder / "tokenizer.json"  # without indentation: a third of the size
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, card: Card) -> None:
    """Write the model as a complete checkpoint folder, swapped into place at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".sample-model-") as scratch:
        folder = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(folder)
        write_tokenizer(tokenizer, folder)
        (folder / "model.safetensors").chmod(0o644)
        card.write(folder)
        if (size := folder_size(folder)) > SIZE_LIMIT:
            raise SystemExit(f"the model folder has {size} bytes; {SIZE_LIMIT} are allowed")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(folder, out)


@dataclass
class Corpus:
    """The books, split and tokenized."""

    tokenizer: Tokenizer
    trained: list[str]  # names of books
    stream: Tensor  # their tokens, int64, one after another
    held_out: dict[str, Tensor]  # name of a book: its tokens


def load_corpus(folder: Path, held_out: list[str], vocabulary: int) -> Corpus:
    """Read every book in `folder`, train the tokenizer on those that aren't held out, and tokenize all."""
    books = {path.stem: read_book(path) for path in sorted(folder.glob("*.txt"))}
    trained = [name for name in books if name not in held_out]
    if not trained or not set(held_out) <= set(books):
        raise SystemExit(f"{folder} must hold the held-out books {held_out} and others; it holds {sorted(books)}")
    texts = [books[name] for name in trained]
    tokenizer = train_tokenizer(texts, vocabulary)
    held = {name: torch.tensor(tokenizer.encode(books[name]).ids) for name in held_out}
    return Corpus(tokenizer, trained, token_stream(tokenizer, texts), held)


class Trainer:
    """The model with its optimizers and the running average of its weights, which is what is measured and stored."""

    def __init__(self, corpus: Corpus, rate: float, seed: int, compiled: bool) -> None:
        self.model = build_model(corpus.tokenizer)
        self.optimizers = build_optimizers(self.model, rate)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.loss_of = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of
        self.stream, self.bos = corpus.stream, corpus.tokenizer.token_to_id(BOS)
        self.generator = torch.Generator().manual_seed(seed)
        # A fixed sample from within each held-out book.
        self.probe = torch.cat([ids[8192:16384] for ids in corpus.held_out.values()])

    def _loss_of(self, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def step(self, number: int, length: int, rate: float) -> tuple[float, int]:
        """One update on sequences of `length` tokens: the loss before it, and how many tokens it learned from."""
        batch = sample_batch(self.stream, length, self.bos, self.generator)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = self.loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, number / (number + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return loss.item(), batch.numel() - len(batch)

    def averaged(self) -> LlamaForCausalLM:
        """A model of its own with the average weights."""
        model = LlamaForCausalLM(self.model.config).eval()
        model.load_state_dict(self.average, strict=False)  # the tied output head is not among the names
        model.tie_weights()
        return model

    def held_out_loss(self) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return math.log(perplexity(self.averaged(), self.probe))


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    if arguments.out.is_dir() and any(arguments.out.iterdir()) and not (arguments.out / "config.json").is_file():
        raise SystemExit(f"{arguments.out} holds something else than a model; name another folder with --out")
    corpus = load_corpus(arguments.texts, arguments.held_out, arguments.vocabulary)
    print(f"{len(corpus.trained)} books to train on, {len(corpus.stream)} tokens", flush=True)
    trainer = Trainer(corpus, arguments.rate, arguments.seed, arguments.compile)
    run = Run(arguments.threads, TOKENS_PER_STEP)
    card = Card(
        run=run,
        trained=corpus.trained,
        held_out=corpus.held_out,
        train_tokens=len(corpus.stream),
        evaluation=arguments.evaluation,
        tokenizer=corpus.tokenizer,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
    )
    last_save = last_probe = 0.0
    budget = arguments.minutes * 60
    while run.seconds < budget:
        begin = time.monotonic()
        fraction = run.seconds / budget
        length = [n for start, n in LENGTH_SCHEDULE if fraction >= start][-1]
        loss, tokens = trainer.step(run.steps, length, arguments.rate * rate_factor(run.steps, fraction))
        run.steps += 1
        run.tokens += tokens
        run.seconds += time.monotonic() - begin  # training only: measuring and saving don't count
        if run.seconds - last_probe > 60 * arguments.probe_every or run.seconds >= budget:
            last_probe = run.seconds
            run.curve.append((run.seconds / 60, run.tokens, trainer.held_out_loss()))
            print(
                f"{run.seconds / 60:5.1f} min  step {run.steps}  {run.tokens / 1e6:.2f} M tokens  length {length}  "
                f"training {loss:.3f}  held-out {run.curve[-1][2]:.3f}",
                flush=True,
            )
        if run.seconds - last_save > 60 * arguments.save_every and run.seconds < budget:
            last_save = run.seconds
            save(trainer.averaged(), corpus.tokenizer, arguments.out, card)
    card.sample = FINAL_SAMPLE
    save(trainer.averaged(), corpus.tokenizer, arguments.out, card)
    print((arguments.out / "README.md").read_text(encoding="utf-8"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train Detent's built-in sample model.")
    parser.add_argument("--texts", type=Path, required=True, help="folder of plain-text books")
    parser.add_argument("--held-out", nargs="+", default=["Bennet_Helen_1910", "Burnett_Lord_1886"], help="book names")
    parser.add_argument("--out", type=Path, default=DATA / "sample_model")
    parser.add_argument("--evaluation", type=Path, default=DATA / "texts" / "evaluation.txt")
    parser.add_argument("--minutes", type=float, default=42.0, help="training time on the wall clock")
    parser.add_argument("--save-every", type=float, default=8.0, help="minutes between intermediate models")
    parser.add_argument("--probe-every", type=float, default=1.0, help="minutes between held-out losses")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
