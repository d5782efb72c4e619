"""A stand-in for the tokenizer that comes with Qwen-1: byte pairs from a tiktoken file, merged by rank."""

import base64
from pathlib import Path

from transformers import PreTrainedTokenizer


class QWenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = vocab_file
        lines = (line.split() for line in Path(vocab_file).read_bytes().splitlines() if line)
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.pieces = {rank: token for token, rank in self.ranks.items()}
        self.eod_id = len(self.ranks)
        super().__init__(**{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **kwargs})

    @property
    def vocab_size(self):
        return len(self.ranks)

    def get_vocab(self):
        return {**self.ranks, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        parts = [bytes([byte]) for byte in text.encode("utf-8")]
        while True:
            pairs = [self.ranks.get(a + b, len(self.ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            if not pairs or min(pairs) == len(self.ranks):
                return parts
            place = pairs.index(min(pairs))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    def _convert_token_to_id(self, token):
        return self.ranks.get(token, self.eod_id)

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "qwen.tiktoken"
        path.write_bytes(Path(self.vocab_file).read_bytes())
        return (str(path),)
