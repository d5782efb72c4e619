"""Quantizing a checkpoint into a new folder, from options to a report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from detent.data import check_source
from detent.distributed import gathered, launched, rank
from detent.engine.data_loop import run_batches
from detent.engine.host import CannotStream
from detent.engine.processes import Together, check_same, check_shareable
from detent.external.files import user_path
from detent.external.output import add_to_manifest, check_room, check_target, may_be_finished
from detent.model.kv_cache import check_cache
from detent.nn.experts import every_token_to_every_expert
from detent.notices import collected_notices
from detent.plan.cost import cost
from detent.plan.mixtures import check_every_token
from detent.plan.plan import Plan
from detent.pretrained.loading import load_model, load_tokenizer
from detent.report.resources import available_memory_bytes
from detent.report.run_report import REPORT_NAME, BeforeAfterBytes, Perplexity, RunReport, Verification
from detent.report.terminal import format_bytes
from detent.runs.blocks import quantize_by_blocks
from detent.runs.carried import with_carried
from detent.runs.journal import Journal, check_no_journal, finished_report, made_of
from detent.runs.load import load_quantized
from detent.runs.measure import Measure, measure_quantized, measure_source
from detent.runs.options import AlgorithmOptions, CalibrationOptions, EvaluationOptions, ModelOptions, SchemeOptions
from detent.runs.parts import calibration_report, layer_report, planned_weights
from detent.runs.plan import samples_of, spills
from detent.runs.prepare import calibration_batches, prepare
from detent.runs.probe import compare_few_blocks
from detent.runs.run import BUILTIN_MODEL, Run, model_folder
from detent.runs.search import search_schemes
from detent.runs.simulate import Quantized, simulate
from detent.runs.stream import LayerStream
from detent.runs.verify import check_logits, probe_logits, verify
from detent.runs.write import LayerResult, written

#: The relative error from which on a weight counts as lost: rounding noise stays far below, a weight of zeros has 1.
LOST_ERROR = 0.9


def quantize_checkpoint(
    model_options: ModelOptions,
    scheme_options: SchemeOptions,
    output_dir: str | Path,
    *,
    algorithms: AlgorithmOptions | None = None,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    run: Run | None = None,
) -> RunReport:
    """Quantize a checkpoint into a new folder: plan, calibrate, simulate, measure, write, read back.

    Everything that can be refused is refused before the weights are read. What a run that was interrupted has finished
    is kept next to `output_dir`; with `resume`, the same call goes on from there.

    Returns:
        The report, which is also in the folder as ``detent_report.json``.

    Raises:
        DetentError: anything that the user can mend; the output folder is then as it was.

    Example:
        >>> import detent
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     report = detent.quantize_checkpoint(
        ...         detent.ModelOptions(),
        ...         detent.SchemeOptions("w_int4_per_group_sym", group_size=32),
        ...         f"{folder}/out",
        ...         evaluation=detent.EvaluationOptions(skip=True),
        ...     )
        >>> report.weights.quantized
        28
    """
    run = run or Run()
    calibration, evaluation = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    output = user_path(output_dir)

    # The plan: whatever can be refused is refused here, before a weight is read.
    folder, builtin = model_folder(model_options)
    finished = resume and may_be_finished(output)
    if launched()[0] == 0 and not finished:  # of several processes, the first alone writes
        check_no_journal(output, resume=resume)
        for notice in check_target(output, source=folder, overwrite=overwrite):
            run.notify(notice)
    search = None
    if scheme_options.auto is not None:
        scheme_options, search = search_schemes(folder, model_options, scheme_options, calibration, run)
    prepared = prepare(folder, model_options, scheme_options, algorithms, run)
    source, config, dtype, plan = prepared.source, prepared.config, prepared.dtype, prepared.plan
    check_shareable(plan.algorithms, _why_alone(plan, resume=resume))
    if not builtin:
        run.tell_about_texts(calibration if plan.needs_data else None, evaluation)
    trust = model_options.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=trust) if plan.needs_data or not evaluation.skip else None
    batches = None
    if calibration.all_experts:
        check_every_token(plan.skeleton)
    if plan.needs_data:
        batches = calibration_batches(calibration, tokenizer, config, builtin, run)
    elif calibration.dataset is not None:
        check_source(calibration.dataset)  # not read, but a misspelled name shouldn't pass for a used one
    parts = made_of(source, plan, batches, dtype, prepared.min_kv_scale)
    parts |= {"calibrate_all_experts": str(calibration.all_experts), "checkpoint format": str(scheme_options.export)}
    if finished:
        run.notify(f"the run had finished: {output} is its result")
        return finished_report(output, parts)
    will = cost(plan, source, dtype, samples_of(plan, calibration), timed=False)
    limit = calibration.memory_budget or available_memory_bytes()
    spill = spills(will, calibration.memory_budget, limit)
    fits = limit is None or will.model <= limit
    check_room(output, will.disk)
    measure = Measure(evaluation, tokenizer, config, builtin, run)
    loading: dict[str, Any] = {
        "attention": model_options.attention,
        "trust_remote_code": trust,
    }

    # The work: weight by weight from disk where nothing needs data, else block by block, else in a model.
    streams = plan.streams and model_options.data_type == "auto"
    by_blocks = batches is not None and not plan.why_whole
    quantized: Quantized | None = None
    before = after = expected = verified = None
    held: dict[str, torch.dtype] = {}
    with (
        Together(model_options.device) as device,
        run.memory,
        collected_notices() as notices,
        ExitStack() as open_until_written,
    ):
        loading["device"] = device
        model, first = None, rank() == 0
        if first and (not (streams or by_blocks) or (fits and not evaluation.skip)):
            model = load_model(source, config, dtype=dtype, **loading)
            before = measure(model)
        elif first and not evaluation.skip:
            run.notify(
                f"the model takes {format_bytes(will.model)}, more than there is: perplexity is measured block by block"
            )
            before = measure_source(measure, source, config, dtype=dtype, **loading)
        journal = kept_by = None
        if streams or by_blocks:
            model = None
            alike = {name: part for name, part in parts.items() if not name.startswith("file ")}  # files have dates
            check_same(str(alike), "model, data or options")
            if first:
                journal = open_until_written.enter_context(Journal(output, parts, resume=resume, tell=run.notify))
        if streams:
            quantized, kept_by = LayerStream(source, plan, dtype, device), journal
        elif batches is not None and by_blocks:
            try:
                with every_token_to_every_expert(calibration.all_experts):
                    quantized, held = quantize_by_blocks(
                        source, plan, config, batches, journal, dtype, prepared.min_kv_scale, spill=spill, **loading
                    )
            except CannotStream as error:
                check_shareable([], f"its model can't be calibrated block by block ({error})")
                run.notify(f"the model was calibrated in memory as a whole, not block by block: {error}")
            notices[:] = dict.fromkeys(notice for told, _ in gathered(notices) for notice in told)
        if not first:
            return RunReport.model_validate(gathered()[0][0])
        if quantized is None:
            model = model or load_model(source, config, dtype=dtype, **loading)
            if plan.formats.kv_cache is not None:
                check_cache(model)
            loop = None if batches is None else (lambda m: run_batches(m, batches))
            with every_token_to_every_expert(calibration.all_experts):
                quantized = simulate(model, plan, loop, min_kv_scale=prepared.min_kv_scale)
            after, expected = measure(model), probe_logits(model)
            held = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        del model  # never two models in memory
        if model_options.data_type == "auto":
            held = {}

        # The folder: written under a temporary name, proved, reported on, and only then put in its place.
        everything = with_carried(quantized, source, plan, dtype, device)
        with written(
            output, source, plan, everything, dtype=dtype, held=held, overwrite=overwrite, journal=kept_by
        ) as out:
            with out.examined():
                if not scheme_options.export.verify:
                    run.notify("WARNING: what was written was not read back and compared, as asked for")
                else:
                    tensors, blocks = verify(out.folder, out.expected, source), None
                    if expected is None:
                        blocks, difference = compare_few_blocks(
                            out, source, plan, quantized, config, dtype=dtype, **loading
                        )
                    else:
                        reloaded = load_quantized(out.folder, dtype=dtype, **loading)
                        difference = check_logits(expected, probe_logits(reloaded))
                        del reloaded
                    verified = Verification(tensors=tensors, blocks=blocks, logit_difference=difference)
                if after is None and not evaluation.skip:
                    after = (
                        measure(load_quantized(out.folder, dtype=dtype, **loading))
                        if fits
                        else measure_quantized(measure, out.folder, dtype=dtype, **loading)
                    )
                for notice in [*notices, *_noteworthy(out.layers), *_lost(out.layers)]:
                    run.notify(notice)
                report = run.report(
                    model=model_options.model_dir or BUILTIN_MODEL,
                    scheme=plan.scheme.name,
                    perplexity=None if evaluation.skip else Perplexity(before=before, after=after),
                    evaluation=measure.details,
                    size_bytes=BeforeAfterBytes(before=source.nbytes, after=out.nbytes),
                    weights=planned_weights(source, plan),
                    layers=[layer_report(name, layer) for name, layer in out.layers.items()],
                    calibration=None if batches is None else calibration_report(batches),
                    output_dir=str(output),
                    layout=out.layout.name,
                    verification=verified,
                    made_of=parts,
                    search=search,
                )
                report.write(out.folder)
                add_to_manifest(out.folder, REPORT_NAME)
            if journal is not None:
                journal.ending(out.folder)
            out.commit()
        gathered(report.model_dump(mode="json"))
    return report


def _why_alone(plan: Plan, *, resume: bool) -> str:
    """Why several processes can't share a run; "" if they can."""
    if not plan.needs_data:
        return "it needs no calibration data, and data is what is shared"
    return plan.why_whole or ("resume goes on from the hidden states of one process" if resume else "")


def _lost(layers: Mapping[str, LayerResult]) -> list[str]:
    """A line about weights of which hardly anything is left."""
    lost = {name: layer.relative_error for name, layer in layers.items() if _is_lost(layer.relative_error)}
    if not lost:
        return []
    worst = max(lost, key=lambda name: lost[name] or 0.0)
    return [
        f"WARNING: {len(lost)} of {len(layers)} weights are lost: {worst} has a relative error of"
        f" {lost[worst]:.0%} (100% is a weight of zeros); leave {'it' if len(lost) == 1 else 'them'} in floating point,"
        " or choose smaller groups"
    ]


def _is_lost(error: float | None) -> bool:
    return error is not None and not error < LOST_ERROR


def _noteworthy(layers: Mapping[str, LayerResult]) -> list[str]:
    """One line for each reason why an algorithm kept round-to-nearest somewhere, or needed damping."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        for outcome in layer.outcomes:
            if outcome.noteworthy:
                reasons.setdefault((outcome.algorithm, outcome.notice), []).append(name)
    return [
        f"{algorithm}: {len(names)} of {len(layers)} layers, such as {names[0]}: {notice}"
        for (algorithm, notice), names in reasons.items()
    ]
