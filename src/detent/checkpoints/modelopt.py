"""The unified layout of ModelOpt, as TensorRT-LLM, vLLM and SGLang take it.

The facts are those of ModelOpt 0.47. A word, ``quant_algo``, stands for the formats of a layer's weight and input;
where layers differ, ``MIXED_PRECISION`` lists the word of each. ``hf_quant_config.json`` says the same once more.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.beside import BesideLayout, BesideReader, StoredPart, as_glob, scale_dtype
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats
from detent.checkpoints.source import Source
from detent.checkpoints.told import told_weights
from detent.config import Scheme
from detent.errors import DetentError
from detent.external.files import check_as, is_file, read_as, shown
from detent.external.schemas import ModelOptConfig, ModelOptFile
from detent.formats import (
    Format,
    Integer,
    PowerOfTwoScale,
    Scales,
    fp8,
    integer,
    mx,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_token,
)
from detent.formats.packing import pack, unpack

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
HF_NAME = "hf_quant_config.json"
_MIXED = "MIXED_PRECISION"
#: {word: (weight, input)}. int4 is for any group size.
ALGORITHMS: dict[str, tuple[Format, Format | None]] = {
    "FP8": (fp8(), fp8()),
    "FP8_PER_CHANNEL_PER_TOKEN": (fp8("e4m3", per_channel(0)), fp8("e4m3", per_token(), dynamic=True)),
    "fp8_pb_wo": (fp8("e4m3", per_block({-1: 128, -2: 128})), None),
    "W8A8_SQ_PER_CHANNEL": (integer(8, per_channel(0)), integer(8)),
    "W8A16": (integer(8, per_channel(0)), None),
    "W4A16_AWQ": (integer(4, per_group(128)), None),
    "W4A8_AWQ": (integer(4, per_group(128)), fp8()),
    "NVFP4": (nvfp4(), nvfp4()),
    "W4A16_NVFP4": (nvfp4(), None),
    "W4A8_NVFP4_FP8": (nvfp4(32), fp8()),
    "mxfp4": (mx("e2m1"), mx("e2m1", dynamic=True)),
    "W4A8_MXFP4_FP8": (mx("e2m1"), fp8()),
    "MXFP8": (mx("e4m3"), mx("e4m3", dynamic=True)),
}
#: Other spellings of the words.
_SPELLINGS = {"NVFP4_AWQ": "NVFP4", "INT4_AWQ": "W4A16_AWQ", "INT8_SQ": "W8A8_SQ_PER_CHANNEL", "INT8_WO": "W8A16"}
#: Those that vLLM and SGLang read.
_READ_BY_ALL = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "NVFP4", "W4A16_NVFP4", "MXFP8"}
#: Those that ModelOpt also writes into ``config_groups``.
_GROUPED = ("FP8", "NVFP4", "W4A16_NVFP4")


class ModelOptLayout(BesideLayout):
    """Writes ModelOpt's unified layout."""

    name = "modelopt"
    engines = ("TensorRT-LLM", "vLLM", "SGLang")

    def adapt(self, scheme: Scheme) -> Scheme:
        """Scales of integers in float32."""
        return replace(scheme, weight=None if scheme.weight is None else scheme.weight.with_scale_dtype("float32"))

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """Words that TensorRT-LLM alone reads are left to it."""
        read = {_word(layer) for layer in formats.layers.values()} <= _READ_BY_ALL
        return dict.fromkeys(self.engines if read else self.engines[:1], "")

    def why_not(self, layer: LayerFormats) -> str | None:
        """None, or why no word of ModelOpt stands for a layer."""
        word = _word(layer)
        if word is None:
            return (
                f"no quant_algo stands for weight {layer.weight}, input {layer.input}, output {layer.output}; there are"
                f" {', '.join(ALGORITHMS)}"
            )
        if word.startswith("W4A") and "AWQ" in word and layer.shape[0] % 2:
            return f"a weight of {layer.shape[0]} rows: two rows share a byte"
        return None

    def weight_parts(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """Where a weight lies; of int4, rows in pairs share bytes."""
        parts = super().weight_parts(fmt, shape)
        if isinstance(fmt.element, Integer) and fmt.bits == 4:
            rows, columns = shape
            parts["weight"] = StoredPart("codes", (rows // 2, columns), torch.uint8, _pair, lambda t: _unpair(t, rows))
            parts["weight_scale"] = StoredPart("scale", fmt.granularity.grid(shape), fmt.scale.stored_dtype)
        elif fmt.granularity.kind == "per_block":
            down, across = fmt.granularity.grid(shape)
            parts["weight_scale"] = StoredPart("scale", (down, 1, across, 1), torch.float32)
        return parts

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer. int4 beside FP8 has the range of its values too, in which its kernels compute."""
        tensors = super().layer_tensors(layer)
        if layer.weight is not None and _word(layer.formats) == "W4A8_AWQ":
            tensors[f"{layer.name}.weight_scale_2"] = layer.weight.scale.abs().amax() * 7 / 448
        return tensors

    def kv_tensors(self, module: str, key: Scales, value: Scales, *more: Scales) -> dict[str, Tensor]:
        """The scales of keys and values, beside their projections."""
        return {f"{module}.{side}_proj.{side}_scale": s.scale.reshape(()) for side, s in (("k", key), ("v", value))}

    def cache_scales(self, fmt: Format, stored: Tensor) -> Scales:
        """The scales of keys or values; of NVFP4 too, amax / 448 is stored."""
        if not fmt.has_outer_scale:
            return Scales(stored)
        return Scales(torch.empty(0, dtype=fmt.scale.stored_dtype), outer_scale=stored / 6)

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says."""
        words = {name: _word(layer) or "" for name, layer in formats.layers.items()}
        plain = self._plain(formats)
        config: dict[str, Any] = {"quant_method": self.name, "quant_algo": plain["quant_algo"], "producer": PRODUCER}
        if set(words.values()) <= set(_GROUPED):
            groups: dict[str, list[str]] = {}
            for name, word in words.items():
                groups.setdefault(word, []).append(name)
            config["config_groups"] = {
                f"group_{n}": _group(word) | {"targets": ["Linear"] if len(groups) == 1 else names}
                for n, (word, names) in enumerate(groups.items())
            }
        config["ignore"] = plain["exclude_modules"]
        if "quantized_layers" in plain:
            config["quantized_layers"] = plain["quantized_layers"]
        if formats.kv_cache is not None:
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return config

    def more_files(self, formats: ModelFormats) -> dict[str, str]:
        """hf_quant_config.json."""
        return {HF_NAME: json.dumps({"producer": PRODUCER, "quantization": self._plain(formats)}, indent=4) + "\n"}

    def _plain(self, formats: ModelFormats) -> dict[str, Any]:
        """What hf_quant_config.json says of the layers."""
        each = {name: _described(layer) for name, layer in formats.layers.items()}
        kv = {"kv_cache_quant_algo": None if formats.kv_cache is None else "FP8"}
        first = next(iter(each.values()), {"quant_algo": None})
        excluded = {"exclude_modules": [as_glob(name) for name in formats.ignored]}
        if all(one == first for one in each.values()):
            return {"quant_algo": first["quant_algo"], **kv, **first, **excluded}
        return {"quant_algo": _MIXED, **kv, "quantized_layers": each, **excluded}

    def told(self, source: Source) -> ModelFormats:
        """The formats of a checkpoint that ModelOpt wrote."""
        config, where = _config(source)
        weights = told_weights(source) | _told_int4(source)
        layers = {}
        for name, layer in weights.items():
            own = (config.quantized_layers or {}).get(name)
            word = own.quant_algo if own is not None else config.quant_algo
            if config.quantized_layers and own is None and word == _MIXED:
                raise DetentError(f"{where}: {name} is quantized, but quantized_layers doesn't have it")
            layers[name] = _told_layer(layer, word, f"{where}: {name}")
        algo = config.kv_cache_quant_algo or config.kv_cache_scheme
        if isinstance(algo, dict) and (algo.get("type"), algo.get("num_bits")) == ("float", 8):
            algo = "FP8"
        if algo not in (None, "FP8", "NVFP4"):
            raise DetentError(
                f"{where}: a key/value cache in {shown(algo)} is not read by Detent; it reads FP8 and NVFP4"
            )
        cache = None if algo is None else nvfp4() if algo == "NVFP4" else fp8()
        return ModelFormats(layers, cache, tuple(config.ignore or config.exclude_modules or ()))


def _config(source: Source) -> tuple[ModelOptConfig, str]:
    """(what config.json says, or where it says nothing, hf_quant_config.json; its name for messages)."""
    path, where = source.path / HF_NAME, f"{source.path / 'config.json'}: quantization_config"
    found = source.config["quantization_config"]
    config = check_as(ModelOptConfig, found.get("quantization", found), where)
    if not is_file(path):
        return config, where
    beside = read_as(ModelOptFile, path).quantization
    if config.quant_algo is None:
        return beside, str(path)
    if beside.quant_algo != config.quant_algo:
        raise DetentError(
            f"{where}: quant_algo is {config.quant_algo}, but {beside.quant_algo} in {HF_NAME}; which one is meant?"
        )
    return config, where


def _told_layer(layer: LayerFormats, word: str | None, where: str) -> LayerFormats:
    """A layer of which the weight is known, with the input that the word stands for."""
    if word is None:
        return layer
    name = _SPELLINGS.get(word, {w.lower(): w for w in ALGORITHMS}.get(word.lower(), ""))
    if name not in ALGORITHMS:
        raise DetentError(f"{where}: quant_algo {word!r} is not read by Detent; known: {', '.join(ALGORITHMS)}")
    weight, given = ALGORITHMS[name]
    assert layer.weight is not None
    ours, theirs = _meaning(weight), _meaning(layer.weight)
    in_groups = "per_group" in (weight.granularity.kind, layer.weight.granularity.kind)
    same = (
        ours == theirs if in_groups else (ours[0], ours[2]) == (theirs[0], theirs[2])
    )  # tensors say what shares a scale
    if not same:
        raise DetentError(f"{where}: its tensors are {layer.weight}, which is not {word}")
    wanted = layer.weight.with_granularity(weight.granularity)  # where a block is as long as an axis, both are alike
    alike = not in_groups and math.prod(wanted.granularity.grid(layer.shape)) == math.prod(
        layer.weight.granularity.grid(layer.shape)
    )
    return LayerFormats(layer.shape, wanted if alike else layer.weight, given)


def _told_int4(source: Source) -> dict[str, LayerFormats]:
    """int4: rows in pairs share bytes, which the number of rows of the scales tells."""
    found = {}
    for name, info in source.tensors.items():
        scale = source.tensors.get(f"{name}_scale")
        if scale is None or info.dtype != torch.uint8 or scale.dtype != torch.float32 or len(info.shape) != 2:
            continue
        if len(scale.shape) != 2 or scale.shape[0] != 2 * info.shape[0] or info.shape[1] % max(1, scale.shape[1]):
            raise DetentError(f"{source.path}: {name}_scale has shape {scale.shape}; codes are {info.shape}, in pairs")
        fmt = integer(4, per_group(max(1, info.shape[1] // max(1, scale.shape[1]))))
        found[name.removesuffix(".weight")] = LayerFormats((2 * info.shape[0], info.shape[1]), fmt)
    return found


def _meaning(fmt: Format | None) -> Any:
    """What readers tell formats by: the rules that made the scales, and the size of groups of int4, aside."""
    if fmt is None:
        return None
    element = (fmt.bits, fmt.element.signed) if isinstance(fmt.element, Integer) else fmt.element
    scale = "e8m0" if isinstance(fmt.scale, PowerOfTwoScale) else (scale_dtype(fmt), fmt.scale.outer)
    int4 = isinstance(fmt.element, Integer) and fmt.bits == 4 and fmt.granularity.kind == "per_group"
    granularity = "groups" if int4 else fmt.granularity
    return element, granularity, scale, fmt.zero_point, fmt.dynamic, fmt.base


def _word(layer: LayerFormats) -> str | None:
    mine = _meaning(layer.weight), _meaning(layer.input)
    words = (word for word, pair in ALGORITHMS.items() if (_meaning(pair[0]), _meaning(pair[1])) == mine)
    return None if layer.output is not None else next(words, None)


def _described(layer: LayerFormats) -> dict[str, Any]:
    word = _word(layer)
    assert layer.weight is not None
    size = layer.weight.granularity.group_size
    described: dict[str, Any] = {"quant_algo": word}
    if size is not None and word != "mxfp4":
        described["group_size"] = size
    if word in ("W4A16_AWQ", "W4A8_AWQ"):  # channel scales are folded into other weights
        described |= {"has_zero_point": False, "pre_quant_scale": False}
    return described


def _group(word: str) -> dict[str, Any]:
    def args(fmt: Format) -> dict[str, Any]:
        size = fmt.granularity.group_size
        described = {"dynamic": False, "num_bits": fmt.bits, "type": "float"}
        return described if size is None else described | {"group_size": size}

    weight, given = ALGORITHMS[word]
    return ({} if given is None else {"input_activations": args(given)}) | {"weights": args(weight)}


def _pair(codes: Tensor) -> Tensor:
    return pack(codes.t().contiguous(), 4).t().contiguous()


def _unpair(stored: Tensor, rows: int) -> Tensor:
    return unpack(stored.t().contiguous(), 4, rows, torch.int8).t().contiguous()


class ModelOptReader(BesideReader):
    """Reads ModelOpt's layout."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, ModelOptLayout())

    def _parts(self, module: str, layer: LayerFormats) -> dict[str, StoredPart]:
        parts = super()._parts(module, layer)
        if layer.weight is not None and layer.weight.bits == 4 and isinstance(layer.weight.element, Integer):
            parts["weight_scale_2"] = StoredPart(
                "range", (), torch.float32
            )  # what its values are multiplied and divided by
        return parts
