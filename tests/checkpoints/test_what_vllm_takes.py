"""What compressed-tensors holds for vLLM: rotations at run time, embeddings, scales per head, int8 outputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from checkpoints.toy import (
    assert_same_layer,
    calibrated,
    linear_weights,
    llama_source,
    quantized_layer,
    quantized_llama,
)
from detent import formats as f
from detent.checkpoints import (
    LayerCheckpoint,
    LayerFormats,
    ModelFormats,
    QuantizedWriter,
    Source,
    choose,
    layouts,
    open_quantized,
    wanted_layouts,
)
from detent.checkpoints.compressed_tensors import rotations
from detent.checkpoints.compressed_tensors.schemes import PACK
from detent.errors import DetentError
from detent.formats import Format, Scales, decode
from detent.nn.hadamard import hadamard_transform
from detent.runs.load import load_quantized

INT8 = (f.integer(8, f.per_channel(0)), f.integer(8, f.per_token(), dynamic=True), None)
TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
(BY_NAME,) = wanted_layouts("compressed-tensors")


def written(
    folder: Path, layers: list[LayerCheckpoint], source: Source, cache: Format | None = None, heads: int = 2
) -> ModelFormats:
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, cache, ("lm_head",))
    with QuantizedWriter(folder, source=source, formats=formats, layout=BY_NAME) as writer:
        for layer in layers:
            writer.add_layer(layer)
        for name in source:
            if name.removesuffix(".weight") not in formats.layers:
                writer.add_tensor(name, source.tensor(name))
        for n in range(2) if cache else ():
            low = calibrated(f.fp8(), -n - 1.0, n + 1.0).scale
            scales = Scales(torch.stack([low, low * 2]).reshape(1, heads, 1, 1))
            writer.add_kv(f"model.layers.{n}.self_attn", scales, scales)
        writer.finish()
    return formats


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


class TestRotation:
    def layers(self, folder: Path) -> tuple[Source, list[LayerCheckpoint]]:
        source = Source(llama_source(folder / "source"))
        layers = [quantized_layer(name, weight, INT8) for name, weight in linear_weights(source).items()]
        return source, [replace(x, rotated=48) if x.name.endswith("down_proj") else x for x in layers]

    def test_round_trip(self, tmp_path: Path) -> None:
        source, layers = self.layers(tmp_path)
        formats = written(tmp_path / "out", layers, source)
        (group,) = config(tmp_path / "out")["transform_config"]["config_groups"].values()
        assert group["head_dim"] == 48
        assert group["apply"][0]["targets"] == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
        found = open_quantized(tmp_path / "out")
        assert found.formats.layers == formats.layers
        assert not any("rotation" in name for name in found.kept)
        for layer in layers:
            assert_same_layer(found.layer(layer.name), layer)
        with torch.no_grad():
            rotated = load_quantized(tmp_path / "out")(TOKENS).logits
            plain = [replace(layer, rotated=0) for layer in layers]
            written(tmp_path / "plain", plain, source)
            assert not torch.equal(rotated, load_quantized(tmp_path / "plain")(TOKENS).logits)

    @pytest.mark.parametrize("size", [4, 12, 48, 64, 96])
    def test_compressed_tensors_own_transform(self, size: int) -> None:
        """Their hooks, given the tensors of the file, turn what Detent turns."""
        transform = pytest.importorskip("compressed_tensors.transform")
        module = torch.nn.Module()
        module.down_proj = torch.nn.Linear(192, 8, bias=False)
        before = module.down_proj.weight.detach().clone()
        described = rotations.transform_config(
            {"down_proj": LayerFormats((8, 192), rotated=size)}, lambda name: [f"re:.*{name}$"]
        )
        transform.apply_transform_config(module, transform.TransformConfig.model_validate(described))
        stored = rotations.matrix(size)[f"rotation_{size}_input.weight"].float()
        turn = getattr(module.down_proj, f"rotation_{size}_input")
        if described["config_groups"][f"rotation_{size}"]["type"] == "hadamard":
            assert torch.equal(turn.weight, stored)  # Sylvester's matrix, which their kernels have built in
        else:
            turn.weight.data = stored
        x = torch.randn(5, 192)
        found = module.down_proj(x)
        torch.testing.assert_close(found, linear(hadamard_transform(x, size), before), rtol=1e-4, atol=1e-4)
        # vLLM multiplies with the matrix over the square root of its size (`HadamardTransform.forward`).
        by_hand = x.double().unflatten(-1, (-1, size)) @ (stored.double() / math.sqrt(size))
        torch.testing.assert_close(by_hand.flatten(-2).float(), hadamard_transform(x, size), rtol=1e-4, atol=1e-5)

    def test_only_by_name(self, tmp_path: Path) -> None:
        _, layers = self.layers(tmp_path)
        formats = ModelFormats({layer.name: layer.formats for layer in layers})
        layout, reasons = choose(formats)
        assert layout.name == "detent"
        assert "transformers would misread; for vLLM, ask for compressed-tensors by name" in reasons[0]
        assert choose(formats, wanted_layouts("compressed-tensors"))[0].name == "compressed-tensors"
        assert BY_NAME.needs(formats).keys() == {"vLLM"}

    def test_too_large_a_matrix(self) -> None:
        formats = ModelFormats({"a": LayerFormats((8, 14336), INT8[0], rotated=14336)})
        with pytest.raises(
            DetentError, match=r"blocks of 14336: powers of two .*rotation_size.*the layout detent holds"
        ):
            choose(formats, [BY_NAME])
        assert BY_NAME.can_hold(ModelFormats({"a": LayerFormats((8, 14336), INT8[0], rotated=2048)})) is None

    def test_an_edited_config(self, tmp_path: Path) -> None:
        source, layers = self.layers(tmp_path)
        written(tmp_path / "out", layers, source)
        path = tmp_path / "out" / "config.json"
        content = json.loads(path.read_text())
        del content["quantization_config"]["transform_config"]
        path.write_text(json.dumps(content))
        with pytest.raises(DetentError, match="transform_config of quantization_config is not what the weights"):
            open_quantized(tmp_path / "out")

    def test_of_other_tools(self, tmp_path: Path) -> None:
        source, layers = self.layers(tmp_path)
        written(tmp_path / "out", layers, source)
        file = tmp_path / "out" / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
        with pytest.raises(DetentError, match="its weights are transformed"):
            open_quantized(tmp_path / "out")


class TestEmbedding:
    def test_round_trip(self, tmp_path: Path) -> None:
        source = Source(llama_source(tmp_path / "source"))
        fmt = f.integer(4, f.per_group(32))
        weights = {**linear_weights(source), "model.embed_tokens": source.tensor("model.embed_tokens.weight")}
        layers = [
            quantized_layer(name, w, (fmt, None, None), "Embedding" if "embed" in name else "Linear")
            for name, w in weights.items()
        ]
        written(tmp_path / "out", layers, source)
        (group,) = config(tmp_path / "out")["config_groups"].values()
        assert group["targets"] == ["Embedding", "Linear", "model.embed_tokens"]
        assert_same_layer(open_quantized(tmp_path / "out").layer("model.embed_tokens"), layers[-1])
        assert layers[-1].weight is not None
        model = load_quantized(tmp_path / "out")
        assert torch.equal(model.get_parameter("model.embed_tokens.weight"), decode(layers[-1].weight))

    @pytest.mark.parametrize(
        "fmt",
        [f.integer(3, f.per_group(32)), f.integer(4, f.per_group(32), symmetric=False), f.integer(8), f.fp8()],
        ids=str,
    )
    def test_what_would_be_looked_up_wrongly(self, fmt: Format) -> None:
        formats = ModelFormats({"model.embed_tokens": LayerFormats((96, 64), fmt, kind="Embedding")})
        assert "Embedding in other than symmetric integers of 2, 4 or 8 bits" in (BY_NAME.can_hold(formats) or "")

    def test_only_by_name(self) -> None:
        fmt = f.integer(8, f.per_channel(0))
        formats = ModelFormats({"model.embed_tokens": LayerFormats((96, 64), fmt, kind="Embedding")})
        assert "transformers would misread" in (layouts["compressed-tensors"].can_hold(formats) or "")
        assert BY_NAME.can_hold(formats) is None


class TestScalesPerHead:
    CACHE = f.fp8(granularity=f.per_channel(1))

    def folder(self, tmp_path: Path) -> Path:
        source = Source(llama_source(tmp_path / "source"))
        layers = [quantized_layer(name, w, INT8) for name, w in linear_weights(source).items()]
        written(tmp_path / "out", layers, source, self.CACHE)
        return tmp_path / "out"

    def test_round_trip(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        assert config(folder)["kv_cache_scheme"]["strategy"] == "attn_head"
        assert load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_scale"].shape == (2, 1, 1)
        key, _ = open_quantized(folder).kv_scales()["model.layers.1.self_attn"]
        assert torch.equal(key.scale.flatten(), torch.tensor([2 / 448, 4 / 448]))
        quantizer = load_quantized(folder).model.layers[1].self_attn.k_bmm_quantizer
        x = torch.randn(1, 2, 3, 16) * 3
        by_hand = torch.stack([(x[0, h] / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                               for h, s in enumerate((2 / 448, 4 / 448))])  # fmt: skip
        torch.testing.assert_close(quantizer(x)[0], by_hand)

    def test_transformers(self, tmp_path: Path) -> None:
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM

        model, report = AutoModelForCausalLM.from_pretrained(self.folder(tmp_path), output_loading_info=True)
        assert not report["unexpected_keys"]
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]
        assert torch.equal(model.model.layers[1].self_attn.k_scale.flatten(), torch.tensor([2 / 448, 4 / 448]))

    def test_what_another_tool_wrote(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        file = folder / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
        found = open_quantized(folder)
        assert found.formats.kv_cache == self.CACHE
        assert found.kv_scales()["model.layers.0.self_attn"][1].scale.shape == (1, 2, 1, 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_int8_outputs_beside_narrow_weights(bits: int, tmp_path: Path) -> None:
    """Packed, as vLLM takes them; transformers computes what was simulated."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    int8 = f.integer(8, f.per_tensor())
    quantized_llama(tmp_path, lambda name: (f.integer(bits, f.per_channel(0)), int8, int8))
    assert config(tmp_path / "out")["format"] == PACK
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
        torch.testing.assert_close(found, load_quantized(tmp_path / "out")(TOKENS).logits, rtol=1e-3, atol=1e-3)


def test_kinds_of_another_sort() -> None:
    formats = ModelFormats({"a": LayerFormats((8, 64), f.integer(8, f.per_channel(0)), kind="Conv1d")})
    assert "Conv1d modules: only Linear and Embedding ones" in (BY_NAME.can_hold(formats) or "")
