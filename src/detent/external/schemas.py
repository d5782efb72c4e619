"""One typed description for each kind of JSON that Detent reads. Fields that Detent doesn't read may hold anything.

All are strict: a number in quotes is not a number, and true is not 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

#: Bounds of what is built or allocated from a number in a file. The largest models known stay far below them.
MAX_LAYERS = 4096
MAX_EXPERTS = 16384
MAX_SIZE = 1 << 31

_Count = Annotated[int, Field(ge=0, le=MAX_SIZE)]
_Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Shape = Annotated[list[_Size], Field(max_length=16)]


class Description(BaseModel):
    """What all descriptions share."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _pattern(text: str) -> str:
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
    return text


#: The name of a module, or ``re:`` and a regular expression.
Target = Annotated[str, AfterValidator(_pattern)]


# ---- config.json ----------------------------------------------------------------------------------------------------

#: Numbers in configurations, whatever the architecture, that decide how much is built: (pattern of the key, most).
_BOUNDED = (
    (re.compile(r"(num|n)_.*layers?|n_layers?|num_.*blocks|depth"), MAX_LAYERS),
    (re.compile(r"(num|n)_.*experts?.*"), MAX_EXPERTS),
)


class ModelConfig(Description):
    """The fields of ``config.json`` that Detent itself reads; transformers reads the rest."""

    model_type: str = Field(min_length=1)
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    vocab_size: _Count | None = None
    max_position_embeddings: int | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, values: Any) -> Any:
        for place, value in _walk(values):
            key = place.rpartition(".")[2]
            for pattern, most in _BOUNDED:
                if isinstance(value, int) and pattern.fullmatch(key) and value > most:
                    raise ValueError(f"{place} is {value}; at most {most} are built")
        if isinstance(values, dict) and values.get("max_position_embeddings") == 1:
            raise ValueError("max_position_embeddings is 1, too few for a token and the one that follows it")
        return values


def _walk(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of everything below a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        where = f"{place}.{key}" if place else str(key)
        yield where, inner
        yield from _walk(inner, where)


def hub_kernels(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(place, value) of every entry of a config.json that makes transformers fetch code from the hub."""
    return [
        (place, value)
        for place, value in _walk(config)
        if isinstance(value, str) and "/" in value and re.search(r"(attn|experts)_implementation", place)
    ]


class ShardIndex(Description):
    """``model.safetensors.index.json``."""

    weight_map: dict[str, str] = Field(min_length=1)


class AdapterConfig(Description):
    """The fields of PEFT's ``adapter_config.json`` that a message needs."""

    base_model_name_or_path: str | None = None


class TokenizerConfig(Description):
    """The fields of ``tokenizer_config.json`` over which transformers fails without a clear message."""

    tokenizer_class: str | None = None
    model_max_length: float | None = None
    chat_template: str | list[dict[str, Any]] | None = None
    added_tokens_decoder: dict[str, dict[str, Any] | str] | None = None
    auto_map: dict[str, Any] | list[Any] | None = None


# ---- quantization_config: compressed-tensors ------------------------------------------------------------------------


class QuantizationArgs(Description):
    """How one kind of tensor is quantized."""

    num_bits: Annotated[int, Field(ge=1, le=16)] = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    group_size: Annotated[int, Field(ge=-1, le=MAX_SIZE)] | None = None
    block_structure: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] | str | None = None
    dynamic: bool | Literal["local"] = False
    scale_dtype: str | None = None

    @model_validator(mode="after")
    def _sizes(self) -> QuantizationArgs:
        if self.strategy in ("group", "tensor_group") and (self.group_size or 0) < 1:
            raise ValueError(f"strategy {self.strategy!r} needs a positive group_size, not {self.group_size}")
        if self.group_size == 0:
            raise ValueError("group_size is positive, or -1 for one scale for each channel, not 0")
        block = self.block_structure
        if isinstance(block, str) and not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", block):
            raise ValueError(f"block_structure is two lengths, as in [128, 128] or '128x128', not {block!r}")
        if self.strategy == "block" and block is None:
            raise ValueError("strategy 'block' needs a block_structure, such as [128, 128]")
        return self


class QuantizationScheme(Description):
    """One of ``config_groups``."""

    targets: list[Target]
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None


class CompressedTensorsConfig(Description):
    """``quantization_config`` where ``quant_method`` is ``compressed-tensors``."""

    config_groups: dict[str, QuantizationScheme] = Field(default_factory=dict)
    ignore: list[Target] | None = None
    kv_cache_scheme: QuantizationArgs | None = None
    quantization_status: str | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


# ---- quantization_config: Quark, ModelOpt, FP8 ----------------------------------------------------------------------


class QuarkSpec(Description):
    """How Quark quantizes one kind of tensor."""

    dtype: str
    qscheme: Literal["per_tensor", "per_channel", "per_group", "per_block"] | None = None
    ch_axis: int | None = None
    group_size: Annotated[int, Field(ge=1, le=MAX_SIZE)] | None = None
    is_dynamic: bool = False
    symmetric: bool | None = None
    scale_format: str | None = None
    zero_point_type: str | None = None
    is_scale_quant: bool = False


_QuarkSpecs = QuarkSpec | Annotated[list[QuarkSpec], Field(min_length=1, max_length=2)] | None


class QuarkLayer(Description):
    """The specifications of one layer, or two for two stages."""

    weight: _QuarkSpecs = None
    input_tensors: _QuarkSpecs = None
    output_tensors: _QuarkSpecs = None


class QuarkConfig(Description):
    """``quantization_config`` where ``quant_method`` is ``quark``."""

    global_quant_config: QuarkLayer | None = None
    layer_quant_config: dict[str, QuarkLayer] | None = None
    layer_type_quant_config: dict[str, Any] | None = None
    kv_cache_quant_config: dict[str, QuarkLayer] | None = None
    softmax_quant_spec: Any = None
    exclude: list[str] | None = None


class ModelOptLayer(Description):
    """One of ``quantized_layers``."""

    quant_algo: str


class ModelOptConfig(Description):
    """What ModelOpt says in ``quantization_config`` and, under other names, in ``hf_quant_config.json``."""

    quant_algo: str | None = None
    ignore: list[str] | None = None
    exclude_modules: list[str] | None = None
    quantized_layers: dict[str, ModelOptLayer] | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    kv_cache_quant_algo: str | None = None


class ModelOptFile(Description):
    """``hf_quant_config.json``."""

    quantization: ModelOptConfig


class Fp8Config(Description):
    """``quantization_config`` where ``quant_method`` is ``fp8`` or ``mxfp8``."""

    activation_scheme: Literal["static", "dynamic"] = "dynamic"
    weight_block_size: (
        Annotated[list[Annotated[int, Field(ge=1, le=MAX_SIZE)]], Field(min_length=2, max_length=2)] | None
    ) = None
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None


# ---- formats, Detent's own layout, and the files of `detent.save` ---------------------------------------------------


class ElementDescription(Description):
    """A number grid, as ``Format.to_dict`` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["Integer", "Float", "Table"]
    bits: int | None = None
    signed: bool | None = None
    narrow: bool | None = None
    exponent_bits: int | None = None
    mantissa_bits: int | None = None
    reserved_maximum: float | None = None
    name: str | None = None
    entries: Annotated[list[float], Field(min_length=2, max_length=256)] | None = None


class GranularityDescription(Description):
    """Which elements share a scale."""

    kind: str
    blocks: list[Annotated[list[int | None], Field(min_length=2, max_length=2)]]
    rest: Annotated[int, Field(ge=1)] | None = None


class ScaleDescription(Description):
    """How a scale is made and stored."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["FloatScale", "PowerOfTwoScale", "SearchedScale"]
    dtype: str | None = None
    rule: str | None = None
    outer: bool | None = None
    four_over_six: bool | None = None
    rounding: str | None = None
    bits: int | None = None
    signed: bool | None = None
    tiles: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    micro: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None


class FormatDescription(Description):
    """A format, as ``Format.to_dict`` writes it."""

    element: ElementDescription
    granularity: GranularityDescription
    scale: ScaleDescription
    zero_point: str
    dynamic: bool
    base: FormatDescription | None = None


class LayerDescription(Description):
    """One layer; formats are numbers in the table of formats."""

    kind: str
    shape: Shape
    weight: int | None
    input: int | None
    output: int | None
    rotated: _Size = 0
    low_rank: _Size = 0


class LayoutDescription(Description):
    """What `detent.checkpoints.records.describe` writes: Detent's own ``quantization_config``, and the note that it
    leaves in the header of compressed-tensors files."""

    version: Any
    formats: list[FormatDescription]
    layers: dict[str, LayerDescription]
    kv_cache: int | None
    ignored: list[str]
    attention: int | None = None
    keys_rotated: bool = False
    #: Outer scales by layer and side, as hexadecimal numbers; only for compressed-tensors.
    outer_scales: dict[str, dict[str, str]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _numbers(self) -> LayoutDescription:
        numbers = [n for layer in self.layers.values() for n in (layer.weight, layer.input, layer.output)]
        for number in (*numbers, self.kv_cache, self.attention):
            if number is not None and not 0 <= number < len(self.formats):
                raise ValueError(f"format number {number} is not one of the {len(self.formats)} formats listed")
        return self


class SavedQuantizer(Description):
    """One quantizer in a file of `detent.save`."""

    attributes: dict[str, Any]
    enabled: bool
    quant: bool
    buffers: list[str] = Field(default_factory=list)


class SavedPacked(Description):
    """One packed weight in a file of `detent.save`."""

    format: FormatDescription
    shape: Shape
    dtype: Literal["float32", "bfloat16", "float16"]


class SavedState(Description):
    """The ``detent_state`` of a quantized model."""

    version: Any
    quantizers: dict[str, SavedQuantizer | list[SavedQuantizer]]
    packed: dict[str, SavedPacked]
    aliases: dict[str, str] = Field(default_factory=dict)


# ---- what Detent writes next to a checkpoint -------------------------------------------------------------------------


class WrittenFile(Description):
    """One file that Detent wrote: its size, and what shows whether it has changed since."""

    size: Annotated[int, Field(ge=0)]
    #: Of small files.
    sha256: str | None = None
    #: Of large ones, which would take long to read: the time of their last change.
    mtime_ns: int | None = None


class Manifest(Description):
    """``detent_manifest.json``."""

    written_by: Literal["detent"]
    files: dict[str, WrittenFile]


class Unfinished(Description):
    """What is in a folder that Detent is still writing."""

    written_by: Literal["detent"]
    target: str


class JournalStart(Description):
    """What a run that may be interrupted is made of, by what a user would call it."""

    written_by: Literal["detent"]
    made_of: dict[str, str]


class FinishedBlock(Description):
    """What the header of a file with a finished block says."""

    description: dict[str, Any]
    errors: dict[str, float | None]
    outcomes: dict[str, list[dict[str, Any]]]
    values: list[str]


class FinishedShard(Description):
    """One file of a checkpoint that is being written: sizes in bytes and checksums of its tensors."""

    sizes: dict[str, int]
    digests: dict[str, int]


class FinishedShards(Description):
    """The files that an unfinished run has finished."""

    shards: list[FinishedShard]


class WrittenTensor(Description):
    """What an unfinished run knows of a tensor of the source that it has written.

    Attributes:
        names: of the tensors that it became.
        digest: of one that stayed; None for a layer's weight.
        error, exact: of a layer.
    """

    tensor: str
    names: list[str]
    digest: int | None = None
    error: float | None = None
    exact: dict[str, str] = Field(default_factory=dict)


class SavedSearch(Description):
    """The checkpoint of a search for formats: scores {unit: {format: score}} and bits {layer: {format: bits}}."""

    signature: dict[str, str]
    scores: dict[str, dict[str, float]]
    bits: dict[str, dict[str, float]]
    steps: int
    seen: list[str]
    finished: bool
