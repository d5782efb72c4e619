"""From one format of quantized checkpoints to another: the same values, laid out in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detent.checkpoints import (
    LayerCheckpoint,
    LayerFormats,
    Layout,
    ModelFormats,
    QuantizedCheckpoint,
    QuantizedWriter,
    Source,
    choose,
    open_quantized,
)
from detent.checkpoints.folder import digest
from detent.config import Scheme, parse_scheme
from detent.errors import DetentError
from detent.external.files import user_path
from detent.external.output import add_to_manifest, check_room, check_target
from detent.formats import Format, QTensor, decode, encode, restate, same_bits
from detent.model.conversion import replace_quant_module, set_quantizer_by_cfg
from detent.nn.attention import attention_modules
from detent.nn.experts_layout import take_experts_apart
from detent.plan.kept import left_in_float
from detent.plan.plan import with_scale_dtype
from detent.plan.readers import misread
from detent.pretrained.loading import load_config, model_dtype, model_on_meta, resolve_folder
from detent.pretrained.names import CheckpointNames
from detent.progress import track
from detent.report.run_report import REPORT_NAME, BeforeAfterBytes, RunReport, Verification
from detent.runs.load import load_quantized
from detent.runs.options import ExportOptions
from detent.runs.parts import stored_parts
from detent.runs.prepare import layouts_for
from detent.runs.probe import with_few_blocks
from detent.runs.run import Run
from detent.runs.verify import Expected, check_logits, probe_logits, verify
from detent.runs.write import SHARD_SIZE


def convert_checkpoint(
    model_dir: str,
    output_dir: str | Path,
    export: ExportOptions,
    *,
    requantize: bool = False,
    scheme: str | None = None,
    group_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    run: Run | None = None,
) -> RunReport:
    """Write a quantized checkpoint in another format. Weights keep their values exactly, and the result is read back,
    decoded and compared with the source, layer by layer.

    Args:
        model_dir: a folder or hub name: a checkpoint in any format that Detent reads, whoever wrote it.
        output_dir: the folder to appear.
        export: the format to write.
        requantize: whether weights may be rounded once more, to nearest, where the format lacks their values.
        scheme: how weights are to be stored, by a name as for `detent.parse_scheme`; by default as they are, or as the
            format stores their scheme. group_size: of that scheme.
        overwrite: replace a folder that Detent wrote.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        run: the run in progress.

    Returns:
        The report, which is also in the folder as ``detent_report.json``.

    Raises:
        DetentError: the format can't hold the model, or not without rounding; the checkpoint can't be read; what was
            written isn't what was read. The output folder is then as it was.

    Example:
        >>> import detent
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     report = detent.quantize_checkpoint(
        ...         detent.ModelOptions(),
        ...         detent.SchemeOptions("w_int4_per_group_sym", group_size=32),
        ...         f"{folder}/first",
        ...         evaluation=detent.EvaluationOptions(skip=True),
        ...     )
        ...     report = detent.convert_checkpoint(f"{folder}/first", f"{folder}/b", detent.ExportOptions("detent"))
        >>> report.scheme
        'compressed-tensors as detent'
    """
    run, output, folder = run or Run(), user_path(output_dir), resolve_folder(model_dir)
    for notice in check_target(output, source=folder, overwrite=overwrite):
        run.notify(notice)
    wanted = layouts_for(export)
    if scheme is None and group_size is not None:
        raise DetentError("group_size belongs to a scheme; name one (quant_scheme), or leave it out")
    checkpoint = open_quantized(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    dtype = model_dtype("auto", config, checkpoint.source)
    named = None if scheme is None else with_scale_dtype(parse_scheme(scheme, group_size), dtype)
    if named is not None and (named.weight is None or named.input or named.output):
        raise DetentError(
            f"quant_scheme {scheme} is not one of weights alone; activations stay as they are in {folder}"
        )
    model = model_on_meta(config, trust_remote_code=trust_remote_code)
    layout, formats = _choose(checkpoint, wanted, named, model)
    check_room(output, checkpoint.source.nbytes)
    few = with_few_blocks(config, model, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "notify": run.notify}
    with (
        run.memory,
        QuantizedWriter(
            output,
            source=checkpoint.source,
            formats=formats,
            layout=layout,
            overwrite=overwrite,
            max_shard_size=SHARD_SIZE,
        ) as writer,
    ):
        examples: dict[LayerFormats, LayerCheckpoint] = {}
        kept: dict[str, int] = {}
        rounded: list[str] = []
        for name in track(formats.layers, "Converting", len(formats.layers)):
            record = checkpoint.layer(name)
            other = _converted(record, formats.layers[name], layout, requantize)
            if requantize and record.weight is not None and not _same(record, other):
                rounded.append(name)
            writer.add_layer(other)
            examples.setdefault(other.formats, other)
        for name in filter(layout.stores, checkpoint.kept):
            tensor = layout.settled(name, checkpoint.tensor(name))
            writer.add_tensor(name, tensor)
            kept[name] = digest(tensor)
        kv = checkpoint.kv_scales()
        for module, (key, value, *more) in kv.items():
            writer.add_kv(module, key, value, *more)
        written = writer.close(checkpoint.config)
        with writer.examined():
            used = frozenset(checkpoint.source.tensors.keys() - kept.keys())
            expected = Expected(formats, list(examples.values()), kept, kv, dict(writer.digests), used)
            tensors, found = verify(written, expected, checkpoint.source), open_quantized(written)
            for name in track(formats.layers, "Comparing", len(formats.layers)):
                if name not in rounded and not _same(checkpoint.layer(name), found.layer(name)):
                    raise DetentError(f"the written checkpoint is wrong: {name} decodes to other values than before")
            logits, verified = probe_logits(load_quantized(written, config=few, **how)), None
            if rounded:
                run.notify(
                    f"{len(rounded)} of {len(formats.layers)} weights were rounded once more, such as {rounded[0]};"
                    " quantizing the original checkpoint loses less"
                )
            else:
                difference = check_logits(probe_logits(load_quantized(folder, config=few, **how)), logits)
                blocks = None if few is None else getattr(few, "num_hidden_layers", None)
                verified = Verification(tensors=tensors, blocks=blocks, logit_difference=difference)
            report = run.report(
                model=model_dir,
                scheme=f"{checkpoint.method} as {layout.name}",
                size_bytes=BeforeAfterBytes(before=checkpoint.source.nbytes, after=writer.nbytes),
                output_dir=str(output),
                layout=layout.name,
                verification=verified,
                **stored_parts(found),
            )
            report.write(written)
            add_to_manifest(written, REPORT_NAME)
            found.source.close()
        writer.commit()
    return report


def _choose(
    checkpoint: QuantizedCheckpoint, wanted: Sequence[Layout], scheme: Scheme | None, model: nn.Module
) -> tuple[Layout, ModelFormats]:
    """The first layout that holds the model, and the formats that it then has. Raises DetentError: none does."""
    view, formats, misreads = _for_engines(checkpoint, model)
    reasons = []
    for layout in [layout.of(view) for layout in wanted]:
        if layout.types({}) is not None:
            raise DetentError("a mixture of types chooses formats by itself; quantize the original checkpoint with it")
        for adapted in (False, True):
            layers = {name: _as_stored(layer, layout, scheme, adapted) for name, layer in formats.layers.items()}
            target = replace(formats, layers=layers)
            reason = misreads.get(layout.name) or layout.can_hold(target)
            if reason is None:
                return layout, target
        reasons.append(reason)
    choose(formats, wanted, refused=misreads)  # which says what could hold it
    raise DetentError("; ".join(filter(None, reasons)))


def _as_stored(layer: LayerFormats, layout: Layout, scheme: Scheme | None, adapted: bool) -> LayerFormats:
    """A layer's formats with its weight as `scheme` or, if `adapted`, as the layout has it."""
    if layer.weight is None:
        return layer
    weight = layer.weight if scheme is None else scheme.weight
    if adapted:
        weight = layout.adapt(Scheme("", weight, layer.input, layer.output)).weight
    return replace(layer, weight=weight)


def _for_engines(checkpoint: QuantizedCheckpoint, model: nn.Module) -> tuple[Source, ModelFormats, dict[str, str]]:
    """The float model that a checkpoint stands for; its formats with what `plan.make_plan` adds for engines (what stays
    in float, other names of layers); and why readers of a layout would misread the model. `model` is converted."""
    take_experts_apart(model)
    source, formats = checkpoint.source, checkpoint.formats
    known = {name: (source.info(name).shape, source.info(name).dtype) for name in checkpoint.kept}
    known |= {f"{n}.weight": (layer.shape, torch.float32) for n, layer in formats.layers.items() if layer.weight}
    view = Source.imagined(checkpoint.path, known)
    names = CheckpointNames(model, view.tensors)
    modules = {n: (names.parameter(f"{n}.weight") or f"{n}.weight").removesuffix(".weight") for n in formats.layers}
    ignored, merges = left_in_float(view, model, names, modules.values())
    aliases = {n: module for n, module in modules.items() if n != module and module not in names.experts}
    formats = replace(formats, ignored=ignored, aliases=aliases, merges=merges)
    replace_quant_module(model)
    cached = checkpoint.kv_scales()
    for name, _ in attention_modules(model):
        if formats.kv_cache is not None and (formats.kv_cache.dynamic or names.container(name) in cached):
            rule = {"quantizer_name": f"{name}.[kv]_bmm_quantizer", "cfg": {"format": formats.kv_cache}}
            set_quantizer_by_cfg(model, [rule])
    there = dict(model.named_modules())
    mine = {modules[n]: layer for n, layer in formats.layers.items() if modules[n] in there}
    return view, formats, misread(model, replace(formats, layers=mine))


def _converted(record: LayerCheckpoint, formats: LayerFormats, layout: Layout, requantize: bool) -> LayerCheckpoint:
    """A layer in the formats that it is written in. Raises DetentError: its values have to be rounded for that."""
    q = record.weight
    if q is None or formats.weight is None:
        return record
    other = restate(q, formats.weight)
    if other is None and not requantize:
        raise DetentError(
            f"{record.name}: {layout.name} would store it as [{formats.weight}], in which its values, [{q.format}],"
            " aren't; quantize the original checkpoint, or round them once more (requantize)"
        )
    if other is None and formats.weight.has_outer_scale:
        raise DetentError(
            f"{record.name}: [{formats.weight}] has a scale that layers share, so weights can't be rounded to it one by"
            " one; quantize the original checkpoint"
        )
    return replace(record, weight=_rounded(q, formats.weight, record.name) if other is None else other)


def _rounded(q: QTensor, fmt: Format, name: str) -> QTensor:
    """The values of `q` rounded to another format, with its scales or with new ones, whichever errs less."""
    values = decode(q)
    ways = [way for way in (restate(q, fmt, exact=False), encode(values, fmt, name=name)) if way is not None]
    return min(ways, key=lambda way: float((decode(way) - values).norm()))


def _same(before: LayerCheckpoint, after: LayerCheckpoint) -> bool:
    """Whether two layers have the same weight, decoded."""
    if before.weight is None or after.weight is None:
        return before.weight is after.weight
    return same_bits(decode(before.weight), decode(after.weight))
