"""Configurations of algorithms that change a model before it is rounded, or round it without data.

`RotationConfig`, `SVDQuantConfig` and `HQQConfig`; the field names that Quark's and ModelOpt's files use are taken too.
"""

from __future__ import annotations

from typing import Any, Literal

from detent.config.algorithm import ALGORITHMS, DataAlgorithmConfig, QuantizeAlgorithmConfig
from detent.config.base import ConfigField
from detent.errors import DetentError

#: Entries of Quark's configuration files that describe a model. They are not needed: structure is found.
STRUCTURE_FIELDS = (
    "name",
    "scaling_layers",
    "model_decoder_layers",
    "inside_layer_modules",
    "embedding_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "backbone",
    "head",
    "layers",
    "norms",
    "scaling_params",
    "self_attn",
    "mlp",
    "v_proj",
    "o_proj",
)


class RotationConfig(QuantizeAlgorithmConfig):
    """Hadamard rotations (QuaRot): the function stays, outliers are spread over all channels.

    Attributes:
        r1: rotate the residual stream, inside the weights. Norms are fused into the weights that read them. None: where
            the model's structure lets it be rotated; True: an error where it doesn't.
        r2: rotate each head between value and output projection, inside the weights.
        r3: rotate queries and keys after the rotary embedding, at run time; None: where keys are quantized.
        r4: rotate the input of the MLP's last projection at run time, its weight turned back; None: where that input is
            quantized.
        random, random2: flip signs at random before R1, or R2; also written ``random_r1``, ``random_r2``.
        seed: of the random signs.
        rotation_size: size of the blocks that R1 and R4 rotate in; None: the whole width, or the largest blocks of it
            that have a Hadamard matrix.
        online_r1_rotation, trainable, train_smooth, optimized_rotation_path: taken where they are off.

    Fields of Quark's files that describe a model (`STRUCTURE_FIELDS`) are taken and dropped: structure is found.
    """

    method: Literal["rotation"] = ConfigField("rotation")
    r1: bool | None = ConfigField(None)
    r2: bool = ConfigField(True)
    r3: bool | None = ConfigField(None)
    r4: bool | None = ConfigField(None)
    random: bool = ConfigField(False)
    random2: bool = ConfigField(False)
    seed: int = ConfigField(0)
    rotation_size: int | None = ConfigField(None, ge=1)
    online_r1_rotation: bool = ConfigField(False)
    trainable: bool = ConfigField(False)
    train_smooth: bool = ConfigField(False)
    optimized_rotation_path: str | None = ConfigField(None)

    def __init__(self, **values: Any) -> None:
        for other, name in (("random_r1", "random"), ("random_r2", "random2")):
            if other in values:
                if name in values:
                    raise DetentError(f"rotation: {other} and {name} set the same thing; give one of them")
                values[name] = values.pop(other)
        super().__init__(**{name: value for name, value in values.items() if name not in STRUCTURE_FIELDS})

    def model_post_init(self, context: Any) -> None:
        off = ("online_r1_rotation", "trainable", "train_smooth", "optimized_rotation_path")
        for name in off:
            if getattr(self, name):
                raise DetentError(
                    f"rotation: {name} isn't supported: rotations are Hadamard matrices, R1 and R2 in weights"
                )
        if not (self.r1 is not False or self.r2 or self.r3 is not False or self.r4 is not False):
            raise DetentError("rotation: r1, r2, r3 and r4 are all off, so there is nothing to rotate")

    @property
    def needs_data(self) -> bool:
        return False


class SVDQuantConfig(DataAlgorithmConfig):
    """A low-rank branch in full precision takes what rounding the weight loses most.

    Attributes:
        lowrank: rank of the branch.
        skip_layers: wildcards on the names of modules that get no branch.
        rounds: how often branch and rounded rest are fitted to each other.
        alpha: the share of the activations' range that moves into the weights first; None searches it (as AWQ does).
    """

    method: Literal["svdquant"] = ConfigField("svdquant")
    lowrank: int = ConfigField(32, ge=1)
    skip_layers: list[str] | None = ConfigField(None)
    rounds: int = ConfigField(6, ge=1)
    alpha: float | None = ConfigField(None, ge=0, le=1)


class HQQConfig(QuantizeAlgorithmConfig):
    """Half-quadratic quantization: ranges from the weights alone, under which few weights have large errors.

    Attributes:
        lp_norm: p of the norm, in (0, 1]; 0.7 is the published one, 1 gave lower perplexities here.
        beta, kappa: weight of the quadratic term, and its growth at each step.
        iters: steps.
    """

    method: Literal["hqq"] = ConfigField("hqq")
    lp_norm: float = ConfigField(1.0, gt=0, le=1)
    beta: float = ConfigField(10.0, gt=0, allow_inf_nan=False)
    kappa: float = ConfigField(1.01, ge=1, allow_inf_nan=False)
    iters: int = ConfigField(20, ge=1)

    @property
    def needs_data(self) -> bool:
        return False


ALGORITHMS.update({"rotation": RotationConfig, "svdquant": SVDQuantConfig, "hqq": HQQConfig})
