"""GGUF files: what is written is read back, by Detent and by transformers, whatever the architecture."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detent.checkpoints import ModelFormats, QuantizedWriter, Source, open_quantized, open_source, wanted_layouts
from detent.checkpoints.gguf.container import read_header
from detent.checkpoints.gguf.mixtures import Facts, mixture_named, type_of
from detent.errors import DetentError

gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "tools" / "verify_readers"))
from gguf_models import MODELS, tiny  # noqa: E402

#: What transformers reads, and what it reads wrong or not at all.
_READ_BY_TRANSFORMERS = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "bloom", "gpt2", "starcoder2"),
    *("gemma2", "gemma3", "stablelm", "nemotron", "cohere"),
)


def write(folder: Path, out: Path, kind: str = "F32") -> Source:
    """A checkpoint as GGUF, in floating point."""
    source = Source(folder)
    layout = wanted_layouts("gguf", gguf_type=kind)[0].of(source)
    with QuantizedWriter(out, source=source, formats=ModelFormats({}), layout=layout) as writer:
        for name in source:
            if layout.stores(name):
                writer.add_tensor(name, layout.settled(name, source.tensor(name)))
        writer.finish()
    return source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """{name: (folder of the float model, folder with a GGUF file)}, made when they are asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = tiny(name, folder / "float"), folder / "gguf"
            write(*made[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_tensors_come_back_as_they_were(name: str, models: Any) -> None:
    folder, out = models(name)
    source, found = Source(folder), open_quantized(out)
    assert set(found.kept) == set(source) and found.method == "gguf"
    for tensor in source:
        torch.testing.assert_close(found.tensor(tensor), source.tensor(tensor), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("name", _READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_from_the_file(name: str, models: Any) -> None:
    folder, out = models(name)
    assert torch.allclose(_logits(out, gguf_file="model.gguf"), _logits(folder), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _logits(folder: Path, **options: Any) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)  # of a header, transformers takes half of it
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **options)
    logits: Tensor = model(torch.arange(2, 42)[None] * 31).logits
    return logits


def test_transformers_makes_the_same_tokenizer_of_the_file(models: Any) -> None:
    from transformers import AutoTokenizer

    _, out = models("llama")
    text = "It's 12 o'clock,\n\n  and all's well."
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert theirs(text).input_ids == AutoTokenizer.from_pretrained(out)(text).input_ids


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    source = Source.imagined(tmp_path, {"a": ((1,), torch.float32)})
    with pytest.raises(DetentError, match="of type 'opt' can't be written as GGUF"):
        wanted_layouts("gguf")[0].of(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "the activation function is 'gelu', but llama.cpp has silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic' can't be"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(change: dict[str, Any], message: str, models: Any) -> None:
    source = Source(models("llama")[0])
    source.config |= change
    with pytest.raises(DetentError, match=message):
        wanted_layouts("gguf")[0].of(source)


def test_a_tensor_that_llama_cpp_lacks_is_refused(models: Any) -> None:
    source = Source(models("llama")[0])
    source.tensors["model.layers.0.extra.weight"] = source.tensors["model.norm.weight"]
    with pytest.raises(DetentError, match=r"layers.0.extra.weight can't be written as GGUF"):
        wanted_layouts("gguf")[0].of(source)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def _file(values: bytes = b"", keys: int = 0, tensors: bytes = b"", count: int = 0, data: int = 0) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, count, keys) + values + tensors
    return header + bytes(-len(header) % 32 + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGML" + bytes(60), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it is of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<I", 3), "its header would end past"),
        (_file(count=1 << 60), "would end past its"),
        (_file(struct.pack("<QQ", 1 << 40, 0), keys=1), "a string of 1099511627776 bytes"),
        (_file(_text("k") + struct.pack("<IIQ", 9, 4, 1 << 50), keys=1), "values of k would end past"),
        (_file(_text("k") + struct.pack("<I", 77), keys=1), "k is of type 77"),
        (_file((_text("k") + struct.pack("<II", 4, 1)) * 2, keys=2), "'k' is there twice"),
        (_file(_text("general.alignment") + struct.pack("<II", 4, 3), keys=1), "is 3, not a power of two"),
        (_file(tensors=_tensor("a", (8,), 0, 64), count=1, data=32), "ends at byte"),
        (_file(tensors=_tensor("a", (8,), 0, 0) + _tensor("b", (8,), 0, 0), count=2, data=64), "inside of"),
        (_file(tensors=_tensor("a", (8,), 0, 8), count=1, data=64), "no multiple of 32"),
        (_file(tensors=_tensor("a", (8,), 0, 0) + _tensor("a", (8,), 0, 32), count=2, data=64), "'a' is there twice"),
        (_file(tensors=_tensor("a", (31,), 8, 0), count=1, data=64), "has blocks of 32"),
        (_file(tensors=_tensor("a", (8,), 99, 0), count=1, data=64), "a is of type 99"),
        (_file(tensors=_tensor("a", (2, 2, 2, 2, 2), 0, 0), count=1, data=128), "5 dimensions"),
        (_file(tensors=_tensor("a", (1 << 40, 1 << 40), 0, 0), count=1), "ends at byte"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(DetentError, match=message):
        read_header(path)


def test_a_header_is_read_as_the_gguf_package_reads_it(models: Any) -> None:
    path = models("mixtral")[1] / "model.gguf"
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.values["llama.expert_count"] == 4 and ours.values["general.architecture"] == "llama"
    assert {name: (e.start, e.nbytes, e.kind, list(reversed(e.shape))) for name, e in ours.tensors.items()} == {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name, t.shape.tolist()) for t in theirs.tensors
    }


def test_the_file_of_another_model_is_refused(models: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes((models("mistral")[1] / "model.gguf").read_bytes())
    (tmp_path / "config.json").write_bytes((models("qwen2")[1] / "config.json").read_bytes())
    with pytest.raises(DetentError, match="is a model of type llama, but its config.json is of qwen2"):
        open_quantized(tmp_path)


# ---- sources and mixtures --------------------------------------------------------------------------------------------


def test_a_file_alone_is_a_source_and_a_checkpoint(models: Any, tmp_path: Path) -> None:
    folder, out = models("qwen2")
    path = tmp_path / "some.gguf"
    path.write_bytes((out / "model.gguf").read_bytes())
    source = open_source(path)  # without config.json: transformers makes one of the header
    assert source.config["model_type"] == "qwen2" and source.config["hidden_size"] == 128
    original = Source(folder)
    assert set(source) == set(original)
    assert torch.equal(source.tensor("model.layers.1.mlp.up_proj.weight"), original.tensor("model.layers.1.mlp.up_proj.weight"))


def test_mixtures_follow_the_rules_of_llama_cpp() -> None:
    facts = Facts(blocks=32, experts=0, shared=4, tied=False)

    def kinds(mixture: str, part: str, width: int = 4096, **more: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for block in range(32):
            kind = type_of(mixture_named(mixture), f"blk.{block}.{part}.weight", width, Facts(**{**vars(facts), **more}))
            found.setdefault(str(kind), []).append(block)
        return found

    more = [0, 1, 2, 3, *range(6, 28, 3), 28, 29, 30, 31]  # the first and last eighth, and every third between
    rest = [block for block in range(32) if block not in more]
    assert kinds("Q4_K_M", "attn_v") == kinds("q4_k", "ffn_down") == {"Q6_K": more, "Q4_K": rest}
    assert kinds("Q4_K_M", "attn_q") == {"Q4_K": list(range(32))}
    assert kinds("Q4_K_S", "attn_v") == {"Q5_K": [0, 1, 2, 3], "Q4_K": list(range(4, 32))}
    assert kinds("Q3_K_M", "ffn_down") == {"Q5_K": [0, 1], "Q4_K": list(range(2, 32))}
    assert kinds("Q2_K", "attn_v", shared=1) == {"Q3_K": list(range(32))}
    assert kinds("Q4_K_M", "attn_k", experts=8) == {"Q8_0": list(range(32))}
    assert kinds("Q4_K_M", "attn_q", width=96) == {"Q5_0": list(range(32))}  # no multiple of 256
    assert kinds("Q6_K", "attn_q", width=40) == {"F16": list(range(32))}
    assert kinds("Q4_K_M", "ffn_gate_inp") == {"None": list(range(32))}
    assert type_of("Q4_K_M", "output.weight", 4096, facts) == "Q6_K"
    assert type_of("Q4_K_M", "token_embd.weight", 4096, facts) == "Q4_K"
    assert type_of("Q4_K_M", "token_embd.weight", 4096, Facts(32, 0, 4, tied=True)) == "Q6_K"
    with pytest.raises(DetentError, match="unknown type of GGUF 'Q4_K_X'"):
        mixture_named("Q4_K_X")
