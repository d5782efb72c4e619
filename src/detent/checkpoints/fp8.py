"""FP8 in three dialects, by what the layers hold: that of AutoFP8, the blocks of DeepSeek, and MXFP8 of transformers.

AutoFP8 has one scale for each weight, ``weight_scale``, and quantizes inputs, under a calibrated ``input_scale`` or one
made for each input. DeepSeek has one scale for each block, ``weight_scale_inv``, and scales inputs in groups as wide as
a block. MXFP8 has an exponent for each 32 elements of weights, also called ``weight_scale_inv``, and of inputs.
"""

from __future__ import annotations

from typing import Any

from detent.checkpoints.beside import BesideLayout, BesideReader, StoredPart, scale_dtype
from detent.checkpoints.records import LayerFormats, ModelFormats
from detent.checkpoints.source import Source, quant_method
from detent.checkpoints.told import told_weights
from detent.errors import DetentError
from detent.external.files import check_as
from detent.external.schemas import Fp8Config
from detent.formats import E4M3, Format, PowerOfTwoScale, fp8, mx, per_group, per_tensor, per_token

_HELD = (
    "FP8 E4M3 with one scale for the weight and one for the input (w_fp8_a_fp8, or its input dynamic), FP8 in blocks"
    " with dynamic inputs in groups as wide (w_fp8_per_block_a_fp8_per_group), or MXFP8 (w_mxfp8_a_mxfp8)"
)


class Fp8Layout(BesideLayout):
    """Writes FP8 as AutoFP8, DeepSeek or transformers have it."""

    name = "fp8"
    engines = ("vLLM", "SGLang", "transformers")

    def can_hold(self, formats: ModelFormats) -> str | None:
        """None, or the reason why this layout can't hold the model; all layers are of one dialect."""
        if reason := super().can_hold(formats):
            return reason
        dialects = {name: _dialect(layer) for name, layer in formats.layers.items()}
        first = next(iter(dialects.values()), None)
        other = next((name for name, dialect in dialects.items() if dialect != first), None)
        if other is not None:
            return f"fp8 does not hold {other}: {dialects[other]}, where other layers are {first}; all have to be alike"
        if first is not None and first[0] == "mxfp8" and formats.kv_cache is not None:
            return "fp8 does not hold a key/value cache beside MXFP8, whose readers have no place for it"
        return None

    def needs(self, formats: ModelFormats) -> dict[str, str]:
        """transformers reads blocks and MXFP8; of AutoFP8 it would leave the scales out."""
        read = all((_dialect(layer) or ("",))[0] in ("block", "mxfp8") for layer in formats.layers.values())
        return dict.fromkeys(self.engines if read else self.engines[:2], "")

    def why_not(self, layer: LayerFormats) -> str | None:
        """None, or why none of the dialects has a layer."""
        dialect = _dialect(layer)
        if dialect is None:
            return f"weight {layer.weight}, input {layer.input}, output {layer.output}: only {_HELD}"
        for size, length in zip(layer.shape, dialect[1:], strict=False):
            blocks = -(-size // length)
            if size > length and size % blocks == 0 and size // blocks != length:
                return f"{size} elements in blocks of {length}: transformers would take them for {blocks} equal ones"
        return None

    def weight_parts(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, StoredPart]:
        """Where a weight lies."""
        parts = super().weight_parts(fmt, shape)
        if isinstance(fmt.scale, PowerOfTwoScale) or fmt.granularity.kind == "per_block":
            scale = parts.pop("weight_scale")
            parts["weight_scale_inv"] = StoredPart("scale", fmt.granularity.grid(shape), scale.dtype)
        return parts

    def quantization_config(self, formats: ModelFormats) -> dict[str, Any]:
        """What config.json says. Patterns are regular expressions to transformers without a mark."""
        kind, *block = next((d for layer in formats.layers.values() if (d := _dialect(layer))), ("static",))
        stays = [name.removeprefix("re:") for name in formats.ignored]
        if kind == "mxfp8":
            how: dict[str, Any] = {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
            return {"quant_method": "mxfp8", "activation_scheme": "dynamic", **how, "modules_to_not_convert": stays}
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "static" if kind == "static" else "dynamic",
        }
        if kind == "block":
            config |= {"fmt": "e4m3", "weight_block_size": block, "modules_to_not_convert": stays}
        else:
            config["ignored_layers"] = stays
        if formats.kv_cache is not None:
            config["kv_cache_scheme"] = "static"
        return config

    def told(self, source: Source) -> ModelFormats:
        """The formats of a checkpoint that another tool wrote."""
        where = f"{source.path / 'config.json'}: quantization_config"
        config = check_as(Fp8Config, source.config["quantization_config"], where)
        block, static = config.weight_block_size, config.activation_scheme == "static"
        by_token = quant_method(source.config) == "fbgemm_fp8"
        if block is not None and static:
            raise DetentError(
                f"{where}: weights in blocks have inputs that are scaled anew, not activation_scheme static"
            )
        layers = {}
        for name, layer in told_weights(source, None if block == [1, 32] else block).items():
            assert layer.weight is not None
            given = fp8("e4m3", per_token() if by_token else per_tensor(), dynamic=by_token or not static)
            if isinstance(layer.weight.scale, PowerOfTwoScale):
                given = mx("e4m3", dynamic=True)
            elif block is not None:
                given = fp8("e4m3", per_group(block[1]), dynamic=True)
            layers[name] = LayerFormats(layer.shape, layer.weight, given)
        ends = (".k_scale", ".k_proj.output_scale", ".kv_scale")
        cache = fp8() if any(name.endswith(ends) for name in source) else None
        stays = config.modules_to_not_convert or config.ignored_layers or ()
        return ModelFormats(layers, cache, tuple(stays))


def _dialect(layer: LayerFormats) -> tuple[Any, ...] | None:
    """("static",), ("dynamic",), ("block", rows, columns), ("mxfp8",), or None."""
    weight, given = layer.weight, layer.input
    if weight is None or given is None or layer.output is not None or weight.element != E4M3 or given.element != E4M3:
        return None
    if isinstance(weight.scale, PowerOfTwoScale) or isinstance(given.scale, PowerOfTwoScale):
        alike = isinstance(weight.scale, PowerOfTwoScale) and isinstance(given.scale, PowerOfTwoScale)
        return ("mxfp8",) if alike and given.dynamic else None
    if scale_dtype(weight) != "float32":
        return None
    granularity, kind = weight.granularity, given.granularity.kind
    if granularity == per_tensor() and kind in ("per_tensor", "per_token"):
        return ("dynamic",) if given.dynamic else ("static",) if kind == "per_tensor" else None
    blocks = {axis % 2: length for axis, length in granularity.blocks}
    if granularity.kind != "per_block" or None in (blocks.get(0), blocks.get(1)):
        return None
    return ("block", blocks[0], blocks[1]) if given.dynamic and given.granularity.group_size == blocks[1] else None


class Fp8Reader(BesideReader):
    """Reads FP8 of all dialects."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, Fp8Layout())
