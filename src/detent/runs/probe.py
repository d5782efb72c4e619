"""A model of few blocks in place of a large one: to compare what is written with what was simulated, cheaply."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import Source
from detent.errors import DetentError
from detent.formats import QTensor, decode
from detent.nn.experts_layout import take_experts_apart
from detent.plan.plan import Plan
from detent.pretrained.loading import load_config, model_on_meta
from detent.runs.load import Stored, load_quantized, simulated_model
from detent.runs.simulate import Quantized
from detent.runs.verify import check_logits, kept_tensor, probe_logits
from detent.runs.write import Written, in_file

#: Decoded weights that are kept for a second use.
KEPT_BYTES = 1 << 28
#: A list of so many values may be something else than one value for each block, such as two ends of a range.
SHORT = 4


def with_few_blocks(config: Any, model: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model with one block that is otherwise the same, or with two where the second is of
    another shape than the first; None if it can't be had.

    Args:
        config: of the whole model.
        model: the whole model, on any device: every parameter of the small one has to be one of its own.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """
    few = copy.deepcopy(config)
    blocks = 1 if _alike(model) else 2
    cut = False
    for part in (few, getattr(few, "text_config", None)):
        count = getattr(part, "num_hidden_layers", None)
        if part is not None and isinstance(count, int) and count > blocks:
            cut = True
            for key, value in vars(part).items():
                if isinstance(value, list) and len(value) == count and (count > SHORT or "layer" in key):
                    setattr(part, key, value[:blocks])
            part.num_hidden_layers = blocks
    if not cut:
        return None
    try:
        small = model_on_meta(few, trust_remote_code=trust_remote_code)
        take_experts_apart(small)
    except DetentError:  # a configuration in which other fields depend on the number of blocks
        return None
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    mine = {name: p.shape for name, p in small.state_dict().items()}
    return few if mine.items() <= shapes.items() and len(mine) < len(shapes) else None


def _alike(model: nn.Module) -> bool:
    """Whether the first two members of each long list of modules have parameters of the same names and shapes."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 2]
    shapes = [[{name: p.shape for name, p in block.named_parameters()} for block in blocks[:2]] for blocks in lists]
    return all(first == second for first, second in shapes)


def compare_few_blocks(
    out: Written, source: Source, plan: Plan, quantized: Quantized, config: Any, *, dtype: torch.dtype, **options: Any
) -> tuple[int | None, float]:
    """Load the first blocks of a written folder as its user would, and hold their logits against those of the same
    blocks as they were quantized.

    Args:
        out: with everything in it.
        source, plan, quantized: what it was made of.
        config: the configuration of the model; it is cut to few blocks where that is possible.
        dtype: to hold both in.
        options: as for `load_model`.

    Returns:
        How many blocks, None for all, and how far the logits differ, relative to their length.

    Raises:
        DetentError: the logits differ, or the folder can't be loaded.
    """
    few = with_few_blocks(config, plan.skeleton, trust_remote_code=options["trust_remote_code"])
    known: dict[str, tuple[QTensor, Tensor]] = {}

    def decoded(name: str, codes: QTensor, to: torch.dtype) -> Tensor:
        """Codes that are the same, bit for bit, are decoded once: most of the time goes into that. Of a large block
        nothing is kept, since memory counts there."""
        if name in known and known[name][0] == codes:
            return known[name][1]
        value = decode(codes, to)
        if sum(kept.nbytes for _, kept in known.values()) + value.nbytes <= KEPT_BYTES:
            known[name] = codes, value
        return value

    module_of = {plan.names.layer(name) or name: name for name in plan.formats.layers}
    stored = Stored(
        source,
        in_file(quantized.formats, plan.names),
        list(out.kept),
        lambda name: replace(quantized.layer(module_of[name], measured=False).record, name=name),
        lambda name: kept_tensor(name, out.kept[name], source, out.layout),
        decoded,
    )
    kv = {plan.names.container(module): pair for module, pair in quantized.kv.items()}
    model = simulated_model(stored, few or config, lambda: kv, cut=few is not None, dtype=dtype, **options)
    expected = probe_logits(model)
    model.to("meta")  # never two models in memory, and this one has cycles that would keep it
    # The folder's own configuration, cut like the source's: what a user's model will be made of.
    its_own = load_config(out.folder, trust_remote_code=options["trust_remote_code"])
    cut = (
        None if few is None else with_few_blocks(its_own, plan.skeleton, trust_remote_code=options["trust_remote_code"])
    )
    found = load_quantized(out.folder, dtype=dtype, config=cut, decoded=decoded, **options)
    difference = check_logits(expected, probe_logits(found))
    return None if few is None else (getattr(few, "text_config", None) or few).num_hidden_layers, difference
