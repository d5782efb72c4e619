"""What the checkpoint tests share: tiny models on disk, quantizing them by hand, and comparing what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from detent.checkpoints import Activation, LayerCheckpoint, ModelFormats, QuantizedWriter, Source
from detent.formats import Format, QTensor, Scales, encode, scales_from_range

#: (format of the weight, of the input, of the output) of a linear layer, by its name.
Plan = Callable[[str], tuple[Format | None, Format | None, Format | None]]


def toy_source(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A checkpoint folder with the least that one needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(tensors or {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_source(folder: Path, dtype: torch.dtype = torch.float32, hidden: int = 64, tied: bool = False) -> Path:
    """A random two-layer Llama with grouped-query attention, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def calibrated(fmt: Format, low: float = -3.7, high: float = 3.3) -> Scales:
    """Scales as calibration would leave them."""
    if fmt.has_outer_scale:
        empty = torch.empty(0, dtype=fmt.scale.stored_dtype)
        return Scales(empty, outer_scale=torch.tensor(3.7 / (6 * 448)))
    return scales_from_range(fmt, torch.tensor(low), torch.tensor(high))


def activation(fmt: Format | None) -> Activation | None:
    return None if fmt is None else Activation(fmt, None if fmt.dynamic else calibrated(fmt))


def quantized_layer(
    name: str, weight: Tensor, formats: tuple[Format | None, Format | None, Format | None], kind: str = "Linear"
) -> LayerCheckpoint:
    q = None if formats[0] is None else encode(weight, formats[0], name=name)
    return LayerCheckpoint(name, tuple(weight.shape), q, activation(formats[1]), activation(formats[2]), kind)


def linear_weights(source: Source) -> dict[str, Tensor]:
    """The weights of a Llama's linear layers, lm_head aside, by module name."""
    return {name.removesuffix(".weight"): source.tensor(name) for name in source if name.endswith("_proj.weight")}


def write(
    out: Path,
    source: Source,
    layers: Iterable[LayerCheckpoint],
    *,
    kv_cache: Format | None = None,
    ignored: tuple[str, ...] = ("lm_head",),
    **options: Any,
) -> Path:
    """A quantized checkpoint of `layers`; all other tensors stay as they are."""
    layers = list(layers)
    formats = ModelFormats({layer.name: layer.formats for layer in layers}, kv_cache, ignored)
    replaced = {f"{layer.name}.weight" for layer in layers if layer.weight is not None}
    with QuantizedWriter(out, source=source, formats=formats, **options) as writer:
        for layer in layers:
            writer.add_layer(layer)
        for name in source:
            if name not in replaced:
                writer.add_tensor(name, source.tensor(name))
        if kv_cache is not None and not kv_cache.dynamic:
            for n in range(source.config["num_hidden_layers"]):
                key, value = calibrated(kv_cache, -n - 1.0, n + 1.0), calibrated(kv_cache, -0.5, 0.5)
                writer.add_kv(f"model.layers.{n}.self_attn", key, value)
        return writer.finish()


def quantized_llama(
    folder: Path, plan: Plan, dtype: torch.dtype = torch.float32, **options: Any
) -> list[LayerCheckpoint]:
    """Write a quantized Llama into folder/"out" from folder/"source"; returns its layers."""
    source = Source(llama_source(folder / "source", dtype, tied=options.pop("tied", False)))
    layers = [quantized_layer(name, weight, plan(name)) for name, weight in linear_weights(source).items()]
    write(folder / "out", source, layers, **options)
    return layers


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor: NaN, negative zero and small floats compare as what they are."""
    return tensor.flatten().clone().view(torch.uint8).tolist()


def assert_same_tensor(found: Tensor | None, wanted: Tensor | None, what: str) -> None:
    assert (found is None) == (wanted is None), what
    if found is None or wanted is None:
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), what
    assert bits(found) == bits(wanted), what


def assert_same_weight(found: QTensor, wanted: QTensor, what: str) -> None:
    assert (found.format, found.shape) == (wanted.format, wanted.shape), what
    for part in ("codes", "scale", "zero_point", "outer_scale", "micro"):
        assert_same_tensor(getattr(found, part), getattr(wanted, part), f"{what}: {part}")


def assert_same_layer(found: LayerCheckpoint, wanted: LayerCheckpoint) -> None:
    assert found.formats == wanted.formats
    assert found.name == wanted.name
    if wanted.weight is not None:
        assert found.weight is not None
        assert_same_weight(found.weight, wanted.weight, f"{wanted.name} {wanted.weight.format}")
    for side in ("input", "output"):
        there, here = getattr(found, side), getattr(wanted, side)
        if here is not None and here.scales is not None:
            for part in ("scale", "zero_point", "outer_scale"):
                what = f"{wanted.name} {side} {here.format}: {part}"
                assert_same_tensor(getattr(there.scales, part), getattr(here.scales, part), what)
