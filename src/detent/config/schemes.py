"""Scheme names of the command line: ``w_int4_per_group_sym``, ``w_fp8_a_fp8``, ``w_mxfp4_a_mxfp8``, ...

A scheme is a format for weights and, if named, one for the inputs (``a``) and one for the outputs (``o``) of each
linear layer, in the grammar of `detent.config.format_names`::

    scheme = "w_" format [ "_a_" format ] [ "_o_" format ]

What the last format specifies also holds for earlier formats of the same element: ``w_int8_a_int8_per_tensor_sym`` has
8-bit integers per tensor, symmetric, on both sides, and ``w_fp4_a_fp4_scale_fp8`` has E4M3 scales on both. "dynamic" is
never taken over: it describes activations. Older and shorter names are translated into this grammar below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from detent.config.base import nearest, shown
from detent.config.format_names import FormatName, Options, Role, build_format, check_options, parse_name
from detent.config.quant_cfg import QuantCfg
from detent.errors import DetentError
from detent.formats import GGUF_FORMATS, Format, fp8, per_channel

#: The schemes of AMD Quark's quantize_quark.py, in its order, as far as they are in the grammar.
_QUARK = (
    "w_fp8_a_fp8",
    "w_fp8_a_fp8_o_fp8",
    "w_fp8_per_channel_static_a_fp8_per_token_dynamic",
    "w_int8_a_int8_per_tensor_sym",
    "w_int8_a_int8_per_tensor_sym_dynamic",
    "w_int8_a_int8_per_token_dynamic",
    "w_int8_per_channel_a_int8_per_tensor_sym",
    "w_int8_per_channel_a_int8_per_tensor_sym_dynamic",
    "w_int8_per_tensor_sym",
    "w_int8_per_group_sym",
    "w_uint8_a_uint8_per_tensor_asym",
    "w_uint8_per_group_asym",
    "w_int4_per_channel_sym",
    "w_int4_per_channel_asym",
    "w_int4_per_group_sym",
    "w_int4_per_group_asym",
    "w_uint4_per_channel_sym",
    "w_uint4_per_channel_asym",
    "w_uint4_per_group_sym",
    "w_uint4_per_group_asym",
    "w_uint4_a_bfloat16_per_group_asym",
    "w_uint4_a_uint4_per_channel",
    "w_uint4_per_channel_a_int8_per_tensor",
    "w_uint4_per_group_a_int8_per_tensor",
    "w_uint4_per_token_a_int8_per_channel",
    "w_int3_per_group_asym",
    "w_int3_per_channel_asym",
    "w_int2_per_group_asym",
    "w_fp4_per_group",
    "w_fp4_per_group_a_fp4_per_group",
    "w_fp4_per_group_a_fp8_e4m3_per_group",
    "w_fp6_e3m2_per_group_a_fp6_e3m2_per_group",
    "w_fp6_e2m3_per_group_a_fp6_e2m3_per_group",
    "w_fp4_scale_fp8",
    "w_fp4_a_fp4_scale_fp8",
    "w_bfp16",
    "w_bfp16_a_bfp16",
    "w_bfp16_per_group_sym",
    "w_mx6",
    "w_mx6_a_mx6",
    "w_mxint8",
    "w_mxfp8",
    "w_mxfp8_a_mxfp8",
    "w_mxfp6_e3m2",
    "w_mxfp6_e3m2_a_mxfp6_e3m2",
    "w_mxfp6_e2m3",
    "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "w_mxfp4",
    "w_mxfp4_a_mxfp4",
    "w_mxfp4_a_mxfp6",
    "w_mxfp4_a_mxfp6_e3m2",
    "w_mxfp4_a_mxfp6_e2m3",
    "w_mxfp4_a_mxfp8",
)

#: Irregular and short names, and what they are in the grammar.
_ALIASES = {
    # quantize_quark.py's irregular names
    "ptpc_fp8": "w_fp8_per_channel_static_a_fp8_per_token_dynamic",
    "w_fp8_per_channel_sym": "w_fp8_per_channel_a_fp8_per_tensor_o_fp8_per_tensor",
    "w_int8_per_tensor_mse": "w_int8_a_int8_per_tensor_sym_mse",
    "w_int8_per_tensor_percentile": "w_int8_a_int8_per_tensor_sym_percentile",
    "w_uint8_per_tensor_mse": "w_uint8_a_uint8_per_tensor_asym_mse",
    "w_uint8_per_tensor_percentile": "w_uint8_a_uint8_per_tensor_asym_percentile",
    "w_mxfp4_diffs": "w_mxfp4",
    # today's short ones
    "int8": "w_int8_a_int8_per_tensor_sym",
    "fp8": "w_fp8_a_fp8",
    "mxfp4": "w_mxfp4_a_mxfp4",
    "mxfp4_weight_only": "w_mxfp4",
    "mxfp6_e3m2": "w_mxfp6_e3m2_a_mxfp6_e3m2",
    "mxfp6_e2m3": "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "mxfp4_mxfp6_e2m3": "w_mxfp4_a_mxfp6_e2m3",
    "mxfp4_fp8": "w_mxfp4_a_fp8_per_tensor",
    "amdfp4": "w_fp4_a_fp4_g16_scale_ue5m3",
    "amdfp4_g32": "w_fp4_a_fp4_g32_scale_ue5m3",
    "amdfp4_global16": "w_fp4_a_fp4_g16_scale_ue5m3_global",
    "amdfp4_global32": "w_fp4_a_fp4_g32_scale_ue5m3_global",
    "int4_fp8": "w_int4_on_fp8_a_fp8_per_tensor_dynamic",
    "mx6": "w_mx6_a_mx6",
    "mx9": "w_mx9_a_mx9",
    "bfp16": "w_bfp16_a_bfp16",
    "nvfp4": "w_fp4_a_fp4_scale_fp8",
    "fp4_block16_scale_e4m3": "w_fp4_a_fp4_scale_fp8",
}
#: Deprecated names; they follow from writing mx_fp4 for mxfp4, and so on.
_DEPRECATED = (
    "w_mx_fp4_a_mx_fp6_sym",
    "w_mx_int8_per_group_sym",
    "w_mx_fp4_a_mx_fp4_sym",
    "w_mxfp4_a_mxfp4_sym",
    "w_mx_fp6_e3m2_sym",
    "w_mx_fp6_e2m3_sym",
    "w_mx_fp6_e3m2_a_mx_fp6_e3m2",
    "w_mx_fp6_e2m3_a_mx_fp6_e2m3",
    "w_mx_fp8_a_mx_fp8",
)
#: Families of short names: weights only (wo), or weights and activations (wa), in groups or per channel.
_SHORT = re.compile(r"(?P<element>u?int[2-8])_w(?P<sides>[oa])_(?P<tiles>per_channel|[1-9]\d*)")


@dataclass(frozen=True)
class Scheme:
    """What to do with every linear layer.

    Attributes:
        name: the name in the grammar.
        weight, input, output: the formats, None for "left as it is".
        weight_calibrator, input_calibrator, output_calibrator: how static ranges are found: ``max``, ``mse``,
            ``percentile`` or ``entropy``.
        aliases: other names of the same scheme.
    """

    name: str
    weight: Format | None = None
    input: Format | None = None
    output: Format | None = None
    weight_calibrator: str = "max"
    input_calibrator: str = "max"
    output_calibrator: str = "max"
    aliases: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether some activation has static scales, which only data can give."""
        return any(fmt is not None and not fmt.dynamic for fmt in (self.input, self.output))

    def __str__(self) -> str:
        sides = (("weight", self.weight), ("input", self.input), ("output", self.output))
        return "; ".join(f"{side}: {fmt}" for side, fmt in sides if fmt is not None) or "nothing is quantized"


def parse_scheme(
    name: str,
    group_size: int | None = None,
    scale_format: str | None = None,
    scale_calculation_mode: str = "even",
) -> Scheme:
    """The scheme that a name stands for, in any of its spellings.

    Args:
        name: a name of the grammar, or one of the older and shorter ones (`scheme_aliases`).
        group_size: elements per group; None: what the name says, else 128. OCP MX (32), BFP16 (8), MX4/6/9 (16) and
            two-stage FP4 (16) have one possible size.
        scale_format: ``e4m3`` or ``float32``: the scale of FP4 and FP6 in groups; None: E4M3.
        scale_calculation_mode: ``even``, ``floor`` or ``ceil``: the exponent rule of OCP MX.

    Raises:
        DetentError: an unknown name (with the nearest known ones), or an option that the scheme can't follow.

    Example:
        >>> import detent
        >>> scheme = detent.parse_scheme("w_int4_per_group_sym", group_size=32)
        >>> print(scheme.weight)
        int4 per_group(32), float32 scale
        >>> scheme.input is None
        True
    """
    options = Options(group_size, scale_format, scale_calculation_mode)
    canonical = canonical_name(name)
    names = _names(canonical, name)
    built = {}
    for side, parsed in names.items():
        try:
            built[side] = build_format(parsed, _role(side), options)
        except DetentError as error:
            raise DetentError(f"scheme {shown(name)}: {error}") from None
    if canonical != "no_quant" and not any(built.values()):
        raise DetentError(f"scheme {shown(name)} quantizes nothing; the name for that is 'no_quant'")
    check_options([(parsed, _role(side)) for side, parsed in names.items()], options, f"scheme {shown(name)}")
    calibrators = {side: parsed.observer or "max" for side, parsed in names.items()}
    return Scheme(
        name=canonical,
        weight=built.get("w"),
        input=built.get("a"),
        output=built.get("o"),
        weight_calibrator=calibrators.get("w", "max"),
        input_calibrator=calibrators.get("a", "max"),
        output_calibrator=calibrators.get("o", "max"),
        aliases=tuple(alias for alias, target in scheme_aliases().items() if target == canonical),
    )


def canonical_name(name: str) -> str:
    """The name of the grammar for any spelling; what isn't an alias is only put into lower case, unchecked."""
    name = str(name).strip().lower()
    if name in _ALIASES:
        return _ALIASES[name]
    if name.startswith("gguf_"):
        return f"w_{name.removeprefix('gguf_')}"
    if short := _SHORT.fullmatch(name):
        tiles = "per_channel" if short["tiles"] == "per_channel" else f"per_group_g{short['tiles']}"
        symmetry = "asym" if short["element"].startswith("u") else "sym"
        weight = f"{short['element']}_{tiles}_{symmetry}"
        return f"w_{weight}" if short["sides"] == "o" else f"w_{weight}_a_{weight}"
    if name in _DEPRECATED or re.search(r"_mx_(fp|int)\d", name):
        return re.sub(r"_mx_(fp|int)", r"_mx\1", name).removesuffix("_sym").removesuffix("_per_group")
    return name


def scheme_aliases() -> dict[str, str]:
    """Older and shorter names, and the names of the grammar that they stand for."""
    short = [f"{e}_wo_{t}" for e in ("int4", "uint4") for t in ("32", "64", "128", "per_channel")] + ["int4_wa_64"]
    gguf = [f"gguf_{name.lower()}" for name in GGUF_FORMATS]
    return {alias: canonical_name(alias) for alias in (*_ALIASES, *short, *_DEPRECATED, *gguf)}


def all_schemes(neighbours: bool = True) -> list[str]:
    """Names of the grammar, in a stable order: AMD Quark's, those that only an alias had, and natural neighbours.

    The grammar has many more; `neighbours=False` leaves out what Quark has no name for.
    """
    names = ["no_quant", *_QUARK, *_ALIASES.values()]
    if neighbours:
        tilings = [f"{tiles}_{symmetry}" for tiles in ("per_group", "per_channel") for symmetry in ("sym", "asym")]
        names += [f"w_{sign}int{bits}_{t}" for sign in ("", "u") for t in tilings for bits in range(8, 1, -1)]
        names += [f"w_fp8_{kind}_per_{t}" for kind in ("e4m3", "e5m2") for t in ("tensor", "channel", "group")]
        names += ["w_fp6_e3m2_per_group", "w_fp6_e2m3_per_group", "w_nf4_per_group", "w_nf4_per_channel"]
        names += ["w_mxfp8_e5m2", "w_mxfp8_e5m2_a_mxfp8_e5m2", "w_mxint8_a_mxint8", "w_mx4", "w_mx4_a_mx4", "w_mx9"]
        names += [canonical_name(f"gguf_{name}") for name in GGUF_FORMATS]
        names += ["w_int4_on_fp8", "w_int4_per_group_a_fp8_per_tensor", "w_int4_per_group_a_int8_per_token_dynamic"]
    return list(dict.fromkeys(names))


#: Names of key/value cache types that differ from the format grammar.
_KV_NAMES = {"uint4": "uint4_per_token_asym_dynamic"}


def kv_cache_types() -> tuple[str, ...]:
    """The names that `--kv_cache_dtype` takes."""
    return (
        "fp8",
        "fp8_dynamic",
        "fp8_per_head",
        "int8_per_tensor_static",
        "int8_per_tensor_dynamic",
        "int8_per_token",
        "uint4",
        "mxfp8",
        "fp6e2m3_per_group",
        "mxfp6_e2m3",
        "fp6e3m2_per_group",
        "mxfp6_e3m2",
        "fp4_per_group",
        "mxfp4",
    )


def kv_cache_format(
    name: str,
    group_size: int | None = None,
    scale_format: str | None = None,
    scale_calculation_mode: str = "even",
) -> Format:
    """The format of keys and values: of the outputs of the projections that make them.

    Args:
        name: one of `kv_cache_types`.
        group_size, scale_format, scale_calculation_mode: as for `parse_scheme`, for the types that have such a thing.
            They are the scheme's options in the first place, so the others do without them.

    Raises:
        DetentError: an unknown name.
    """
    if name not in kv_cache_types():
        close = nearest(name, list(kv_cache_types()))
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DetentError(f"unknown key/value cache type {name!r}{hint}; known: {', '.join(kv_cache_types())}")
    if name == "fp8_per_head":
        return fp8("e4m3", per_channel(1))  # of keys and values [batch, heads, tokens, features]
    spelled = re.sub(r"^fp6e", "fp6_e", _KV_NAMES.get(name, name))
    options = Options(group_size, scale_format, scale_calculation_mode)
    fmt = build_format(parse_name(spelled.split("_")), "activation", options)
    assert fmt is not None
    return fmt


def quant_cfg_for(scheme: Scheme, exclude: Iterable[str] = ()) -> QuantCfg:
    """The scheme as a `quant_cfg` for all linear layers.

    Args:
        scheme: from `parse_scheme`.
        exclude: wildcards on module names (``lm_head``, ``*.gate``); they and everything inside stay as they are.
    """
    cfg = QuantCfg([{"quantizer_name": "default", "enable": False}])
    sides = (
        ("weight_quantizer", scheme.weight, scheme.weight_calibrator),
        ("input_quantizer", scheme.input, scheme.input_calibrator),
        ("output_quantizer", scheme.output, scheme.output_calibrator),
    )
    for quantizer, fmt, calibrator in sides:
        if fmt is not None:
            attributes = {"format": fmt, **({} if calibrator == "max" else {"calibrator": calibrator})}
            cfg.append({"quantizer_name": f"*{quantizer}", "parent_class": "nn.Linear", "cfg": attributes})
    cfg.extend({"quantizer_name": f"{pattern}.*", "enable": False} for pattern in exclude)
    return cfg


def _names(canonical: str, given: str) -> dict[str, FormatName]:
    """The parsed format of each side that a scheme names."""
    if canonical == "no_quant":
        return {}
    first, *tokens = canonical.split("_")
    if first != "w":
        raise DetentError(f"unknown scheme {shown(given)}{_nearest_schemes(given)}")
    sides: dict[str, list[str]] = {"w": []}
    side = "w"
    for token in tokens:
        if token in ("a", "o"):
            if token in sides or "o" in sides:
                raise DetentError(f"unknown scheme {shown(given)}: a scheme is w_... [_a_...] [_o_...], each once")
            side = token
            sides[side] = []
        else:
            sides[side].append(token)
    try:
        names = {side: parse_name(tokens) for side, tokens in sides.items()}
    except DetentError as error:
        raise DetentError(f"unknown scheme {shown(given)}: {error}{_nearest_schemes(given)}") from None
    last = names[side]
    for earlier, parsed in names.items():
        if earlier != side and (parsed.element == last.element or not last.quantized):
            names[earlier] = parsed.filled_from(last)
    if not last.quantized:
        names[side] = FormatName(last.element)
    return names


def _nearest_schemes(name: str) -> str:
    known = list(dict.fromkeys([*all_schemes(), *scheme_aliases()]))
    close = nearest(name.strip().lower(), known, 4) or nearest(f"w_{name.strip().lower()}", known, 4)
    if close:
        return f"; the nearest schemes are {', '.join(close)}"
    return "; a scheme is w_<format>[_a_<format>], such as w_int4_per_group_sym; `detent schemes` lists them"


def _role(side: str) -> Role:
    return "weight" if side == "w" else "activation"
