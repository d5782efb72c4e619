"""A random Llama of a few thousand parameters and a tokenizer of one token a word, made on the spot."""

from __future__ import annotations

from typing import Any

import torch

#: Words of the tokenizer, after its special tokens.
WORDS = [f"w{i}" for i in range(60)]
#: Ids: 0 <unk>, 1 <s>, 2 </s>, then the words.
FIRST_WORD_ID = 3
VOCABULARY = FIRST_WORD_ID + len(WORDS)


def make_tokenizer(beginning_of_text: bool = True) -> Any:
    """A word-level tokenizer that, like Llama's, puts <s> before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if beginning_of_text:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )


def make_model(positions: int = 64, seed: int = 0) -> Any:
    """A Llama with random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def words(*indices: int) -> str:
    """A text of the words with these numbers."""
    return " ".join(WORDS[index] for index in indices)


def ids(*indices: int) -> list[int]:
    """The token ids of the words with these numbers."""
    return [FIRST_WORD_ID + index for index in indices]
