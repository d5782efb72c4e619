"""``detent quantize``: the flags of AMD Quark's ``quantize_quark.py``, with its names and defaults.

Flags for what Detent can't do yet are known by name, so that using one is an error that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from detent.cli import console
from detent.cli.asked import ONNX, asked_for, checkpoint_format
from detent.cli.startup import check_early, first_process, load_libraries
from detent.errors import DetentError

if TYPE_CHECKING:
    pass

#: Panels of the help; an option's panel says what sets it apart from the others.
_QUANTIZING, _LATER = "quantizing", "not implemented yet"
#: What to do in place of a flag that is for later.
_INSTEAD = {"multi_gpu": "; several GPUs share a run with calibration data as processes: torchrun --nproc_per_node N"}


def _option(name: str, help: str, **details: Any) -> Any:
    return typer.Option(f"--{name}", help=help, **details)


def _of_quantizing(name: str, help: str) -> Any:
    """A flag that has no meaning where nothing is quantized."""
    return _option(name, help, rich_help_panel=_QUANTIZING)


def _later(name: str) -> Any:
    """A flag that is known by name alone: `--help` lists it in one line at the end, using it is an error."""
    return _option(name, "", rich_help_panel=_LATER, hidden=True)


def quantize(
    context: typer.Context,
    model_dir: Annotated[
        str | None, _option("model_dir", "Checkpoint folder or hub name; without it, the built-in sample model.")
    ] = None,
    output_dir: Annotated[
        str, _option("output_dir", "Folder to write the quantized checkpoint to.")
    ] = "exported_model",
    overwrite: Annotated[bool, _of_quantizing("overwrite", "Replace OUTPUT_DIR if Detent wrote it.")] = False,
    quant_scheme: Annotated[
        str | None, _of_quantizing("quant_scheme", "What to quantize and how: see `detent schemes`.")
    ] = None,
    auto_formats: Annotated[
        list[str] | None, _of_quantizing("auto_formats", "With auto: the schemes to choose from for each layer.")
    ] = None,
    effective_bits: Annotated[
        float | None, _of_quantizing("effective_bits", "With auto: mean bits of a weight, with scales (default: 4.8).")
    ] = None,
    auto_bytes: Annotated[
        str | None, _of_quantizing("auto_bytes", "With auto: the most that all tensors may take, such as 4GiB.")
    ] = None,
    auto_scores: Annotated[
        str | None, _of_quantizing("auto_scores", "With auto: a JSON file to keep all scores in.")
    ] = None,
    group_size: Annotated[
        int | None, _of_quantizing("group_size", "Elements per group, for schemes with groups (default: 128).")
    ] = None,
    group_size_per_layer: Annotated[
        list[str] | None, _of_quantizing("group_size_per_layer", "PATTERN SIZE: another group size for some layers.")
    ] = None,
    scale_format: Annotated[
        Literal["e4m3", "float32"] | None,
        _of_quantizing("scale_format", "Scale of FP4 and FP6 in groups (default: e4m3)."),
    ] = None,
    scale_calculation_mode: Annotated[
        Literal["even", "floor", "ceil"], _of_quantizing("scale_calculation_mode", "Exponent rule of OCP MX.")
    ] = "even",
    kv_cache_dtype: Annotated[
        str | None, _of_quantizing("kv_cache_dtype", "Type of the key/value cache, such as fp8.")
    ] = None,
    moe_experts_second_step_config: Annotated[
        str | None,
        _of_quantizing("moe_experts_second_step_config", "A second scheme for the FP8 codes of experts: int4 of fp8."),
    ] = None,
    min_kv_scale: Annotated[float, _of_quantizing("min_kv_scale", "Floor of the key/value cache's scales.")] = 0.0,
    fp8_attention_quant: Annotated[
        bool, _of_quantizing("fp8_attention_quant", "FP8 for queries, keys, values and attention probabilities.")
    ] = False,
    kv_cache_post_rope: Annotated[
        bool, _of_quantizing("kv_cache_post_rope", "Quantize keys after the rotary embedding; Detent always does.")
    ] = True,
    exclude_layers: Annotated[
        list[str] | None,
        _of_quantizing("exclude_layers", "NAMES (wildcards) of layers that stay; none given: exclude nothing."),
    ] = None,
    structure_overrides: Annotated[
        str | None,
        _of_quantizing("structure_overrides", "JSON file of what to use in place of the structure that is found."),
    ] = None,
    quant_algo: Annotated[
        str | None,
        _of_quantizing("quant_algo", "What improves the weights: awq, gptq, best, ... (several: with commas)."),
    ] = None,
    quant_algo_config_file_path: Annotated[
        str | None, _of_quantizing("quant_algo_config_file_path", "JSON file with the algorithm's settings.")
    ] = None,
    pre_quantization_optimization: Annotated[
        list[str] | None,
        _of_quantizing("pre_quantization_optimization", "What prepares the model: rotation, quarot or smoothquant."),
    ] = None,
    pre_optimization_config_file_path: Annotated[
        str | None, _of_quantizing("pre_optimization_config_file_path", "JSON file with its settings.")
    ] = None,
    allow_unfused: Annotated[
        bool, _of_quantizing("allow_unfused", "Let layers that engines run as one (q, k, v) have different formats.")
    ] = False,
    quantize_mtp: Annotated[
        bool, _of_quantizing("quantize_mtp", "Quantize multi-token-prediction layers too, without data.")
    ] = False,
    model_export: Annotated[
        list[str] | None,
        _of_quantizing(
            "model_export",
            "Checkpoint format: hf_format (default), or the name of one, which is an error where it can't hold the"
            " model: see `detent formats`. With onnx, files for ONNX beside it.",
        ),
    ] = None,
    custom_mode: Annotated[
        Literal["quark", "awq", "fp8"] | None,
        _of_quantizing("custom_mode", "With hf_format: the layout of Quark, AutoAWQ or AutoFP8."),
    ] = None,
    pack_method: Annotated[
        Literal["reorder", "order"], _of_quantizing("pack_method", "Order of 4-bit codes in the layout of Quark.")
    ] = "reorder",
    gguf_type: Annotated[
        str | None, _of_quantizing("gguf_type", "Type, or mixture of types, of GGUF, such as Q4_K_M.")
    ] = None,
    imatrix: Annotated[
        str | None, _of_quantizing("imatrix", "File of importances, as llama.cpp writes it, for GGUF.")
    ] = None,
    gptq_version: Annotated[
        int | None,
        _of_quantizing(
            "gptq_version",
            "Of the layout of GPTQ: 1 or 2 (default: 1 where weights are symmetric, as most engines read).",
        ),
    ] = None,
    onnx_without_cache: Annotated[
        bool, _of_quantizing("onnx_without_cache", "ONNX without keys and values of earlier tokens as inputs.")
    ] = False,
    no_verify: Annotated[bool, _of_quantizing("no_verify", "Don't read back what was written and compare it.")] = False,
    data_type: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], _option("data_type", "Type to load weights in.")
    ] = "auto",
    device: Annotated[str | None, _option("device", "cpu, cuda or cuda:N (default: cuda where there is one).")] = None,
    model_attn_implementation: Annotated[
        Literal["eager", "sdpa", "flash_attention_2"], _option("model_attn_implementation", "Attention implementation.")
    ] = "eager",
    trust_remote_code: Annotated[
        bool, _option("trust_remote_code", "Let Python code that comes with the checkpoint run.")
    ] = False,
    revision: Annotated[str | None, _option("revision", "Branch, tag or commit of a hub model.")] = None,
    dataset: Annotated[
        str | None, _option("dataset", "Calibration: a .txt/.json/.jsonl/.parquet file, a hub data set, or 'builtin'.")
    ] = None,
    seq_len: Annotated[int, _option("seq_len", "Tokens in a calibration sample.", min=2)] = 512,
    batch_size: Annotated[int, _option("batch_size", "Calibration samples that run at once.", min=1)] = 1,
    num_calib_data: Annotated[int, _option("num_calib_data", "Number of calibration samples.", min=1)] = 512,
    calibrate_all_experts: Annotated[
        bool, _of_quantizing("calibrate_all_experts", "Show every expert every token, not only its router's choice.")
    ] = False,
    memory_budget: Annotated[
        str | None, _of_quantizing("memory_budget", "The most memory to use, such as 4GiB (default: what is free).")
    ] = None,
    resume: Annotated[bool, _of_quantizing("resume", "Go on with the run that was interrupted.")] = False,
    skip_quantization: Annotated[bool, _option("skip_quantization", "Only evaluate the model.")] = False,
    skip_evaluation: Annotated[bool, _option("skip_evaluation", "Don't measure perplexity.")] = False,
    eval_dataset: Annotated[
        str | None, _option("eval_dataset", "What perplexity is measured on; as --dataset.")
    ] = None,
    num_eval_data: Annotated[int, _option("num_eval_data", "Windows to evaluate; -1: all.", min=-1)] = -1,
    eval_batch_size: Annotated[
        str | None, _option("eval_batch_size", "Windows evaluated at once, or auto (default: 8, if memory allows).")
    ] = None,
    max_eval_batch_size: Annotated[
        int | None, _option("max_eval_batch_size", "The most windows that auto may take.", min=1)
    ] = None,
    model_reload: Annotated[
        bool, _option("model_reload", "Reload and evaluate what --import_model_dir holds.")
    ] = False,
    import_model_dir: Annotated[str | None, _option("import_model_dir", "A quantized checkpoint to reload.")] = None,
    import_file_format: Annotated[
        Literal["hf_format", "quark_format", "gguf"] | None,
        _option("import_file_format", "Its format (default: what the folder says)."),
    ] = None,
    multi_gpu: Annotated[bool, _later("multi_gpu")] = False,
    multi_device: Annotated[bool, _later("multi_device")] = False,
    export_weight_format: Annotated[
        Literal["real_quantized", "fake_quantized"], _later("export_weight_format")
    ] = "real_quantized",
    weight_matrix_merge: Annotated[bool, _later("weight_matrix_merge")] = False,
    torch_compile: Annotated[bool, _later("torch_compile")] = False,
    params_save: Annotated[bool, _later("params_save")] = False,
    save_dir: Annotated[str, _later("save_dir")] = "model_params",
    params_load: Annotated[bool, _later("params_load")] = False,
    json_path: Annotated[str | None, _later("json_path")] = None,
    safetensors_path: Annotated[str | None, _later("safetensors_path")] = None,
    tasks: Annotated[str | None, _later("tasks")] = None,
    num_fewshot: Annotated[int | None, _later("num_fewshot")] = None,
    apply_chat_template: Annotated[bool, _later("apply_chat_template")] = False,
    use_ppl_eval_for_kv_cache: Annotated[bool, _later("use_ppl_eval_for_kv_cache")] = False,
    ppl_eval_for_kv_cache_context_size: Annotated[int, _later("ppl_eval_for_kv_cache_context_size")] = 1024,
    ppl_eval_for_kv_cache_sample_size: Annotated[int, _later("ppl_eval_for_kv_cache_sample_size")] = 512,
    ppl_eval_for_kv_cache_patch_size: Annotated[int | None, _later("ppl_eval_for_kv_cache_patch_size")] = None,
    use_mlperf_rouge: Annotated[bool, _later("use_mlperf_rouge")] = False,
    eval_data_dir: Annotated[str | None, _later("eval_data_dir")] = None,
    save_metrics_to_csv: Annotated[bool, _later("save_metrics_to_csv")] = False,
    metrics_output_dir: Annotated[str, _later("metrics_output_dir")] = "metrics_output_dir",
    use_tp: Annotated[bool, _later("use_tp")] = False,
) -> None:
    """Quantize a language model, measure it, write it and read it back.

    Without any argument: the built-in sample model, w_int4_per_group_sym, into exported_model.
    """
    check_flags(context)
    only_evaluate = skip_quantization or model_reload
    notices = check_early(
        import_model_dir if model_reload else model_dir,
        [dataset, eval_dataset],
        output_dir if first_process() and not only_evaluate else None,
        overwrite=overwrite,
        resume=resume,
    )
    load_libraries()
    from detent.report import summary_table
    from detent.runs.evaluate import evaluate_checkpoint
    from detent.runs.quantize import quantize_checkpoint
    from detent.runs.run import Run

    asked = asked_for(context)
    shown = console.notice if first_process() else lambda text: None
    run = Run(context.obj.command, shown, started=context.obj.started)
    for notice in notices:
        run.notify(notice)
    if only_evaluate:
        report = evaluate_checkpoint(
            asked.model, asked.evaluation, quantized=model_reload, file_format=import_file_format, run=run
        )
    else:
        report = quantize_checkpoint(
            asked.model,
            asked.scheme,
            output_dir,
            algorithms=asked.algorithms,
            calibration=asked.calibration,
            evaluation=asked.evaluation,
            overwrite=overwrite,
            resume=resume,
            run=run,
        )
    if first_process():
        console.show(summary_table(report))
        if not only_evaluate and ONNX in (model_export or []):
            from detent.runs.onnx import add_onnx

            console.notice(str(add_onnx(output_dir, with_cache=not onnx_without_cache, model=asked.model)))


def check_flags(context: typer.Context) -> dict[str, Any]:
    """Refuse flags that are for later, unknown values, and flags that contradict each other; {name: value} of those
    that were given."""
    typed = _typed(context)
    _refuse_later(typed, context.params["model_export"])
    _check_together(typed)
    return typed


def _typed(context: typer.Context) -> dict[str, Any]:
    """{name: value} of the flags that were given, with another value than their default."""
    return {
        parameter.name: context.params[parameter.name]
        for parameter in context.command.params
        if parameter.name is not None
        and _source(context, parameter.name) != "DEFAULT"
        and context.params[parameter.name] != parameter.default
    }


def _source(context: typer.Context, name: str) -> str:
    """Where a flag's value comes from, by name: typer may bring a parser library of its own, with its own enum."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def _in_panel(panel: str) -> list[str]:
    """The names of the flags in a panel, in the order of the declaration."""
    options = {name: get_args(hint)[1:] for name, hint in get_type_hints(quantize, include_extras=True).items()}
    return [name for name, more in options.items() if any(o.rich_help_panel == panel for o in more)]


def epilog() -> str:
    """The last line of ``--help``: the flags that are known by name alone."""
    return f"Not implemented in this version: {' '.join(f'--{name}' for name in _in_panel(_LATER))}"


def _refuse_later(typed: dict[str, Any], exports: list[str] | None) -> None:
    for name in _in_panel(_LATER):
        if name in typed:
            value = "" if typed[name] is True else f" {typed[name]}"
            instead = _INSTEAD.get(name, "")
            raise DetentError(f"--{name}{value}: not implemented in this version{instead}")
    checkpoint_format(exports)


def _check_together(typed: dict[str, Any]) -> None:
    """Flags that contradict each other."""
    if "model_reload" in typed and "import_model_dir" not in typed:
        raise DetentError("--model_reload needs --import_model_dir, the folder of a quantized checkpoint")
    if "import_model_dir" in typed and "model_reload" not in typed:
        raise DetentError("--import_model_dir is what --model_reload reloads; pass both")
    evaluating = [flag for flag in ("skip_quantization", "model_reload") if flag in typed]
    if len(evaluating) == 2:
        raise DetentError(
            "--skip_quantization evaluates a float model and --model_reload a quantized one; pass one of them"
        )
    if not evaluating:
        return
    used = [name for name in _in_panel(_QUANTIZING) if name in typed]
    if used:
        raise DetentError(f"--{evaluating[0]} quantizes nothing, so --{used[0]} has no effect; leave one of them out")
    if "skip_evaluation" in typed:
        raise DetentError(f"--{evaluating[0]} with --skip_evaluation leaves nothing to do")
