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

import detent
from detent.checkpoints import ModelFormats, QuantizedWriter, Source, open_quantized, open_source, wanted_layouts
from detent.checkpoints.gguf.container import read_header
from detent.checkpoints.gguf.imatrix import read_imatrix, write_imatrix
from detent.checkpoints.gguf.mixtures import Facts, mixture_named, type_of
from detent.data import sample_model_dir as detent_sample
from detent.errors import DetentError
from detent.runs.load import load_quantized

gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "tools" / "verify_readers"))
from gguf_models import MODELS, tiny  # noqa: E402

#: What transformers reads; llama.cpp itself reads them all (tools/verify_readers).
_READ_BY_TRANSFORMERS = (
    *("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi_3", "bloom", "gpt2", "starcoder2"),
    *("gemma2", "gemma3", "stablelm", "nemotron"),
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
    assert set(found.kept) == set(source)
    for tensor in source:
        torch.testing.assert_close(found.tensor(tensor), source.tensor(tensor), rtol=1e-6, atol=2e-7)
    # What a reader gets is what the writer was given, bit for bit: norms have gone through an addition of 1 before.
    layout = wanted_layouts("gguf")[0].of(source)
    for tensor in source:
        assert torch.equal(layout.settled(tensor, source.tensor(tensor)), found.tensor(tensor))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "qwen2" else ()) for name in _READ_BY_TRANSFORMERS]
)
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
    assert (ours.values["llama.expert_count"], ours.values["general.architecture"]) == (4, "llama")
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
    assert (source.config["model_type"], source.config["hidden_size"]) == ("qwen2", 128)
    original = Source(folder)
    assert set(source) == set(original)
    assert torch.equal(
        source.tensor("model.layers.1.mlp.up_proj.weight"), original.tensor("model.layers.1.mlp.up_proj.weight")
    )


def test_mixtures_follow_the_rules_of_llama_cpp() -> None:
    facts = Facts(blocks=32, experts=0, shared=4, tied=False)

    def kinds(mixture: str, part: str, width: int = 4096, **more: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for block in range(32):
            kind = type_of(
                mixture_named(mixture), f"blk.{block}.{part}.weight", width, Facts(**{**vars(facts), **more})
            )
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


# ---- quantized weights -----------------------------------------------------------------------------------------------


def quantize(out: Path, kind: str | None = None, scheme: str | None = None, **more: Any) -> Any:
    """The sample model as GGUF."""
    export = detent.ExportOptions("gguf", gguf_type=kind, **more)
    return detent.quantize_checkpoint(
        detent.ModelOptions(),
        detent.SchemeOptions(scheme, group_size=None if scheme is None else 32, export=export),
        out,
        evaluation=detent.EvaluationOptions(skip=True),
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model in a mixture: three types, and a tied embedding."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    quantize(out, "Q4_K_M")
    return out


def test_the_gguf_package_decodes_the_simulated_weights(mixed: Path) -> None:
    model = load_quantized(mixed, dtype=torch.float32)
    names = {t.name: t for t in gguf.GGUFReader(mixed / "model.gguf").tensors}
    pairs = {
        "token_embd.weight": model.model.embed_tokens,
        "blk.2.attn_v.weight": model.model.layers[2].self_attn.v_proj,
        "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj,
    }
    kinds = {name: names[name].tensor_type.name for name in pairs}
    assert kinds == {"token_embd.weight": "Q6_K", "blk.2.attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "Q4_K"}
    for name, module in pairs.items():
        decoded = gguf.quants.dequantize(names[name].data, names[name].tensor_type)
        torch.testing.assert_close(torch.from_numpy(decoded), module.weight.data, rtol=1e-6, atol=1e-9)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "output.weight" not in names


def test_transformers_computes_the_same_from_quantized_weights(mixed: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 42)[None] * 31
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(mixed, gguf_file="model.gguf", dtype=torch.float32)(ids).logits
        ours = load_quantized(mixed, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_quantized_files_are_sources(mixed: Path) -> None:
    source = open_source(mixed)
    assert "38 weights" not in source.notes[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(source.tensor(name), load_quantized(mixed).model.layers[0].self_attn.q_proj.weight)


def test_the_formats_of_a_scheme_are_types(tmp_path: Path) -> None:
    report = quantize(tmp_path / "out", scheme="w_uint4_per_group_asym")
    assert {layer.format.split(" per")[0] for layer in report.layers} == {"uint4 with a minimum"}
    kinds = {e.kind for n, e in read_header(tmp_path / "out" / "model.gguf").tensors.items() if "_norm" not in n}
    assert kinds == {"Q4_1", "BF16"}


@pytest.mark.parametrize(
    ("kind", "scheme", "message"),
    [
        (None, "w_int6_per_group_sym", "GGUF has no type for"),
        (None, "w_int8_per_group_sym_a_int8_per_token_dynamic", "GGUF holds weights alone"),
        ("Q4_K_M", "w_int8_per_group_sym", "both say which formats weights get"),
        ("Q4_X", None, "unknown type of GGUF"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_runs(
    kind: str | None, scheme: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DetentError, match=message):
        quantize(tmp_path / "out", kind, scheme)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gguf", "binary"])
def test_importances_weigh_the_errors_of_columns(form: str, tmp_path: Path) -> None:
    name, weight = "blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"
    heavy = torch.full((256,), 1e-3)
    heavy[::4] = 1000.0
    path = tmp_path / "imatrix"
    if form == "gguf":
        write_imatrix(path, {name: heavy * 10}, {name: 10})
    else:
        values = (heavy * 3).numpy().tobytes()
        path.write_bytes(struct.pack("<ii", 1, len(name)) + name.encode() + struct.pack("<ii", 3, 256) + values)
    torch.testing.assert_close(read_imatrix(path)[name], heavy)
    original = Source(detent_sample()).tensor(weight).float()
    errors = []
    for out, imatrix in ((tmp_path / "plain", None), (tmp_path / "weighed", str(path))):
        quantize(out, "Q4_K_S", imatrix=imatrix)
        errors.append(((open_source(out).tensor(weight).float() - original) ** 2).mean(0)[::4].sum())
    assert errors[1] < 0.9 * errors[0]


def test_damaged_importances_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    for content in (b"", b"\1\0\0\0", struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1 << 30, 0)):
        path.write_bytes(content)
        with pytest.raises(DetentError, match="truncated|no importances"):
            read_imatrix(path)


def test_rows_that_do_not_fill_blocks_are_told(models: Any) -> None:
    layout = wanted_layouts("gguf", gguf_type="Q4_K_M")[0].of(Source(models("llama")[0]))
    told = next(note for note in layout.notes if "rows" in note)
    # All matrices of 4 blocks but the last one of each, and the embedding; the output has Q8_0 by the rules themselves.
    assert told.startswith("25 tensors have rows that don't fill the blocks of Q4_K_M: ")
    assert told.endswith("Q5_0 instead of Q4_K, as model.embed_tokens.weight with rows of 128")


def test_options_of_gguf_are_refused_elsewhere(tmp_path: Path) -> None:
    for more in ({"gguf_type": "Q4_K_M"}, {"imatrix": "x.dat"}):
        options = detent.SchemeOptions("w_int8_per_group_sym", export=detent.ExportOptions("detent", **more))
        with pytest.raises(DetentError, match="is about GGUF files, and detent isn't one"):
            detent.quantize_checkpoint(detent.ModelOptions(), options, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_stacked_whether_the_source_has_them_in_one_tensor(name: str, models: Any, tmp_path: Path) -> None:
    folder, _ = models(name)
    out = tmp_path / "out"
    detent.quantize_checkpoint(
        detent.ModelOptions(str(folder)),
        detent.SchemeOptions(export=detent.ExportOptions("gguf", gguf_type="Q8_0")),
        out,
        evaluation=detent.EvaluationOptions(skip=True),
    )
    stacked = next(t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.1.ffn_up_exps.weight")
    values = torch.from_numpy(gguf.quants.dequantize(stacked.data, stacked.tensor_type))
    source = Source(folder)
    if name == "mixtral":
        original = torch.stack(
            [source.tensor(f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight") for i in range(4)]
        )
    else:
        original = source.tensor("model.layers.1.mlp.experts.gate_up_proj")[..., 1::2].transpose(1, 2)
    assert values.shape == original.shape == (4, 256, 128)
    assert (values - original).norm() < 0.01 * original.norm()
