"""transformers' own doors: Detent's layout and models with quantizers, through from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import detent
from checkpoints.toy import linear_weights, llama_source, quantized_layer, quantized_llama
from detent import DetentError
from detent import formats as f
from detent.checkpoints import LayerCheckpoint, ModelFormats, QuantizedWriter, Source
from detent.formats import decode, fake_quantize
from detent.runs.load import load_quantized
from structure.zoo import make as make_from_zoo
from tiny_language_model import make_model

F32 = torch.float32
TOKENS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
INT8 = (f.integer(8, f.per_channel(0)), f.integer(8, f.per_token(), dynamic=True), None)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def detent_layout(folder: Path) -> list[LayerCheckpoint]:
    """A Llama in Detent's own layout: integer inputs, rotated inputs, low-rank branches, and a quantized cache."""
    source = Source(llama_source(folder / "source"))
    layers = [quantized_layer(name, weight, INT8) for name, weight in linear_weights(source).items()]
    layers = [replace(layer, rotated=32) if layer.name.endswith("down_proj") else layer for layer in layers]
    layers = [
        replace(layer, low_rank=(torch.randn(3, layer.shape[1]) / 9, torch.randn(layer.shape[0], 3) / 9))
        if layer.name.endswith("up_proj")
        else layer
        for layer in layers
    ]
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, f.fp8(dynamic=True), ("lm_head",))
    with QuantizedWriter(folder / "out", source=source, formats=formats) as writer:
        for layer in layers:
            writer.add_layer(layer)
        for name in source:
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, source.tensor(name))
        writer.finish()
    return layers


class TestDetentLayout:
    def test_weights_and_inputs_against_hooks(self, tmp_path: Path) -> None:
        """The oracle: transformers' load of the original, with decoded weights and inputs quantized by hooks."""
        plan = (f.mx("int8"), f.integer(8, f.per_tensor()), None)
        layers = quantized_llama(tmp_path, lambda name: plan)
        wanted = load(tmp_path / "source")
        for layer in layers:
            assert layer.weight is not None
            assert layer.input is not None
            module, a = wanted.get_submodule(layer.name), layer.input
            module.weight.data = decode(layer.weight, F32)
            module.register_forward_pre_hook(lambda _, args, a=a: (fake_quantize(args[0], a.format, a.scales),))
        found = load(tmp_path / "out")
        assert torch.equal(logits(found), logits(wanted))
        assert type(found).__name__ == "LlamaForCausalLM"
        assert found.generate(TOKENS[:1], max_new_tokens=2, do_sample=False).shape == (1, 14)

    def test_everything_it_holds(self, tmp_path: Path) -> None:
        detent_layout(tmp_path)
        wanted = logits(load_quantized(tmp_path / "out"))
        assert not torch.equal(wanted, logits(load(tmp_path / "source")))
        assert torch.equal(logits(load(tmp_path / "out", device_map="cpu")), wanted)
        half = load(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(logits(half), logits(load_quantized(tmp_path / "out", dtype=torch.bfloat16)))

    def test_saved_again(self, tmp_path: Path) -> None:
        detent_layout(tmp_path)
        model = load(tmp_path / "out")
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again")), logits(model))

    def test_its_base_model_and_other_classes(self, tmp_path: Path) -> None:
        from transformers import AutoModel, AutoModelForSequenceClassification

        detent_layout(tmp_path)
        base = AutoModel.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            hidden = load(tmp_path / "out").model(TOKENS).last_hidden_state
            assert torch.equal(base(TOKENS).last_hidden_state, hidden)
        with pytest.raises(DetentError, match="LlamaForSequenceClassification can't load"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")

    def test_several_devices(self, tmp_path: Path) -> None:
        detent_layout(tmp_path)
        with pytest.raises(DetentError, match="to one device, not to cpu, disk"):
            load(tmp_path / "out", device_map={"model": "cpu", "lm_head": "disk"})

    def test_damaged(self, tmp_path: Path) -> None:
        detent_layout(tmp_path)
        config = tmp_path / "out" / "config.json"
        config.write_text(config.read_text().replace('"low_rank": 3', '"low_rank": 4'))
        with pytest.raises(DetentError, match=r"low_rank\.a is \(3, 64\), not \(4, 64\)"):
            load(tmp_path / "out")

    @pytest.mark.slow
    def test_import_alone_is_enough(self, tmp_path: Path) -> None:
        """Whichever of the two is imported first."""
        detent_layout(tmp_path)
        for imports in ("import detent, transformers", "import transformers.modeling_utils, detent"):
            code = (
                f"{imports}\nm = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
                "print(m.model.layers[0].mlp.down_proj.input_quantizer.rotation.block_size)"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            assert done.stdout.strip() == "32"


def quantized(config: dict[str, Any], **options: Any) -> Any:
    return detent.quantize(make_model(**options), config, lambda model: model(TOKENS))


class TestStateOfQuantizers:
    @pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG"])
    def test_there_and_back(self, name: str, tmp_path: Path) -> None:
        model = quantized(getattr(detent, name))
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert detent.detent_state(again) == detent.detent_state(model)
        for (n, ours), (m, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert n == m
            assert torch.equal(ours, theirs), n

    def test_packed_weights(self, tmp_path: Path) -> None:
        model = quantized(detent.INT8_WEIGHT_ONLY_CFG)
        wanted = logits(model)
        detent.compress(model)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(logits(again), wanted)
        assert again.model.layers[0].mlp.up_proj.is_packed

    def test_experts_in_one_tensor(self, tmp_path: Path) -> None:
        model = detent.quantize(make_from_zoo("mixtral").float(), detent.INT8_WEIGHT_ONLY_CFG)
        model.save_pretrained(tmp_path)
        assert torch.equal(
            logits(load(tmp_path, experts_implementation="eager", attn_implementation="eager")), logits(model)
        )

    def test_training_goes_on(self, tmp_path: Path) -> None:
        model = quantized(detent.INT8_DEFAULT_CFG)
        model.save_pretrained(tmp_path)
        again = load(tmp_path).train()
        again(TOKENS, labels=TOKENS).loss.backward()
        assert again.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        again.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), logits(again))

    def test_nothing_of_an_earlier_save_is_left(self, tmp_path: Path) -> None:
        model = make_model()
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        quantized(detent.INT8_DEFAULT_CFG).save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
            "quant_method": "detent_state"
        }

    def test_refused(self, tmp_path: Path) -> None:
        model = quantized(detent.INT8_DEFAULT_CFG)
        with pytest.raises(DetentError, match="takes no push_to_hub"):
            model.save_pretrained(tmp_path / "a", push_to_hub=True)
        with pytest.raises(DetentError, match="takes no variant"):
            model.save_pretrained(tmp_path / "a", variant="fp16")
        (tmp_path / "file").touch()
        with pytest.raises(DetentError, match="file: cannot be written"):
            model.save_pretrained(tmp_path / "file")
        assert not (tmp_path / "a").exists()
        model.save_pretrained(tmp_path / "b")
        with pytest.raises(DetentError, match='was saved in float32; load it with dtype="auto"'):
            load(tmp_path / "b", dtype=torch.bfloat16)
        with pytest.raises(DetentError, match="is quantized with detent_state"):
            load_quantized(tmp_path / "b")

    def test_damaged(self, tmp_path: Path) -> None:
        quantized(detent.INT8_DEFAULT_CFG).save_pretrained(tmp_path)
        make_model().save_pretrained(tmp_path / "float")
        (tmp_path / "float" / "model.safetensors").replace(tmp_path / "model.safetensors")
        with pytest.raises(DetentError, match="holds no quantizer state"):
            load(tmp_path)
