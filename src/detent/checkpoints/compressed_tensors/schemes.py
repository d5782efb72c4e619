"""Formats as compressed-tensors says them: `Format` to quantization arguments and back.

The vocabulary is that of compressed-tensors 0.20 (``QuantizationArgs``). What is refused here is what its reader would
get wrong or not read at all, found by loading such files with it.
"""

from __future__ import annotations

from typing import Any

import torch

from detent.checkpoints.records import LayerFormats, ModelFormats
from detent.errors import DetentError
from detent.formats import (
    E2M1,
    E2M3,
    E4M3,
    FloatScale,
    Format,
    Granularity,
    Integer,
    PowerOfTwoScale,
    SearchedScale,
    fp8,
    integer,
    mx,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from detent.formats.elements import Element
from detent.formats.scales import ScaleDtype

Args = dict[str, Any]

PACK = "pack-quantized"
INT = "int-quantized"
FLOAT = "float-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP6 = "mxfp6-pack-quantized"
MXFP8 = "mxfp8-quantized"
DENSE = "dense"
MIXED = "mixed-precision"

_MX_LAYOUTS = {E2M1: MXFP4, E2M3: MXFP6, E4M3: MXFP8}
_PLAIN_SCALES = ("float32", "bfloat16", "float16")


class NotHeld(Exception):
    """Compressed-tensors has no words for a format; the message says why."""


def weight_args(fmt: Format, shape: tuple[int, ...]) -> Args:
    """The arguments of a weight of shape (out, in). Raises NotHeld."""
    if len(shape) != 2:
        raise NotHeld(f"weights of shape {shape}: it stores matrices only")
    args = _element_args(fmt)
    if _is_mx(fmt) or _is_nvfp4(fmt):
        size = 32 if _is_mx(fmt) else 16
        if shape[1] % size:
            raise NotHeld(f"{shape[1]} input features, not a multiple of {size}: its reader takes no short last group")
        return args | {"dynamic": False}
    return args | _weight_strategy(fmt, shape) | {"dynamic": False}


def activation_args(fmt: Format, features: int) -> Args:
    """The arguments of an activation whose last axis has `features` elements. Raises NotHeld."""
    args = _element_args(fmt)
    if isinstance(fmt.element, Integer) and fmt.element.narrow:
        raise NotHeld("narrow-range activations: its integers use their whole range")
    size = fmt.granularity.group_size
    if size is not None and features % size:
        raise NotHeld(f"activations of {features} features in groups of {size}: its reader takes no short last group")
    if _is_nvfp4(fmt):
        if fmt.dynamic:
            raise NotHeld("NVFP4 activations whose outer scale is dynamic: it stores a calibrated one")
        return args | {"dynamic": "local"}
    if _is_mx(fmt):
        if not fmt.dynamic:
            raise NotHeld("calibrated exponents of MX activations: they are recomputed for every tensor")
        return args | {"dynamic": True}
    if fmt.granularity.kind == "per_tensor":
        return args | {"strategy": "tensor", "dynamic": fmt.dynamic}
    if not fmt.dynamic:
        raise NotHeld(f"calibrated {fmt.granularity} activation scales: only per-tensor ones")
    if fmt.granularity.kind == "per_token":
        return args | {"strategy": "token", "dynamic": True}
    if size is not None:
        return args | {"strategy": "group", "group_size": size, "dynamic": True}
    raise NotHeld(f"{fmt.granularity} activations")


def kv_cache_args(fmt: Format) -> Args:
    """The arguments of keys and values: per tensor or head, symmetric, calibrated, as engines read them. Raises
    NotHeld."""
    if not (fmt.granularity.kind == "per_tensor" or is_per_head(fmt)) or fmt.dynamic or not fmt.symmetric:
        raise NotHeld(f"a key/value cache as {fmt}: only symmetric ones with calibrated scales per tensor or head")
    if not (fmt.element == E4M3 or (isinstance(fmt.element, Integer) and fmt.element.bits == 8)):
        raise NotHeld(f"a key/value cache of {fmt.element.name}: only FP8 E4M3 and int8")
    if is_per_head(fmt):
        return _element_args(fmt) | {"strategy": "attn_head", "dynamic": False}
    return activation_args(fmt, 1)


def is_per_head(fmt: Format) -> bool:
    """Whether keys [batch, heads, tokens, features] have a scale for each head."""
    return fmt.granularity == per_channel(1)


def is_looked_up(layer: LayerFormats) -> bool:
    """Whether vLLM looks an embedding of these formats up. It takes other widths and zero points, too, and misreads
    them: it unpacks 32 // bits codes of a word, and leaves zero points out."""
    w = layer.weight
    if w is None or not isinstance(w.element, Integer) or layer.input is not None or layer.output is not None:
        return False
    return w.bits in (2, 4, 8) and w.symmetric and w.granularity.kind in ("per_channel", "per_group")


def layout_of(weight: Format | None, input: Format | None = None, output: Format | None = None) -> str:
    """The name of the on-disk format of a layer: what its readers take, and where they take several, the smallest."""
    if weight is None:
        return DENSE
    if _is_nvfp4(weight):
        return NVFP4
    if _is_mx(weight):
        return _MX_LAYOUTS[weight.element]  # type: ignore[index]
    if weight.element == E4M3:
        return FLOAT
    return PACK if (input is None and output is None) or _computes_packed(weight, input, output) else INT


def _computes_packed(weight: Format, input: Format | None, output: Format | None) -> bool:
    """Whether vLLM takes packed integers with the layer's integer inputs: where those are symmetric, with scales
    computed for each token or group; and narrow weights where inputs and outputs are int8 with one calibrated scale
    each. Of unpacked integers it takes 8-bit weights with one scale per channel or tensor.
    """
    if input is None or not isinstance(input.element, Integer):
        return False
    if output is not None:
        return weight.bits < 8 and weight.granularity.kind != "per_tensor" and _is_static_int8(input, output)
    scaled_in_rows = input.granularity.kind == "per_token" or input.granularity.group_size is not None
    takes_input = input.dynamic and input.symmetric and scaled_in_rows and input.element.bits in (4, 8)
    in_groups = weight.granularity.group_size is not None
    narrow = weight.bits < 8 or input.element.bits < 8
    return takes_input and (in_groups or (narrow and weight.granularity.kind == "per_channel"))


def _is_static_int8(*formats: Format) -> bool:
    return all(
        isinstance(f.element, Integer)
        and f.bits == 8
        and f.symmetric
        and not f.dynamic
        and f.granularity.kind == "per_tensor"
        for f in formats
    )


def _is_mx(fmt: Format) -> bool:
    return isinstance(fmt.scale, PowerOfTwoScale)


def _is_nvfp4(fmt: Format) -> bool:
    return isinstance(fmt.scale, FloatScale) and fmt.scale.outer


def _element_args(fmt: Format) -> Args:
    """Type, width, symmetry; for MX and NVFP4 also group and scale type, which are fixed."""
    if fmt.base is not None:
        raise NotHeld("progressive formats: it holds one format per weight")
    if isinstance(fmt.scale, PowerOfTwoScale):
        if fmt.element not in _MX_LAYOUTS or fmt.scale.micro or fmt.granularity.group_size != 32:
            raise NotHeld(f"{fmt}: of the power-of-two formats, only MXFP4, MXFP6 E2M3 and MXFP8 E4M3 in blocks of 32")
        return _args(fmt.element, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")
    if isinstance(fmt.scale, SearchedScale):
        raise NotHeld(f"{fmt}: a format of GGUF")
    if fmt.scale.outer:
        if fmt.element != E2M1 or fmt.scale.dtype != "e4m3" or fmt.granularity.group_size != 16:
            raise NotHeld(f"{fmt}: under an outer scale, only FP4 in groups of 16 with E4M3 scales")
        e4m3 = "torch.float8_e4m3fn"
        return _args(fmt.element, strategy="tensor_group", group_size=16, scale_dtype=e4m3, zp_dtype=e4m3)
    if fmt.scale.dtype not in _PLAIN_SCALES:
        raise NotHeld(f"{fmt.scale.dtype} scales without an outer scale")
    if isinstance(fmt.element, Integer):
        if fmt.zero_point == "float":
            raise NotHeld("zero points that are not integers")
        if fmt.zero_point == "none" and not fmt.element.signed:
            raise NotHeld("unsigned integers without a zero point")
    elif fmt.element != E4M3:
        raise NotHeld(f"{fmt.element.name} elements with a float scale: only integers and FP8 E4M3")
    return _args(fmt.element) | {"symmetric": fmt.symmetric}


def _args(element: Element, **more: Any) -> Args:
    kind = "int" if isinstance(element, Integer) else "float"
    return {"num_bits": element.bits, "type": kind, "symmetric": True, **more}


def _weight_strategy(fmt: Format, shape: tuple[int, ...]) -> Args:
    granularity = fmt.granularity
    if granularity.kind == "per_tensor":
        return {"strategy": "tensor"}
    rows, columns = granularity.lengths(shape)
    if (rows, columns) == (1, shape[1]):  # a group no shorter than the row, too
        return {"strategy": "channel"}
    if rows == 1:
        if shape[1] % columns:
            fitting = next((size for size in (128, 64, 32, 16) if size < columns and shape[1] % size == 0), None)
            raise NotHeld(
                f"groups of {columns} in rows of {shape[1]} input features: its reader takes no short last group."
                + (f" A group size of {fitting} for this layer keeps the model loadable" if fitting else "")
            )
        return {"strategy": "group", "group_size": columns}
    declared = {axis % 2: length for axis, length in granularity.blocks}
    block = [declared.get(0), declared.get(1)]
    if fmt.element != E4M3 or None in block:
        raise NotHeld(f"{fmt}: scales per block are for FP8 E4M3 only, and need both block lengths")
    return {"strategy": "block", "block_structure": block}


# What engines need.

_HUMMING = "humming-kernels, on CUDA"


def needs(formats: ModelFormats) -> dict[str, str]:
    """What each engine needs for these formats; those that are known not to load them are left out. For vLLM this is
    what version 0.32 does with each scheme (tools/verify_vllm), for transformers its reader."""
    layers = formats.layers.values()
    wants = dict.fromkeys(filter(None, (_vllm(layer) for layer in layers)))
    if formats.kv_cache is not None and formats.kv_cache.element != E4M3:
        wants["-"] = None
    found = {"vLLM": "; ".join(w for w in wants if w != "-")} if "-" not in wants else {}
    if not any(layer.rotated or layer.kind == "Embedding" for layer in layers):
        integers = any(layer.weight is not None and isinstance(layer.weight.element, Integer) for layer in layers)
        found |= {"SGLang": ""} if "vLLM" in found and not (integers and _HUMMING in wants) else {}
        packed = [f for f in layers if f.weight is not None and layout_of(f.weight, f.input, f.output) == PACK]
        zeros = any(f.weight is not None and not f.weight.symmetric for f in packed)
        found["transformers"] = "compressed-tensors" + zeros * ", with CompressedTensorsConfig(dequantize=True)"
    return found


def _vllm(layer: LayerFormats) -> str:
    """What vLLM needs for a layer; "-" if it doesn't load it."""
    weight, input, output = layer.weight, layer.input, layer.output
    if layer.rotated:
        return "CUDA for blocks of a power of two, layers without a bias, one GPU"
    if weight is None:
        return "-"
    if _is_nvfp4(weight):
        return "" if input is None or _is_nvfp4(input) else "-"
    if _is_mx(weight):
        if weight.element == E2M3 or (input is not None and not _is_mx(input) and not input.dynamic):
            return "-"
        return "CUDA"
    if not isinstance(weight.element, Integer):
        per_row = weight.granularity.kind in ("per_tensor", "per_channel", "per_block")
        takes = input is None or input.element == E4M3 and (input.dynamic or input.granularity.kind == "per_tensor")
        return "" if per_row and takes and output is None else "-"
    layout, kind = layout_of(weight, input, output), weight.granularity.kind
    if layout == PACK:
        if kind == "per_tensor":
            return "-"
        group = weight.granularity.group_size
        if output is not None:
            return "" if weight.bits in (2, 4) and weight.symmetric else "-"
        known = weight.bits in (4, 8) if weight.symmetric else weight.bits == 4
        marlin = input is None and known and group in (None, 32, 64, 128)
        return "" if marlin or layer.kind == "Embedding" else _HUMMING
    if input is None or not isinstance(input.element, Integer):
        return "-"
    if output is not None:
        return "" if weight.symmetric and kind != "per_tensor" and _is_static_int8(input, output) else "-"
    by_token = input.dynamic and input.granularity.kind == "per_token"
    calibrated = not input.dynamic and input.granularity.kind == "per_tensor"
    eight = weight.bits == input.bits == 8 and weight.symmetric and kind in ("per_tensor", "per_channel")
    return "" if eight and (by_token or calibrated) else "-"


# The other direction, for files whose writer left no description.


def format_from_args(args: Args, scale_dtype: torch.dtype | None, where: str) -> Format:
    """The format that arguments stand for.

    Args:
        args: as in config.json.
        scale_dtype: of the stored scales; None where none are stored.
        where: what error messages call it.

    Raises:
        DetentError: arguments that Detent doesn't read.
    """
    kind, bits, strategy = args.get("type", "int"), int(args.get("num_bits", 8)), _strategy_of(args)
    dynamic = args.get("dynamic") is True
    if kind == "float" and bits == 4 and strategy == "tensor_group":
        return nvfp4(int(args["group_size"]), dynamic=dynamic)
    if kind == "float" and bits in (4, 6, 8) and _says_mx(args):
        return mx({4: "e2m1", 6: "e2m3", 8: "e4m3"}[bits], dynamic=dynamic)
    granularity = _granularity(strategy, args, where)
    if kind == "float" and bits == 8:
        fmt = fp8("e4m3", granularity, dynamic=dynamic)
    elif kind == "int" and 2 <= bits <= 8:
        fmt = integer(bits, granularity, symmetric=bool(args.get("symmetric", True)), dynamic=dynamic)
    else:
        raise DetentError(f"{where}: {kind} values of {bits} bits with {strategy} scales are not read by Detent")
    names: dict[torch.dtype | None, ScaleDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return fmt.with_scale_dtype(names.get(scale_dtype, "float32"))


def _says_mx(args: Args) -> bool:
    """Older files tell MXFP4 and MXFP6 by the group alone; 8 bits in groups of 32 are MX only with bytes for scales."""
    if args.get("group_size") != 32:
        return False
    return args.get("num_bits") in (4, 6) or str(args.get("scale_dtype")).endswith("uint8")


def _strategy_of(args: Args) -> str:
    if args.get("strategy") is not None:
        return str(args["strategy"])
    size = args.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _granularity(strategy: str, args: Args, where: str) -> Granularity:
    if strategy == "tensor":
        return per_tensor()
    if strategy == "channel":
        return per_channel(0)
    if strategy == "attn_head":
        return per_channel(1)
    if strategy == "token":
        return per_token()
    if strategy == "group":
        return per_group(int(args["group_size"]))
    if strategy == "block":
        block = args["block_structure"]
        if isinstance(block, str):
            block = block.split("x")
        return per_block({-2: int(block[0]), -1: int(block[1])})
    raise DetentError(f"{where}: scales by {strategy!r} are not read by Detent")
