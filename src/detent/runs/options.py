"""What a run is asked for: the model, the scheme, and the texts to calibrate on and to measure with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelOptions:
    """Where a model comes from and how it is held.

    Attributes:
        model_dir: a folder, a hub name, or None for the built-in sample model.
        data_type: ``auto``, ``float16``, ``bfloat16`` or ``float32``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        attention: the attention implementation.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        revision: of a hub model.

    Example:
        >>> import detent
        >>> detent.ModelOptions(data_type="bfloat16").device
        'cpu'
    """

    model_dir: str | None = None
    data_type: str = "auto"
    device: str = "cpu"
    attention: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """What perplexity is measured on.

    Attributes:
        skip: measure nothing.
        dataset: a file, a hub data set, ``builtin``, or None for WikiText-2's test text (without a network: the
            built-in one).
        windows: number of windows to use; None for all.
        batch_size: windows run at once; None for 8, or fewer where their logits would take more than 1 GiB.
        max_batch_size: in place of 8, where `batch_size` is None.

    Example:
        >>> import detent
        >>> detent.EvaluationOptions(windows=16).windows
        16
    """

    skip: bool = False
    dataset: str | None = None
    windows: int | None = None
    batch_size: int | None = None
    max_batch_size: int | None = None


@dataclass(frozen=True)
class CalibrationOptions:
    """What ranges are calibrated on.

    Attributes:
        dataset: a file, a hub data set, ``builtin``, or None for the default one (without a network: the built-in
            text).
        seq_len: tokens in a sample. num_samples: how many. batch_size: samples run at once.
        memory_budget: bytes that the run may take; where that is tight, hidden states go to disk. None: what there is.
        all_experts: whether every expert of a mixture sees every token, not only those that its router sends it.

    Example:
        >>> import detent
        >>> detent.CalibrationOptions(num_samples=128).seq_len
        512
    """

    dataset: str | None = None
    seq_len: int = 512
    num_samples: int = 512
    batch_size: int = 1
    memory_budget: int | None = None
    all_experts: bool = False


@dataclass(frozen=True)
class ExportOptions:
    """The checkpoint format to write.

    Attributes:
        format: ``hf_format`` for compressed-tensors where it holds the model and else Detent's own layout; or the name
            of a layout (`detent.checkpoints.layouts`), which is an error where it can't hold the model.
        custom_mode: with ``hf_format``, the layout of another tool: ``quark``, ``awq`` or ``fp8``.
        pack_method: the order of 4-bit codes in the layout of Quark: ``reorder`` or ``order``.
        gguf_type: the type of GGUF, or the mixture of types, such as ``Q4_K_M``; None for the scheme's own.
        imatrix: a file of importances, as llama.cpp has it, for GGUF.
        gptq_version: of the layout of GPTQ: 1, which has no zero points of 0, or 2; None for 1 where all weights are
            symmetric, which most engines read, and 2 elsewhere.
        verify: whether what was written is read back and compared with what was simulated.

    Example:
        >>> import detent
        >>> detent.ExportOptions("compressed-tensors").verify
        True
    """

    format: str = "hf_format"
    custom_mode: str | None = None
    pack_method: str = "reorder"
    gguf_type: str | None = None
    imatrix: str | None = None
    verify: bool = True
    gptq_version: int | None = None


@dataclass(frozen=True)
class AutoOptions:
    """A search for the scheme of each layer, by the scheme name ``auto``; see `detent.runs.search`.

    Attributes:
        formats: names of the schemes to choose from; staying in floating point is always a choice too.
        effective_bits: the most bits of a weight on average, scales included; 4.8 where nothing else is given.
        bytes: the most bytes of all tensors, or a size such as ``"4GiB"``.
        scores: a file for what was measured, from which `detent.get_auto_quantize_config` and the like solve again.

    Example:
        >>> import detent
        >>> detent.AutoOptions(("w_fp4_a_fp4_scale_fp8", "w_fp8_a_fp8"), effective_bits=6).bytes is None
        True
    """

    formats: tuple[str, ...]
    effective_bits: float | None = None
    bytes: str | int | None = None
    scores: str | None = None


@dataclass(frozen=True)
class SchemeOptions:
    """What is quantized and how; see `detent.config.parse_scheme`.

    Attributes:
        name: the scheme; None for the default one, where the model is the built-in one too.
        group_size: None where the user gave none.
        group_size_per_layer: (wildcard on module names, group size) pairs; the last match wins.
        kv_cache: the type of keys and values: see `detent.config.kv_cache_format`. They are quantized as attention
            multiplies them, keys after the rotary embedding, which is how engines cache them.
        min_kv_scale: the least calibrated scale of keys and values.
        fp8_attention: whether queries, keys, values and attention probabilities are quantized to FP8.
        exclude: wildcards on module names; None for the usual ones.
        overrides: a JSON file of what to use in place of what is found of the model's structure; see `find_structure`.
        export: the checkpoint format to write; see `ExportOptions`.
        allow_unfused: whether layers that engines run as one may have different formats.
        quantize_mtp: whether the linear layers that a checkpoint has beside its model, such as those that predict
            several tokens at once, are quantized too, without data.
        auto: where `name` is ``auto``: what to choose from, and the budget.
        chosen: (layer, scheme) pairs in place of `name`; the other layers stay.
        experts_second_step: a scheme of weights, such as ``w_int4_per_channel_sym``, that encodes the FP8 codes of
            experts once more.

    Example:
        >>> import detent
        >>> detent.SchemeOptions("w_int4_per_group_sym", group_size=128).kv_cache is None
        True
    """

    name: str | None = None
    group_size: int | None = None
    group_size_per_layer: tuple[tuple[str, int], ...] = ()
    scale_format: str | None = None
    scale_calculation_mode: str = "even"
    kv_cache: str | None = None
    min_kv_scale: float = 0.0
    fp8_attention: bool = False
    exclude: list[str] | None = None
    overrides: str | None = None
    export: ExportOptions = ExportOptions()
    allow_unfused: bool = False
    quantize_mtp: bool = False
    experts_second_step: str | None = None
    auto: AutoOptions | None = None
    chosen: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class AlgorithmOptions:
    """What runs on the weights besides round-to-nearest; see `detent.config.algorithm_names.named_algorithms`.

    Attributes:
        before: names of algorithms that prepare the model.
        algorithm: names of those that quantize it, with commas between.
        before_file, file: JSON files with their settings.

    Example:
        >>> import detent
        >>> detent.AlgorithmOptions(algorithm="gptq").algorithm
        'gptq'
    """

    before: tuple[str, ...] = ()
    algorithm: str | None = None
    before_file: str | None = None
    file: str | None = None
