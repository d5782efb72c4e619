"""Opening a checkpoint folder: what is read, and one clear message for everything that can be wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.toy import assert_same_tensor, toy_source
from detent.checkpoints import Source, quant_method
from detent.errors import DetentError

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.zeros(0, 2, dtype=torch.float16),
    "d": torch.arange(4),
    "e": torch.randn(4).to(torch.float8_e4m3fn),
}


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}
    files = {name: f"model-{n:05d}-of-00002.safetensors" for name, n in names.items()}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in files if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(params=["single", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return toy_source(tmp_path / "m", TENSORS) if request.param == "single" else sharded(tmp_path / "m")


def test_headers_and_tensors(folder: Path) -> None:
    source = Source(folder)
    assert source.config["model_type"] == "llama"
    assert sorted(source) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        info = source.info(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert_same_tensor(source.tensor(name), tensor, name)
    source.close()
    assert_same_tensor(source.tensor("a"), TENSORS["a"], "a")
    assert source.nbytes == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The cache of the hub is made of links to files elsewhere."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert sorted(Source(linked)) == sorted(TENSORS)


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(DetentError, match="holds no tensor 'x'"):
        Source(folder).tensor("x")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(DetentError) as error:
        Source(folder)
    message = str(error.value)
    assert "\n" not in message.strip()
    for word in words:
        assert word in message


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "empty")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    refused(tmp_path / "f", "is a file")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("text", ["{", "", "not json", "\xff\xfe"])
def test_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json", "not JSON")


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json", "list")


@pytest.mark.parametrize("text", ["{}", '{"model_type": 3}', '{"model_type": ""}'])
def test_config_without_model_type(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "model_type")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, path.name, "truncated or corrupt safetensors file")


@pytest.mark.parametrize("at", [0, 9])
def test_corrupt_weights(folder: Path, at: int) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)
    refused(folder, path.name, "corrupt safetensors file")


def test_text_instead_of_weights(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_text("<html>Not found</html>" * 50)
    refused(folder, path.name, "safetensors file")


def test_git_lfs_pointer(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n")
    refused(folder, path.name, "git lfs pull")


def test_no_tensors(tmp_path: Path) -> None:
    folder = toy_source(tmp_path / "m")
    save_file({}, folder / "model.safetensors")
    refused(folder, "no tensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, name, "save_pretrained")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "holds no weights")


class TestSharded:
    """What only a sharded checkpoint can lack."""

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        (folder / "model-00002-of-00002.safetensors").unlink()
        refused(folder, "model-00002-of-00002.safetensors is missing")

    def test_missing_index(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        (folder / "model.safetensors.index.json").unlink()
        refused(folder, "model.safetensors.index.json", "is needed")

    def test_tensor_missing_from_its_shard(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
        refused(folder, "model-00001-of-00002.safetensors", "'b' is missing")

    def test_tensor_in_two_shards(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        again = {name: TENSORS[name] for name in ("a", "c", "d", "e")}
        save_file(again, folder / "model-00002-of-00002.safetensors")
        refused(folder, "'a' is both in model-00001", "and in model-00002")

    def test_tensor_that_the_index_does_not_list(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        more = {"a": TENSORS["a"], "b": TENSORS["b"], "z": TENSORS["a"].clone()}
        save_file(more, folder / "model-00001-of-00002.safetensors")
        refused(folder, "'z' is missing", "model-00001-of-00002.safetensors holds it")

    def test_tensor_in_another_shard_than_listed(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "'a' is missing", "model-00001-of-00002.safetensors holds it")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
    def test_bad_index(self, tmp_path: Path, text: str) -> None:
        folder = sharded(tmp_path / "m")
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, "model.safetensors.index.json")

    def test_index_that_leads_out_of_the_folder(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m")
        save_file({"a": TENSORS["a"]}, tmp_path / "secret.safetensors")
        index = {"weight_map": {"a": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "../secret.safetensors", "not a plain file name")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "method not named"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_quantized_already(config: dict[str, object], method: str, tmp_path: Path) -> None:
    folder = toy_source(tmp_path / "m", TENSORS, **config)
    assert quant_method({"model_type": "llama", **config}) == method
    refused(folder, "quantized already", method)
    assert sorted(Source(folder, quantized=True)) == sorted(TENSORS)


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}, {"text_config": None}])
def test_not_quantized(config: dict[str, object], tmp_path: Path) -> None:
    assert sorted(Source(toy_source(tmp_path / "m", TENSORS, **config))) == sorted(TENSORS)


class TestOtherThingsThanCheckpoints:
    """What people give in a checkpoint's place: what it is, and what to do."""

    def test_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
        refused(tmp_path, "LoRA adapter of org/base", "merge_and_unload")

    def test_adapter_beside_its_model(self, tmp_path: Path) -> None:
        folder = toy_source(tmp_path / "m", TENSORS)
        (folder / "adapter_config.json").write_text("{}")
        refused(folder, "LoRA adapter", "left out", "merge_and_unload")

    @pytest.mark.parametrize("config", [False, True])
    def test_gguf(self, config: bool, tmp_path: Path) -> None:
        (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
        if config:
            (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        refused(tmp_path, "as GGUF", "original checkpoint")
        refused(tmp_path / "model.Q4_K_M.gguf", "as GGUF")

    def test_model_in_the_hub_cache(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        refused(tmp_path / "models--org--name", "hub's cache", str(snapshot))

    @pytest.mark.parametrize("below", ["", "hub"])
    def test_hub_cache(self, below: str, tmp_path: Path) -> None:
        (tmp_path / below / "models--org--name").mkdir(parents=True)
        refused(tmp_path, "hub's cache", "org/name")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llama", "x": ' + "[" * 70 + "]" * 70 + "}", ["more than 64 levels"]),
        ('{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", ["more than 64 levels"]),
        ('{"model_type": "llama", "x": ' + "1" * 5000 + "}", ["5000 digits"]),
        ('{"model_type": "llama", "model_type": "gpt2"}', ["'model_type' appears twice"]),
        ('{"model_type": []}', ["model_type"]),
        ('{"model_type": 3}', ["'model_type' is 3", "string"]),
        ('{"model_type": "llama", "torch_dtype": []}', ["'torch_dtype' is []", "string"]),
        ('{"model_type": "llama", "architectures": [null]}', ["'architectures.0' is None", "string"]),
        ('{"model_type": "llama", "num_hidden_layers": 2147483648}', ["num_hidden_layers is 2147483648", "4096"]),
        ('{"model_type": "llama", "text_config": {"n_layer": 99999}}', ["text_config.n_layer", "4096"]),
        ('{"model_type": "llama", "vocab_size": true}', ["'vocab_size' is True", "integer"]),
        ('{"model_type": "llama", "max_position_embeddings": 1}', ["max_position_embeddings is 1"]),
        ('{"model_type": "llama", "quantization_config": "int4"}', ["'quantization_config' is 'int4'", "dictionary"]),
    ],
)
def test_config_values(text: str, words: list[str], folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", *words)


def test_sizes_are_bounded(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(folder, "config.json", "at most")


def test_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(folder, "config.json", "no permission to read it")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nobody-at-all/x", "circle/x", "a\udcff"])
def test_impossible_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused(name if name.startswith("~") else f"{tmp_path}/{name}")  # type: ignore[arg-type]


def test_pipe_in_place_of_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "config.json", "a pipe")
