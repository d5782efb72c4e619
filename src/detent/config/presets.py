"""The ready-made configurations of the Python API, put together from numerics, targets and exclusions.

Every preset first disables all quantizers, then gives its targets their attributes, then excludes what presets always
exclude. The key/value cache presets, too, start from "all disabled", so that alone they quantize nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from detent.config.exclusions import DEFAULT_EXCLUSIONS, MAMBA_EXCLUSIONS, MAMBA_MIXER_EXCLUSIONS
from detent.config.quant_cfg import PresetPattern, QuantCfg
from detent.config.quantize_config import PresetConfig

Places = Iterable[tuple[str, str | None]]


def _block(num_bits: Any, size: int, scale_bits: tuple[int, int] | None, kind: str, **more: Any) -> dict[str, Any]:
    scale = {} if scale_bits is None else {"scale_bits": scale_bits}
    return {"num_bits": num_bits, "block_sizes": {-1: size, "type": kind, **scale, **more}}


_E4M3, _E2M1, _E8M0 = (4, 3), (2, 1), (8, 0)

_INT8 = {"num_bits": 8, "axis": None}
_INT8_ROWS = {"num_bits": 8, "axis": 0}
_INT4 = _block(4, 128, None, "static")
_FP8 = {"num_bits": _E4M3, "axis": None}
_FP8_ROWS = {"num_bits": _E4M3, "axis": 0}
_FP8_TOKENS = {"num_bits": _E4M3, "type": "dynamic", "block_sizes": {-1: None}}
_FP8_SQUARES = {"num_bits": _E4M3, "block_sizes": {-1: 128, -2: 128}}
_NVFP4 = {**_block(_E2M1, 16, _E4M3, "dynamic"), "effective_bits": 4.5}
_NVFP4_STATIC = {**_block(_E2M1, 16, _E4M3, "static"), "effective_bits": 4.5}
_NVFP4_46 = {**_block(_E2M1, 16, _E4M3, "static", four_over_six=True), "effective_bits": 4.5}
_NVFP4_32 = _block(_E2M1, 32, _E4M3, "dynamic")
_MXFP4 = _block(_E2M1, 32, _E8M0, "dynamic")
_MXFP6 = _block((3, 2), 32, _E8M0, "dynamic")
_MXFP8 = _block(_E4M3, 32, _E8M0, "dynamic")
_MXINT8 = _block(8, 32, _E8M0, "dynamic")
_AFFINE = {"bias": {-2: None, -4: None, "type": "static"}}

_EVERYTHING = ("*",)
_EXPERTS = ("*.experts.*", "*block_sparse_moe*")
_MLP = ("*mlp*", *_EXPERTS, "*mixer.up_proj*", "*mixer.down_proj*")
_OUT_AND_MLP = ("*o_proj*", *_MLP)


def _disabled(places: Places) -> Iterator[dict[str, Any]]:
    for pattern, parent in places:
        yield {"quantizer_name": pattern, **({"parent_class": parent} if parent else {}), "enable": False}


class _ReadOnlyQuantCfg(QuantCfg):
    """A part that users spread into their own configurations: everything read from it is a copy."""

    def __getitem__(self, key: Any) -> Any:
        return copy.deepcopy(super().__getitem__(key))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(entry) for entry in super().__iter__())

    def copy(self) -> QuantCfg:  # type: ignore[override]
        return QuantCfg(self)


#: What presets exclude; spread it as ``**_default_disabled_quantizer_cfg`` or ``*_default_disabled_quantizer_cfg``.
_default_disabled_quantizer_cfg: QuantCfg = _ReadOnlyQuantCfg(
    [*_disabled(DEFAULT_EXCLUSIONS), *_disabled([("default", None)])]
)


def _preset(
    weight: Any,
    activation: Any = None,
    algorithm: Any = "max",
    *,
    targets: tuple[str, ...] = _EVERYTHING,
    also: Mapping[str, Any] | None = None,
    excluded: Places = (),
) -> PresetConfig:
    """A configuration that gives the weights and inputs of `targets` these attributes (None: left alone)."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "default", "enable": False}]
    for target in targets:
        for attributes, kind in ((weight, "weight_quantizer"), (activation, "input_quantizer")):
            if attributes is not None:
                name = f"{target}{kind}"
                entries.append(
                    {"quantizer_name": name if targets == _EVERYTHING else PresetPattern(name), "cfg": attributes}
                )
    if activation is None and targets == _EVERYTHING:
        entries.append({"quantizer_name": "*input_quantizer", "enable": False})
    entries += [{"quantizer_name": PresetPattern(name), "cfg": attributes} for name, attributes in (also or {}).items()]
    entries += _disabled([*DEFAULT_EXCLUSIONS, *excluded])
    # Copied one by one: entries mustn't share attributes, or changing one would change them all.
    return PresetConfig(quant_cfg=QuantCfg(copy.deepcopy(entry) for entry in entries), algorithm=copy.copy(algorithm))


def _kv_preset(*entries: tuple[str, dict[str, Any]]) -> PresetConfig:
    cfg = QuantCfg([{"quantizer_name": "default", "enable": False}])
    cfg.extend({"quantizer_name": pattern, "cfg": copy.deepcopy(attributes)} for pattern, attributes in entries)
    return PresetConfig(quant_cfg=cfg, algorithm="max")


INT8_DEFAULT_CFG = _preset(_INT8_ROWS, _INT8)
INT8_SMOOTHQUANT_CFG = _preset(_INT8_ROWS, _INT8, "smoothquant")
INT8_WEIGHT_ONLY_CFG = _preset(_INT8_ROWS)

FP8_DEFAULT_CFG = _preset(_FP8, _FP8)
FP8_PER_CHANNEL_PER_TOKEN_CFG = _preset(_FP8_ROWS, _FP8_TOKENS)
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = _preset(_FP8_SQUARES)

INT4_BLOCKWISE_WEIGHT_ONLY_CFG = _preset(_INT4)
INT4_AWQ_CFG = _preset(_INT4, None, {"method": "awq_lite", "alpha_step": 0.1})
W4A8_AWQ_BETA_CFG = _preset([_INT4, _FP8], _FP8, "awq_lite")

NVFP4_DEFAULT_CFG = _preset(_NVFP4, _NVFP4)
NVFP4_AWQ_LITE_CFG = _preset(_NVFP4, _NVFP4, "awq_lite")
NVFP4_AWQ_CLIP_CFG = _preset(_NVFP4, _NVFP4, {"method": "awq_clip"})
NVFP4_AWQ_FULL_CFG = _preset(_NVFP4, _NVFP4, {"method": "awq_full", "alpha_step": 0.1})
NVFP4_SVDQUANT_DEFAULT_CFG = _preset(_NVFP4, _NVFP4, {"method": "svdquant", "lowrank": 32})
NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG = _preset(_NVFP4_STATIC, _NVFP4, {"method": "mse", "fp8_scale_sweep": True})
NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG = _preset(
    _NVFP4_STATIC, _NVFP4, {"method": "local_hessian", "fp8_scale_sweep": True}
)
NVFP4_FOUR_OVER_SIX_CFG = _preset(
    _NVFP4_46, _NVFP4, {"method": "mse", "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
)
W4A16_NVFP4_CFG = _preset(_NVFP4)
W4A8_NVFP4_FP8_CFG = _preset(_NVFP4_32, _FP8)

MXFP4_DEFAULT_CFG = _preset(_MXFP4, _MXFP4, None)
MXFP6_DEFAULT_CFG = _preset(_MXFP6, _MXFP6, None)
MXFP8_DEFAULT_CFG = _preset(_MXFP8, _MXFP8, None)
MXINT8_DEFAULT_CFG = _preset(_MXINT8, _MXINT8, None)
W4A8_MXFP4_FP8_CFG = _preset(_MXFP4, _FP8, None)

NVFP4_MLP_ONLY_CFG = _preset(_NVFP4, _NVFP4, targets=_MLP)
NVFP4_EXPERTS_ONLY_CFG = _preset(_NVFP4, _NVFP4, targets=_EXPERTS)
NVFP4_OMLP_ONLY_CFG = _preset(_NVFP4, _NVFP4, targets=_OUT_AND_MLP)
NVFP4_MLP_WEIGHT_ONLY_CFG = _preset(_NVFP4_32, targets=("*mlp*", "*block_sparse_moe*"))
MXFP4_MLP_WEIGHT_ONLY_CFG = _preset(_MXFP4, None, None, targets=("*mlp*", "*block_sparse_moe*"))

NVFP4_FP8_MHA_CONFIG = _preset(
    _NVFP4,
    _NVFP4,
    also=dict.fromkeys(
        (
            "*[qkv]_bmm_quantizer",
            "*softmax_quantizer",
            "*p_bmm_quantizer",
            "transformer_blocks*bmm2_output_quantizer",
        ),
        _FP8,
    ),
)
MAMBA_MOE_FP8_AGGRESSIVE_CFG = _preset(_FP8, _FP8, excluded=MAMBA_EXCLUSIONS)
MAMBA_MOE_FP8_CONSERVATIVE_CFG = _preset(_FP8, _FP8, excluded=(*MAMBA_EXCLUSIONS, *MAMBA_MIXER_EXCLUSIONS))
MAMBA_MOE_NVFP4_AGGRESSIVE_CFG = _preset(_NVFP4, _NVFP4, excluded=MAMBA_EXCLUSIONS)
MAMBA_MOE_NVFP4_CONSERVATIVE_CFG = _preset(_NVFP4, _NVFP4, excluded=(*MAMBA_EXCLUSIONS, *MAMBA_MIXER_EXCLUSIONS))

FP8_KV_CFG = _kv_preset(("*[kv]_bmm_quantizer", _FP8))
FP8_AFFINE_KV_CFG = _kv_preset(("*[kv]_bmm_quantizer", {**_FP8, **_AFFINE}))
NVFP4_KV_CFG = _kv_preset(("*[kv]_bmm_quantizer", _NVFP4))
NVFP4_AFFINE_KV_CFG = _kv_preset(("*[kv]_bmm_quantizer", {**_NVFP4, **_AFFINE}))
NVFP4_KV_ROTATE_CFG = _kv_preset(
    ("*q_bmm_quantizer", {"enable": False, "rotate": True}),  # turned like the keys, so that products stay the same
    ("*k_bmm_quantizer", {**_NVFP4, "rotate": True}),
    ("*v_bmm_quantizer", _NVFP4),
)

#: The names of all presets.
choices: set[str] = {name for name, value in list(globals().items()) if isinstance(value, PresetConfig)}


def update_quant_cfg_with_kv_cache_quant(config: Mapping[str, Any], kv_cache_quant_cfg: Any) -> PresetConfig:
    """A deep copy of `config` that also quantizes the key/value cache.

    Args:
        config: a whole configuration; where it has no ``quant_cfg``, all else is disabled, and where it has no
            ``algorithm``, it becomes ``"max"``.
        kv_cache_quant_cfg: the ``quant_cfg`` of a key/value preset, or the preset as a whole.

    Example:
        >>> import detent
        >>> config = detent.update_quant_cfg_with_kv_cache_quant(detent.FP8_DEFAULT_CFG, detent.FP8_KV_CFG)
        >>> "*[kv]_bmm_quantizer" in config["quant_cfg"]
        True
    """
    if isinstance(kv_cache_quant_cfg, Mapping) and "quant_cfg" in kv_cache_quant_cfg:
        kv_cache_quant_cfg = kv_cache_quant_cfg["quant_cfg"]
    result = PresetConfig(copy.deepcopy(dict(config)))
    base = QuantCfg(result.get("quant_cfg") or {})
    added = QuantCfg(copy.deepcopy(kv_cache_quant_cfg))
    if base:
        added.pop("default", None)  # what `config` does with everything else is its own affair
    base.extend(added)
    result["quant_cfg"] = base
    result.setdefault("algorithm", "max")
    return result
