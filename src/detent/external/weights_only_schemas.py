"""The descriptions of checkpoints of weights alone: AutoAWQ, GPTQ, AutoRound and MLX. See `detent.external.schemas`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, model_validator

from detent.external.schemas import MAX_SIZE, Description

# ---- quantization_config: AutoAWQ, GPTQ, AutoRound ------------------------------------------------------------------


def _whole_or_positive(size: int) -> int:
    if size == 0:
        raise ValueError("a group size is positive, or -1 for one group a row, not 0")
    return size


_GroupSize = Annotated[int, Field(ge=-1, le=MAX_SIZE), AfterValidator(_whole_or_positive)]


class AwqConfig(Description):
    """``quantization_config`` where ``quant_method`` is ``awq``, or AutoRound packs like it."""

    bits: Literal[4] = Field(4, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: _GroupSize = Field(128, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    version: str = "gemm"

    @model_validator(mode="after")
    def _readable(self) -> AwqConfig:
        if self.version.lower() != "gemm":
            raise ValueError(f"version is {self.version!r}; of AutoAWQ's versions only 'gemm' is read")
        return self


class GptqOverride(Description):
    """What differs for some layers."""

    bits: int | None = None
    group_size: _GroupSize | None = None
    sym: bool | None = None


class GptqConfig(Description):
    """``quantization_config`` where ``quant_method`` is ``gptq`` or ``auto-round``."""

    bits: Annotated[int, Field(ge=1, le=8)]
    group_size: _GroupSize = 128
    sym: bool = False
    checkpoint_format: str | None = None
    format: str | None = None
    packing_format: str | None = None
    is_marlin_format: bool = False
    data_type: str = "int"
    act_bits: int | None = None
    dynamic: dict[str, GptqOverride] | None = None
    extra_config: dict[str, GptqOverride] | None = None

    @model_validator(mode="after")
    def _readable(self) -> GptqConfig:
        named = {name for name in (self.checkpoint_format, self.format, self.packing_format) if name is not None}
        if len({_GPTQ_LESS_ONE.get(name) for name in named}) > 1 or not named <= _GPTQ_LESS_ONE.keys():
            raise ValueError(f"its tensors are laid out as {sorted(named)}; one of {', '.join(_GPTQ_LESS_ONE)} is read")
        if self.is_marlin_format:
            raise ValueError("is_marlin_format: codes in the order of Marlin kernels are not read")
        if self.data_type != "int" or (self.act_bits or 16) < 16:
            raise ValueError(
                f"{self.data_type} weights with {self.act_bits or 16}-bit activations; integers alone are read"
            )
        return self

    @property
    def less_one(self) -> bool:
        """Whether zero points are stored less 1."""
        return _GPTQ_LESS_ONE[self.checkpoint_format or self.format or self.packing_format or "gptq"]

    def settings(self) -> list[tuple[int, int, bool]]:
        """(bits, group size, whether symmetric) of layers: the usual ones first."""
        usual = (self.bits, self.group_size, self.sym)
        more = [*(self.dynamic or {}).values(), *(self.extra_config or {}).values()]
        own = [
            tuple(
                mine if mine is not None else theirs
                for mine, theirs in zip((o.bits, o.group_size, o.sym), usual, strict=True)
            )
            for o in more
        ]
        return list(dict.fromkeys([usual, *own]))  # type: ignore[list-item]


class OldGptqConfig(Description):
    """``quantize_config.json``; `GptqConfig` says what its fields may be."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model_file_base_name: str | None = None


#: Whether zero points are stored less 1, by the name of the layout.
_GPTQ_LESS_ONE = {
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round:gptqmodel": False,
    "auto_round": False,
}


# ---- config.json: MLX -----------------------------------------------------------------------------------------------


class MlxSettings(Description):
    """How MLX quantized a layer."""

    group_size: Literal[32, 64, 128] = 64
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    mode: Literal["affine", "mxfp4", "mxfp8"] = "affine"

    @model_validator(mode="after")
    def _together(self) -> MlxSettings:
        wanted = {"mxfp4": (32, 4), "mxfp8": (32, 8)}.get(self.mode, (self.group_size, self.bits))
        if (self.group_size, self.bits) != wanted:
            found = f"{self.group_size} and {self.bits} bits"
            raise ValueError(f"mode {self.mode!r} has groups of {wanted[0]} and {wanted[1]} bits, not of {found}")
        return self


class MlxConfig(MlxSettings):
    """The "quantization" of a config.json: the usual settings and, by their names, those of layers that differ."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    __pydantic_extra__: dict[str, MlxSettings | bool | str]

    def of(self, layer: str) -> MlxSettings:
        """The settings of a layer."""
        own = (self.__pydantic_extra__ or {}).get(layer)
        return own if isinstance(own, MlxSettings) else self
