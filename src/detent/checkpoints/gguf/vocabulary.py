"""The tokenizer as GGUF has it: tokens, scores or merges, special tokens, and how text is cut up first.

llama.cpp has its own code for that cutting, one for each family of tokenizers, chosen by a name. The name is found by
comparing the rules of the tokenizer itself, its regular expressions; one that llama.cpp doesn't have is refused, since
text would become other tokens than the model was trained on.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from detent.errors import DetentError
from detent.external.files import is_file, names_in, read_json
from detent.external.mistakes import as_detent_error, first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SPACE = "\u2581"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_END_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: {(the expressions in the order in which they cut, whether whole words are looked up before merges): the name}.
_CUTTERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    (("digits", _WORDS), False): "starcoder",
    ((rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}",), True): "llama-bpe",
    ((rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}",), False): "smaug-bpe",
    ((rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}",), False): "qwen2",
    ((rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
      r"|\s*[\r\n]+|\s+(?!\S)|\s+",), False): "qwen35",
    ((rf"{_CASED}*{_LOWER}+{_CASELESS}?|{_CASED}+{_LOWER}*{_CASELESS}?|\p{{N}}{{1,3}}|{_END_SLASH}",), False): "gpt-4o",
    ((rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_END_SLASH}",), True): "tekken",
    (("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digits"), False): "deepseek-coder",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    ((r" ?[^(\s|[.,!?…。，、।۔،])]+",), False): "bloom",
}  # fmt: skip


def vocabulary(folder: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    """(what a file says of the tokenizer of a checkpoint, what its user should know).

    Args:
        folder: of the checkpoint. size: the number of rows of the embedding.

    Raises:
        DetentError: the tokenizer can't be read, isn't one of transformers' fast ones, or llama.cpp has none like it.
    """
    if not any(name in _FILES for name in names_in(folder)):
        note = f"{folder} has no tokenizer, so the file will have none: llama.cpp can run it on numbers of tokens alone"
        return {"tokenizer.ggml.model": "none"}, [note]
    from transformers import AutoTokenizer

    with as_detent_error(lambda error: f"{folder}: no usable tokenizer, which a GGUF file holds: {first_line(error)}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DetentError(f"{folder}: its tokenizer has no tokenizer.json, and can't be converted; GGUF needs one")
    own = folder / "tokenizer.json"  # some classes of transformers add tokens to what it says
    rules = read_json(own) if is_file(own) else json.loads(tokenizer.backend_tokenizer.to_str())
    values = _KINDS.get(rules["model"]["type"], _refused)(rules)
    tokens, types = _tokens(rules, values["tokenizer.ggml.model"], size)
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if "tokenizer.ggml.scores" in values:
        scores = values["tokenizer.ggml.scores"]
        values["tokenizer.ggml.scores"] = [scores.get(token, -1000.0) for token in tokens]
    return values | _special(tokenizer, size) | _templates(tokenizer), []


def _refused(rules: dict[str, Any]) -> dict[str, Any]:
    raise DetentError(
        f"a tokenizer of type {rules['model']['type']} can't be written as GGUF: llama.cpp has none like it"
    )


def _tokens(rules: dict[str, Any], model: str, size: int) -> tuple[list[str], list[int]]:
    """(texts, types) of all tokens, by number; rows of the embedding that have none get names."""
    vocab = rules["model"]["vocab"]
    known = (
        {i: pair[0] for i, pair in enumerate(vocab)} if isinstance(vocab, list) else {i: t for t, i in vocab.items()}
    )
    unknown = rules["model"].get("unk_token") or known.get(rules["model"].get("unk_id"))
    byte = bool(rules["model"].get("byte_fallback"))
    added = {token["id"]: token for token in rules["added_tokens"]}
    if max(*known, *added, 0) >= size:
        raise DetentError(
            f"the tokenizer has token {max(*known, *added)}, but the embedding has {size} rows; one of the two belongs"
            " to another model"
        )
    tokens, types = [], []
    for number in range(size):
        text, kind = known.get(number, f"[PAD{number}]"), NORMAL if number in known else UNUSED
        if number in added:
            text, kind = added[number]["content"], CONTROL if added[number]["special"] else USER_DEFINED
            text = text.replace(_SPACE, " ") if kind == USER_DEFINED and model == "llama" else text
        elif byte and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        elif model == "bert" and kind == NORMAL:
            text = text[2:] if text.startswith("##") else _SPACE + text
        tokens.append(text)
        types.append(UNKNOWN if text == unknown and model in ("llama", "t5") else kind)
    return tokens, types


def _bpe(rules: dict[str, Any]) -> dict[str, Any]:
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in rules["model"]["merges"]]
    if rules["model"].get("byte_fallback"):
        # SentencePiece joins the pair whose joint token has the highest score: minus the rank of its first merge.
        scores: dict[str, float] = {}
        for rank, merge in enumerate(merges):
            scores.setdefault(merge.replace(" ", ""), -float(rank))
        plain = dict.fromkeys((text for text in rules["model"]["vocab"] if text not in scores), -float(len(merges)))
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores | plain,
            "tokenizer.ggml.add_space_prefix": _adds_space(rules),
        }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cutter(rules),
        "tokenizer.ggml.merges": merges,
    }


def _unigram(rules: dict[str, Any]) -> dict[str, Any]:
    values = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": {text: float(score) for text, score in rules["model"]["vocab"]},
        "tokenizer.ggml.add_space_prefix": _adds_space(rules),
        "tokenizer.ggml.remove_extra_whitespaces": any(
            part["type"] == "Replace" for part in _parts(rules, "normalizer")
        ),
    }
    for part in _parts(rules, "normalizer"):
        if part["type"] == "Precompiled":
            values["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(part["precompiled_charsmap"])
    return values


def _word_piece(rules: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "default"}


_KINDS = {"BPE": _bpe, "Unigram": _unigram, "WordPiece": _word_piece}


def _parts(rules: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """The normalizers, or pre-tokenizers, in their order."""
    part = rules[what] or {"type": "Sequence", "normalizers": [], "pretokenizers": []}
    if part["type"] != "Sequence":
        return [part]
    return list(part["normalizers" if what == "normalizer" else "pretokenizers"])


def _adds_space(rules: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for what in ("normalizer", "pre_tokenizer")
        for part in _parts(rules, what)
    )


def _cutter(rules: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer cuts text."""
    found: list[str] = []
    for part in _parts(rules, "pre_tokenizer"):
        if part["type"] == "ByteLevel" and part["use_regex"]:
            found.append(_WORDS)
        elif part["type"] == "Digits" and part["individual_digits"]:
            found.append("digits")
        elif part["type"] == "Split":
            pattern = part["pattern"].get("Regex") or part["pattern"].get("String")
            found.append("digits" if pattern == r"\p{N}" else pattern)
        elif part["type"] != "ByteLevel":
            found.append(part["type"])
    name = _CUTTERS.get((tuple(found), bool(rules["model"].get("ignore_merges"))))
    if name is None:
        raise DetentError(
            f"the tokenizer cuts text by {' and '.join(map(repr, found)) or 'nothing'}, which llama.cpp doesn't do:"
            " the model would read other tokens there, so it isn't written as GGUF"
        )
    return name


def _special(tokenizer: Any, size: int) -> dict[str, Any]:
    """The numbers of special tokens, and whether a text begins and ends with some."""
    values: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < size:
            values[f"tokenizer.ggml.{key}_token_id"] = int(number)
    text = tokenizer("a").input_ids
    for side, name in ((0, "bos"), (-1, "eos")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        values[f"tokenizer.ggml.add_{name}_token"] = len(text) > 1 and text[side] == number
    return values


def _templates(tokenizer: Any) -> dict[str, Any]:
    """The chat template, or several by name."""
    found = getattr(tokenizer, "chat_template", None)
    if not isinstance(found, dict):
        return {"tokenizer.chat_template": found} if found else {}
    values = {f"tokenizer.chat_template.{name}": text for name, text in found.items() if name != "default"}
    if "default" in found:
        values["tokenizer.chat_template"] = found["default"]
    return values | {"tokenizer.chat_templates": [name for name in found if name != "default"]}
