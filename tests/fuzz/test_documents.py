"""Every kind of JSON that Detent reads, with something wrong in it: taken, or refused in one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints.toy import quantized_llama
from cli.runner import save_checkpoint
from detent import formats as f
from detent.checkpoints import Source, open_quantized
from detent.config.algorithm_names import named_algorithms
from detent.data.documents import Conversation, render
from detent.data.text import load_texts
from detent.errors import DetentError
from detent.external.files import parse_json
from detent.external.output import MANIFEST_NAME, add_to_manifest, check_replaceable
from detent.pretrained.loading import load_config, load_tokenizer, model_on_meta
from detent.report.contents import contents
from detent.report.run_report import BeforeAfterBytes, LayerReport, RunReport
from detent.structure.overrides import Overrides
from fuzz.mutations import as_text, changed, clear, dose, values
from tiny_language_model import make_tokenizer

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer, for all examples: what they change they put back."""
    return save_checkpoint(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, formats in {
        "packed": (f.integer(4, f.per_group(32), symmetric=False), None, None),
        "fp8": (f.fp8(), f.fp8(), None),
        "nvfp4": (f.nvfp4(), f.nvfp4(), None),
        "detent": (f.micro_exponent(6), f.fp8("e5m2"), None),
    }.items():
        out = tmp_path_factory.mktemp(name)
        quantized_llama(out, lambda layer, formats=formats: formats, kv_cache=f.fp8())  # type: ignore[misc]
        folders[name] = out / "out"
    return folders


@given(st.binary(max_size=60) | as_text({"a": [1, 2.5, {"b": None}], "c": "text"}))
def test_json(text: bytes) -> None:
    value = clear(parse_json, text, "x.json")
    assert value is None or json.dumps(value)


@dose(0.3)
@given(st.data())
def test_config(folder: Path, data: Any) -> None:
    path = folder / "config.json"
    original = path.read_bytes()
    try:
        path.write_bytes(data.draw(as_text(json.loads(original))))
        clear(contents, folder)
    finally:
        path.write_bytes(original)


@dose(0.3)
@given(st.data())
def test_models(folder: Path, data: Any) -> None:
    """Whatever transformers makes of odd values, which may be a model."""
    path = folder / "config.json"
    original = path.read_bytes()
    try:
        path.write_text(json.dumps(data.draw(changed(json.loads(original)))))
        found = clear(load_config, folder)
        if found is not None:
            clear(model_on_meta, found)
    finally:
        path.write_bytes(original)


@dose(0.3)
@given(st.data())
def test_tokenizers(folder: Path, data: Any) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    path = folder / name
    original = path.read_bytes()
    try:
        path.write_bytes(data.draw(as_text(json.loads(original))))
        tokenizer = clear(load_tokenizer, folder)
        if tokenizer is not None:
            from detent.data.batches import encode

            clear(encode, "w1 w2 word", tokenizer)
            clear(render, Conversation((("user", "w1"),)), tokenizer)
    finally:
        path.write_bytes(original)


@dose(0.15)
@given(st.data())
@pytest.mark.parametrize("name", ["packed", "fp8", "nvfp4", "detent"])
def test_quantization_configs(name: str, quantized: dict[str, Path], data: Any) -> None:
    path = quantized[name] / "config.json"
    original = path.read_bytes()
    config = json.loads(original)
    config["quantization_config"] = data.draw(changed(config["quantization_config"]))
    try:
        path.write_text(json.dumps(config))
        if clear(contents, quantized[name]) is not None and (checkpoint := clear(open_quantized, quantized[name])):
            for layer in list(checkpoint.formats.layers)[:2]:
                clear(checkpoint.layer, layer)
    finally:
        path.write_bytes(original)


@dose(0.3)
@given(st.data())
def test_indexes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(data.draw(as_text(index)))
    source = clear(Source, folder)
    assert source is None or sorted(source) in (["a", "b"], ["a"], ["b"])


@dose(0.3)
@given(st.data())
def test_manifests(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Never overwritten unless the manifest says of every file what it is."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "a.txt").write_text("mine")
    add_to_manifest(folder, "a.txt")
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    text = data.draw(as_text(manifest))
    path.write_bytes(text)
    try:
        check_replaceable(folder, overwrite=True)
    except DetentError:
        return
    assert json.loads(text)["files"]["a.txt"]["size"] == 4


CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi!"}]
TEXTS: list[Any] = [
    ["One.", {"text": "Two."}, {"messages": CHAT}],
    {"data": [{"conversations": [{"from": "human", "value": "Hi?"}]}]},
    {"prompt": "One."},
]


@dose(0.3)
@given(st.sampled_from(TEXTS).flatmap(as_text), st.sampled_from(["a.json", "a.jsonl", "a.txt"]))
def test_texts(tmp_path_factory: pytest.TempPathFactory, text: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("texts") / name
    path.write_bytes(text)
    for purpose in ("calibration", "evaluation"):
        source = clear(load_texts, path, purpose)  # type: ignore[arg-type]
        if source is not None:
            source.joined_text(make_tokenizer())


PIECES = [
    "{{ messages }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[9] }}", "{% for m in messages %}", "{% endfor %}",
    "{% for a in range(99999) %}", "{{ m.content * 3 }}", "{% if %}", "{% endif %}", "{% set x = 3 %}", "{{ f() }}",
    "{% macro f() %}", "{% endmacro %}", "{{ raise_exception('no') }}", "{{ messages | tojson }}", "}}",
]  # fmt: skip


@dose(0.3)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=20))
def test_chat_templates(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    clear(render, Conversation((("user", "w1"), ("assistant", "w2"))), tokenizer)


SETTINGS = {"damp_percent": 0.01, "desc_act": True, "block_size": 128, "layers": ["x"]}


@dose(0.3)
@given(as_text(SETTINGS) | as_text({"gptq": SETTINGS, "smoothquant": {"alpha": 0.5}}), st.booleans())
def test_algorithm_files(tmp_path_factory: pytest.TempPathFactory, text: bytes, before: bool) -> None:
    path = tmp_path_factory.mktemp("algorithm") / "a.json"
    path.write_bytes(text)
    clear(named_algorithms, ["smoothquant"], "gptq", str(path) if before else None, None if before else str(path))


OVERRIDES = {"blocks": ["model.layers.*"], "sites": {"*.o": None, "*.d": {"kind": "rows", "module": "{block}.u"}}}


@dose(0.3)
@given(as_text(OVERRIDES))
def test_overrides(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.mktemp("overrides") / "o.json"
    path.write_bytes(text)
    clear(Overrides.read, path)


@dose(0.3)
@given(st.data())
def test_reports(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    layer = LayerReport(name="a", format="int4", relative_error=0.1, shape=[2, 2])
    report = RunReport(
        detent_version="0",
        model="m",
        size_bytes=BeforeAfterBytes(before=1),
        layers=[layer],
        seconds=1,
        peak_memory_bytes=1,
    )
    path = tmp_path_factory.mktemp("report") / "r.json"
    path.write_bytes(data.draw(as_text(report.model_dump(mode="json"))))
    clear(RunReport.read, path)


@given(values)
def test_values_alone(value: Any) -> None:
    """In place of whole documents."""
    from detent.external.files import check_as
    from detent.external.schemas import LayoutDescription, Manifest, ModelConfig, SavedState, ShardIndex

    for kind in (LayoutDescription, Manifest, ModelConfig, SavedState, ShardIndex):
        clear(check_as, kind, value, "x.json")
