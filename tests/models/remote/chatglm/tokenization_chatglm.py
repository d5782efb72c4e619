"""A stand-in for the tokenizer that comes with ChatGLM3: a class of its own that puts two tokens before every text.

Its `tokenizer.model` is a list of words here, and not a SentencePiece model, which needs a package to read.
"""

from pathlib import Path

from transformers import PreTrainedTokenizer


class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = vocab_file
        self.words = Path(vocab_file).read_text("utf-8").split()
        self.numbers = {word: number for number, word in enumerate(self.words)}
        super().__init__(**{"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>", **kwargs})

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**self.numbers, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.numbers.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.words[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.numbers["[gMASK]"], self.numbers["sop"], *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "tokenizer.model"
        path.write_text("\n".join(self.words), "utf-8")
        return (str(path),)
