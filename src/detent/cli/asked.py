"""What the flags of a command ask for, as the options of a run."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import typer

from detent.cli.arguments import NOTHING
from detent.cli.startup import batch_size_of, choose_device, windows
from detent.errors import DetentError

if TYPE_CHECKING:
    from detent.runs.options import (
        AlgorithmOptions,
        AutoOptions,
        CalibrationOptions,
        EvaluationOptions,
        ModelOptions,
        SchemeOptions,
    )

#: A value of model_export that isn't a checkpoint format: files for ONNX, made of the checkpoint.
ONNX = "onnx"


@dataclass(frozen=True)
class Asked:
    """What the flags ask for."""

    model: ModelOptions
    scheme: SchemeOptions
    algorithms: AlgorithmOptions
    calibration: CalibrationOptions
    evaluation: EvaluationOptions


def asked_for(context: typer.Context) -> Asked:
    """What the flags of a command ask for. Libraries are loaded."""
    from detent.runs.options import (
        AlgorithmOptions,
        CalibrationOptions,
        EvaluationOptions,
        ExportOptions,
        ModelOptions,
        SchemeOptions,
    )

    flags = SimpleNamespace(**context.params)
    prepare = [name for name in flags.pre_quantization_optimization or [] if name != NOTHING]
    exclude = flags.exclude_layers or None  # "exclude nothing" is a name that is empty
    return Asked(
        ModelOptions(
            flags.import_model_dir if flags.model_reload else flags.model_dir,
            flags.data_type,
            choose_device(flags.device),
            flags.model_attn_implementation,
            flags.trust_remote_code,
            flags.revision,
        ),
        SchemeOptions(
            flags.quant_scheme,
            flags.group_size,
            tuple(_pattern_and_size(text) for text in flags.group_size_per_layer or []),
            flags.scale_format,
            flags.scale_calculation_mode,
            flags.kv_cache_dtype,
            flags.min_kv_scale,
            flags.fp8_attention_quant,
            None if exclude is None else [name for name in exclude if name != NOTHING],
            flags.structure_overrides,
            ExportOptions(
                checkpoint_format(flags.model_export),
                flags.custom_mode,
                flags.pack_method,
                flags.gguf_type,
                flags.imatrix,
                not flags.no_verify,
                flags.gptq_version,
            ),
            flags.allow_unfused,
            flags.quantize_mtp,
            flags.moe_experts_second_step_config,
            _auto(flags),
        ),
        AlgorithmOptions(
            tuple(prepare),
            flags.quant_algo,
            flags.pre_optimization_config_file_path,
            flags.quant_algo_config_file_path,
        ),
        CalibrationOptions(
            flags.dataset,
            flags.seq_len,
            flags.num_calib_data,
            flags.batch_size,
            _bytes_of(flags.memory_budget),
            flags.calibrate_all_experts,
        ),
        EvaluationOptions(
            flags.skip_evaluation,
            flags.eval_dataset,
            windows(flags.num_eval_data),
            batch_size_of(flags.eval_batch_size),
            flags.max_eval_batch_size,
        ),
    )


def _auto(flags: SimpleNamespace) -> AutoOptions | None:
    """What a search chooses from, and its budget; None where one scheme is named."""
    from detent.runs.options import AutoOptions
    from detent.runs.prepare import AUTO

    given = [name for name in ("auto_formats", "effective_bits", "auto_bytes", "auto_scores") if getattr(flags, name)]
    if flags.quant_scheme != AUTO:
        if given:
            raise DetentError(f"--{given[0]} belongs to a search: --quant_scheme {AUTO}")
        return None
    names = [name for text in flags.auto_formats or [] for name in text.split(",") if name]
    if not names:
        raise DetentError(
            f"--quant_scheme {AUTO} needs --auto_formats, the schemes to choose from, such as"
            " --auto_formats w_fp4_a_fp4_scale_fp8,w_fp8_a_fp8"
        )
    return AutoOptions(tuple(dict.fromkeys(names)), flags.effective_bits, flags.auto_bytes, flags.auto_scores)


def _bytes_of(text: str | None) -> int | None:
    """The bytes of a size such as 4GiB, 500MB or 8G."""
    from detent.config.base import size_in_bytes

    if text is None:
        return None
    if (size := size_in_bytes(text)) is None:
        raise DetentError(f"--memory_budget takes a size such as 4GiB or 500MB, not {text!r}")
    return size


def _pattern_and_size(text: str) -> tuple[str, int]:
    pattern, _, size = text.rpartition("=")
    if not pattern or not size.isdigit() or int(size) < 1:
        raise DetentError(
            f"--group_size_per_layer takes a wildcard and a positive size, as in '*.down_proj 64', not {text!r}"
        )
    return pattern, int(size)


def checkpoint_format(exports: list[str] | None) -> str:
    """The checkpoint format among the values of --model_export."""
    formats = [name for name in dict.fromkeys(exports or []) if name != ONNX]
    if len(formats) > 1:
        raise DetentError(
            f"--model_export: one checkpoint format a run, not {' and '.join(formats)}; `detent convert` makes another"
            " of the result"
        )
    return formats[0] if formats else "hf_format"
