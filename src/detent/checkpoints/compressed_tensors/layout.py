"""The compressed-tensors layout, as vLLM, SGLang and transformers read it.

`CompressedTensorsLayout` writes and `CompressedTensorsReader` reads: both lay out what a `QTensor` holds.
Facts about the layout are those of compressed-tensors 0.20; docs/checkpoints.md lists what its reader does with them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from detent.checkpoints.compressed_tensors import foreign, rotations
from detent.checkpoints.compressed_tensors import schemes as ct
from detent.checkpoints.layout import Layout, left_description
from detent.checkpoints.records import LayerCheckpoint, LayerFormats, ModelFormats, assemble
from detent.checkpoints.source import Source
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.schemas import CompressedTensorsConfig
from detent.formats import E2M1, E2M3, Format, Integer, QTensor, Scales
from detent.formats.packing import pack, pack_int32, unpack, unpack_int32
from detent.formats.stored import check_scales, check_stored

#: The version of compressed-tensors whose layout this is.
VERSION = "0.20.0"
#: A group that no layer is in. While it merges experts, transformers 5 decodes them by the first group that has "re:"
#: and "experts" in a target, else by the first group; weights that aren't packed pass through by an FP8 group alone.
_PLAIN_EXPERTS = {
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "input_activations": None,
    "output_activations": None,
    "format": ct.FLOAT,
    "targets": ["re:experts that stay in floating point$"],
}


class CompressedTensorsLayout(Layout):
    """Writes compressed-tensors."""

    name = "compressed-tensors"
    engines = ("vLLM", "SGLang", "transformers")

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone

    def with_details(self, *, alone: bool = False, **details: Any) -> CompressedTensorsLayout:
        """`alone`: asked for by name, so that it may hold what vLLM loads and transformers misreads."""
        return CompressedTensorsLayout(alone)

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """See `schemes.needs`."""
        return ct.needs(formats)

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout cannot hold the model: the first layer's that it cannot."""
        for name, layer in formats.layers.items():
            if layer.low_rank:
                return f"compressed-tensors does not hold {name}: a low-rank branch"
            try:
                _check_alone(layer, self.alone)
                _scheme(layer)
            except ct.NotHeld as reason:
                return f"compressed-tensors does not hold {name}: {reason}"
        if formats.attention is not None:
            return "compressed-tensors does not hold quantized attention probabilities"
        if formats.keys_rotated:
            return "compressed-tensors does not hold keys that are rotated at run time: no engine rotates them"
        if formats.kv_cache is not None:
            try:
                ct.kv_cache_args(formats.kv_cache)
            except ct.NotHeld as reason:
                return f"compressed-tensors does not hold {reason}"
        return None

    def layer_tensors(self, layer: LayerCheckpoint) -> dict[str, Tensor]:
        """The tensors of one layer, by their full names."""
        tensors = {}
        if layer.weight is not None:
            formats = layer.formats
            layout = ct.layout_of(formats.weight, formats.input, formats.output)
            tensors = _weight_tensors(layer.weight, layout)
        for side, activation in (("input", layer.input), ("output", layer.output)):
            if activation is not None and activation.scales is not None:
                tensors |= _scale_tensors(side, activation.format, activation.scales)
        if layer.rotated:
            tensors |= rotations.matrix(layer.rotated)
        return {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}

    def kv_tensors(self, module: str, key: Scales, value: Scales, *more: Scales) -> dict[str, Tensor]:
        """The scales of keys and values: one number, or one for each head as [heads, 1, 1]."""
        shape = (-1, 1, 1) if key.scale.dim() else (1,)
        return {f"{module}.{side}_scale": s.scale.reshape(shape) for side, s in (("k", key), ("v", value))}

    def exact(self, layer: LayerCheckpoint) -> dict[str, str]:
        """The outer scales of a layer, which the layout rounds, as exact hexadecimal numbers."""
        scales = {"weight": layer.weight.scales if layer.weight else None}
        scales |= {side: a.scales for side, a in (("input", layer.input), ("output", layer.output)) if a is not None}
        outer = {side: s.outer_scale for side, s in scales.items() if s is not None}
        return {side: float(scale).hex() for side, scale in outer.items() if scale is not None}

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says under "quantization_config"."""
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in formats.layers.items():
            scheme = _scheme(layer)
            group = groups.setdefault(json.dumps(scheme), scheme | {"targets": []})
            group["targets"] += _targets(name, formats)
            # Most models of vLLM give their embedding no name, so that it is found by its class alone.
            if layer.kind == "Embedding" and layer.kind not in group["targets"]:
                group["targets"].append(layer.kind)
        if len(groups) == 1:
            # "Linear" is part of the names of vLLM's classes too, but not of that of its output embedding, which is
            # looked up by its module's name. It and everything else outside the numbered blocks are named as well.
            outside = [name for name in formats.layers if not any(map(str.isdigit, name.split(".")))]
            targets = [target for name in outside for target in _targets(name, formats)]
            kinds = sorted({layer.kind for layer in formats.layers.values()} | {"Linear"})
            next(iter(groups.values()))["targets"] = [*kinds, *targets]
        layouts = {group["format"] for group in groups.values()} - {ct.DENSE}
        if formats.merges and not _is_fp8(next(iter(groups.values()), {}).get("weights")):
            groups[""] = _PLAIN_EXPERTS
        # transformers decodes all experts by the first group.
        order = sorted(groups.values(), key=lambda group: not any(".experts." in name for name in group["targets"]))
        config = {
            "quant_method": self.name,
            "version": VERSION,
            "quantization_status": "compressed",
            "format": layouts.pop() if len(layouts) == 1 else ct.MIXED if layouts else ct.DENSE,
            "config_groups": {f"group_{n}": group for n, group in enumerate(order)},
            "ignore": list(formats.ignored),
            "kv_cache_scheme": None,
        }
        if formats.kv_cache is not None:
            config["kv_cache_scheme"] = ct.kv_cache_args(formats.kv_cache)
        if (turned := rotations.transform_config(formats.layers, lambda name: _targets(name, formats))) is not None:
            config["transform_config"] = turned
        return config


def _check_alone(layer: LayerFormats, alone: bool) -> None:
    """Raise NotHeld for what vLLM alone loads, unless the user asks for it."""
    what = "an input that is rotated at run time" if layer.rotated else f"{layer.kind} modules"
    if layer.rotated and (reason := rotations.why_not(layer.rotated)):
        raise ct.NotHeld(reason)
    if (layer.rotated or layer.kind == "Embedding") and not alone:
        raise ct.NotHeld(f"{what}, which transformers would misread; for vLLM, ask for compressed-tensors by name")


def _turned(config: dict[str, Any] | None) -> dict[str, int]:
    """{name of a group: number of targets} of a transform_config."""
    groups = (config or {}).get("config_groups") or {}
    return {name: sum(len(args["targets"]) for args in group["apply"]) for name, group in groups.items()}


def _targets(name: str, formats: ModelFormats) -> list[str]:
    """What names a layer: as in the file, and as transformers' model class has it."""
    return [_target(each) for each in dict.fromkeys((name, formats.aliases.get(name, name)))]


def _is_fp8(weights: dict[str, Any] | None) -> bool:
    return weights is not None and (weights["type"], weights["num_bits"]) == ("float", 8)


def _target(name: str) -> str:
    """What names a module in "targets". Engines put a prefix before modules at the top of a model that is part of a
    larger one (``language_model.lm_head``), and translate dotted names alone."""
    return name if "." in name else rf"re:(.*\.)?{re.escape(name)}$"


def _scheme(layer: LayerFormats) -> dict[str, Any]:
    """A layer's entry in config_groups, targets aside. Raises NotHeld."""
    if layer.kind not in ("Linear", "Embedding"):
        raise ct.NotHeld(f"{layer.kind} modules: only Linear and Embedding ones")
    if layer.kind == "Embedding" and not ct.is_looked_up(layer):
        raise ct.NotHeld(
            "an Embedding in other than symmetric integers of 2, 4 or 8 bits with a scale per channel or group"
        )
    if len(layer.shape) != 2:
        raise ct.NotHeld(f"weights of shape {layer.shape}: it stores matrices only")
    out_features, in_features = layer.shape
    return {
        "weights": None if layer.weight is None else ct.weight_args(layer.weight, layer.shape),
        "input_activations": None if layer.input is None else ct.activation_args(layer.input, in_features),
        "output_activations": None if layer.output is None else ct.activation_args(layer.output, out_features),
        "format": ct.layout_of(layer.weight, layer.input, layer.output),
    }


def _offset(fmt: Format) -> int:
    """What is taken from our codes and zero points to get theirs, which are signed."""
    return 2 ** (fmt.element.bits - 1) if isinstance(fmt.element, Integer) and not fmt.element.signed else 0


def _scale_tensors(side: str, fmt: Format, scales: Scales) -> dict[str, Tensor]:
    """Scale, signed zero point (asymmetric formats only) and the reciprocal of the outer scale, unpacked."""
    if scales.outer_scale is not None:
        tensors = {f"{side}_global_scale": (1.0 / scales.outer_scale.to(torch.float32)).reshape(1)}
        return tensors if scales.scale.numel() == 0 else {f"{side}_scale": scales.scale, **tensors}
    tensors = {f"{side}_scale": scales.scale.reshape(scales.scale.shape or (1,))}
    if scales.zero_point is not None:
        zero_point = (scales.zero_point - _offset(fmt)).to(torch.int8)
        tensors[f"{side}_zero_point"] = zero_point.reshape(zero_point.shape or (1,))
    return tensors


def _weight_tensors(q: QTensor, layout: str) -> dict[str, Tensor]:
    tensors = _scale_tensors("weight", q.format, q.scales)
    if layout == ct.PACK:
        bits = q.format.element.bits
        tensors["weight_packed"] = pack_int32(q.codes, bits, flip=not _offset(q.format))
        tensors["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
        if "weight_zero_point" in tensors and q.scale.dim() == 2:
            # Packed along the output axis, so that a shard of output rows holds whole words.
            unsigned = (tensors["weight_zero_point"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
            tensors["weight_zero_point"] = pack_int32(unsigned.t().contiguous(), bits).t().contiguous()
    elif layout == ct.INT:
        # Bytes wrap around: 3 - 8 is 251, which as a signed byte is -5.
        tensors["weight"] = (q.codes - _offset(q.format)).view(torch.int8)
    elif layout in (ct.NVFP4, ct.MXFP4, ct.MXFP6):
        tensors["weight_packed"] = pack(q.codes, q.format.element.bits)
    else:
        tensors["weight"] = q.codes
    return tensors


class CompressedTensorsReader:
    """Reads compressed-tensors, whether Detent or another tool wrote it.

    Args:
        source: the opened folder.
        reordered: whether the caller minds ``weight_g_idx``, the group of each column; they are refused otherwise.

    Attributes:
        formats: the formats of the model. Where another tool wrote the file they are made from config.json, which
            leaves out how scales were computed; codes and scales are read exactly all the same.
        used: the names of all tensors that belong to quantized layers or to the key/value cache.
        described: whether Detent wrote it, and left a description.
    """

    def __init__(self, source: Source, *, reordered: bool = False) -> None:
        self.source = source
        self._outer: dict[str, dict[str, str]] = {}
        where = f"{source.path / 'config.json'}: quantization_config"
        check_as(CompressedTensorsConfig, source.config["quantization_config"], where)
        left = left_description(source)
        foreign.refuse_what_is_not_read(source, reordered=reordered, transformed=left is not None)
        self.described = left is not None
        if left is None:
            self.formats = foreign.infer_formats(source)
        else:
            self.formats, self._outer = left
            self._check_config(source)
        self.used = {name for name in source if self._belongs(*foreign.split(name))}

    def _check_config(self, source: Source) -> None:
        """Engines read config.json alone, so it has to say what the note in the weights' header says.

        Raises:
            DetentError: a group of layers, or the key/value cache, is described otherwise.
        """
        config = source.config["quantization_config"]
        wanted = {json.dumps(_scheme(layer), sort_keys=True) for layer in self.formats.layers.values()}
        groups = (config.get("config_groups") or {}).values()
        found = {json.dumps({k: v for k, v in group.items() if k != "targets"}, sort_keys=True) for group in groups}
        plain = json.dumps({k: v for k, v in _PLAIN_EXPERTS.items() if k != "targets"}, sort_keys=True)
        cache = None if self.formats.kv_cache is None else ct.kv_cache_args(self.formats.kv_cache)
        turned = rotations.transform_config(self.formats.layers, lambda name: _targets(name, self.formats))
        for what, differ in (
            ("config_groups", found - {plain} != wanted - {plain}),
            ("transform_config", _turned(config.get("transform_config")) != _turned(turned)),
            ("kv_cache_scheme", config.get("kv_cache_scheme") != cache),
        ):
            if differ:
                raise DetentError(
                    f"{source.path / 'config.json'}: {what} of quantization_config is not what the weights were written"
                    " with; one of the two was edited. Quantize again"
                )

    def _belongs(self, module: str, part: str) -> bool:
        if part in ("k_scale", "v_scale"):
            return self.formats.kv_cache is not None
        if (turned := rotations.rotated_module(module)) is not None:
            return turned in self.formats.layers and self.formats.layers[turned].rotated > 0
        if module not in self.formats.layers:
            return False
        if part == "weight":
            return self.formats.layers[module].weight is not None
        return bool(re.fullmatch(r"(weight|input|output)_(packed|shape|scale|zero_point|global_scale|g_idx)", part))

    def layer(self, name: str) -> LayerCheckpoint:
        """The contents of one layer, read now.

        Raises:
            DetentError: a tensor is missing or has the wrong shape.
        """
        layer = self.formats.layers[name]
        return assemble(
            name,
            layer,
            lambda fmt: self._weight(name, fmt, layer.shape),
            lambda side, fmt: self._calibrated(name, side, fmt),
        )

    def check(self) -> None:
        """Look at everything but codes: that all tensors are there, in the shapes and dtypes of their formats, and that
        scales are such as can have been written.

        Raises:
            DetentError: naming the tensor.
        """
        for name, layer in self.formats.layers.items():
            if layer.weight is not None:
                self._expect_codes(name, layer.weight, layer.shape)
                self._weight_scales(name, layer.weight, layer.shape)
            for side, fmt in layer.calibrated:
                self._calibrated(name, side, fmt)
        self.kv_scales()

    def kv_scales(self) -> dict[str, tuple[Scales, ...]]:
        """(scales of keys, scales of values) by attention module; empty where none were calibrated."""
        kv_cache = self.formats.kv_cache
        if kv_cache is None or kv_cache.dynamic:
            return {}
        modules = dict.fromkeys(foreign.split(n)[0] for n in self.source if n.endswith((".k_scale", ".v_scale")))

        def scales(name: str) -> Scales:
            heads = self.source.info(name).shape if ct.is_per_head(kv_cache) else ()
            stored = self._tensor(name, (*heads[:1], 1, 1) if heads else (), kv_cache.scale.stored_dtype)
            found = Scales(stored[None] if heads else stored)
            check_scales(kv_cache, found, self._place(name))
            return found

        return {module: (scales(f"{module}.k_scale"), scales(f"{module}.v_scale")) for module in modules}

    def _place(self, name: str) -> str:
        return f"{self.source.path / self.source.info(name).file}: {name}"

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise DetentError unless a tensor has this shape and dtype; a scalar may be stored with the shape (1,)."""
        info = self.source.info(name)
        if info.dtype != dtype or (info.shape != shape and not (shape == () and info.shape == (1,))):
            raise DetentError(
                f"{self.source.path / info.file}: {name} is {info.dtype} {info.shape},"
                f" not {dtype} {shape} as config.json says"
            )

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape and dtype, read now."""
        self._expect(name, shape, dtype)
        return self.source.tensor(name).reshape(shape)

    def _calibrated(self, name: str, side: str, fmt: Format) -> Scales:
        scale_name = f"{name}.{side}_scale"
        if fmt.has_outer_scale:
            empty = torch.empty(0, dtype=fmt.scale.stored_dtype)
            scale_name = f"{name}.{side}_global_scale"
            scales = Scales(empty, outer_scale=self._outer_scale(name, side))
        else:
            scales = Scales(self._tensor(scale_name, (), fmt.scale.stored_dtype))
            if fmt.zero_point == "int":
                zero_point = self._tensor(f"{name}.{side}_zero_point", (), torch.int8)
                scales = Scales(scales.scale, zero_point.to(torch.int32) + _offset(fmt))
        check_scales(fmt, scales, self._place(scale_name))
        return scales

    def _outer_scale(self, name: str, side: str) -> Tensor:
        stored = self._tensor(f"{name}.{side}_global_scale", (), torch.float32)
        exact = self._outer.get(name, {}).get(side)
        if exact is None:
            return 1.0 / stored
        try:
            outer = torch.tensor(float.fromhex(exact), dtype=torch.float32)
        except (ValueError, OverflowError):
            outer = torch.zeros((), dtype=torch.float32)
        if not torch.equal(1.0 / outer, stored):
            raise DetentError(f"{self.source.path}: {name}.{side}_global_scale is not the one Detent wrote")
        return outer

    def _weight(self, name: str, fmt: Format, shape: tuple[int, ...]) -> QTensor:
        scales = self._weight_scales(name, fmt, shape)
        q = QTensor(fmt, shape, self._codes(name, fmt, shape), scales.scale, scales.zero_point, scales.outer_scale)
        return check_stored(q, f"{self.source.path}: {name}")

    def _weight_scales(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Scales:
        grid = fmt.granularity.grid(shape)
        scale = self._tensor(f"{name}.weight_scale", grid, fmt.scale.stored_dtype)
        outer = self._outer_scale(name, "weight") if fmt.has_outer_scale else None
        scales = Scales(scale, self._zero_point(name, fmt, grid, shape), outer)
        check_scales(fmt, scales, self._place(f"{name}.weight_scale"), of_weight=True)
        return scales

    def _expect_codes(self, name: str, fmt: Format, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], torch.dtype]:
        """(name, shape, dtype) of the tensor that holds a weight's codes, once it is known to be there.

        Raises:
            DetentError: it is missing or of another shape or dtype, or the file says another shape of the weight.
        """
        (rows, columns), bits = shape, fmt.element.bits
        declared = f"{name}.weight_shape"
        if declared in self.source.tensors and tuple(self._tensor(declared, (2,), torch.int64).tolist()) != shape:
            raise DetentError(f"{self._place(declared)}: it is not {shape}, the shape of the weight")
        stored: tuple[str, tuple[int, ...], torch.dtype]
        stored = f"{name}.weight_packed", (rows, -(-columns * bits // 32)), torch.int32
        if stored[0] not in self.source.tensors:
            integer = isinstance(fmt.element, Integer)
            stored = f"{name}.weight", shape, torch.int8 if integer else fmt.element.storage_dtype
        elif fmt.element in (E2M1, E2M3):
            stored = stored[0], (rows, -(-columns * bits // 8)), torch.uint8
        elif self.described and declared not in self.source.tensors:
            raise DetentError(f"{self.source.path}: {declared} is missing, which readers of packed weights need")
        self._expect(*stored)
        return stored

    def _codes(self, name: str, fmt: Format, shape: tuple[int, ...]) -> Tensor:
        stored, _, dtype = self._expect_codes(name, fmt, shape)
        codes, bits = self.source.tensor(stored), fmt.element.bits
        if not stored.endswith("_packed"):
            if not isinstance(fmt.element, Integer):
                return codes
            return (codes.to(torch.int16) + _offset(fmt)).to(fmt.element.storage_dtype)
        if dtype == torch.uint8:
            return unpack(codes, bits, shape[1])
        half = (1 << (bits - 1)) - _offset(fmt)
        return (unpack_int32(codes, bits, shape[1]).to(torch.int16) - half).to(fmt.element.storage_dtype)

    def _zero_point(self, name: str, fmt: Format, grid: tuple[int, ...], shape: tuple[int, ...]) -> Tensor | None:
        if fmt.zero_point != "int":
            return None
        bits, full = fmt.element.bits, f"{name}.weight_zero_point"
        if f"{name}.weight_packed" not in self.source.tensors or not grid:
            return self._tensor(full, grid, torch.int8).to(torch.int32) + _offset(fmt)
        packed = self._tensor(full, (-(-shape[0] * bits // 32), grid[1]), torch.int32)
        unsigned = unpack_int32(packed.t().contiguous(), bits, shape[0]).t().contiguous()
        return unsigned.to(torch.int32) - (1 << (bits - 1)) + _offset(fmt)
