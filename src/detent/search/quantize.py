"""`auto_quantize`: the best format for each layer of a model in memory, under a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.config.base import nearest, shown
from detent.errors import DetentError
from detent.external.files import user_path
from detent.model.conversion import replace_quant_module
from detent.model.rollback import unchanged_on_failure
from detent.model.scopes import evaluating, without_cache
from detent.nn import quantizers_of
from detent.search.choices import Choices
from detent.search.data import SearchData
from detent.search.outcome import auto_quantize_table
from detent.search.search import METHODS, Search
from detent.structure import Structure

_log = logging.getLogger(__name__)


def auto_quantize(
    model: nn.Module,
    constraints: Mapping[str, Any] | None = None,
    quantization_formats: Sequence[Any] | None = None,
    data_loader: Iterable[Any] | None = None,
    forward_step: Callable[[nn.Module, Any], Any] | None = None,
    loss_func: Callable[[Any, Any], Tensor] | None = None,
    forward_backward_step: Callable[[nn.Module, Any], Any] | None = None,
    disabled_layers: str | Sequence[str] | None = None,
    num_calib_steps: int = 512,
    num_score_steps: int = 128,
    verbose: bool = False,
    method: str = "gradient",
    checkpoint: str | Path | None = None,
    module_search_spaces: Sequence[Mapping[str, Any]] | None = None,
    fixed_quantization_config: Any = None,
    *,
    structure: Structure | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Give each layer the format, of several, with which the model loses least under a budget, and calibrate it.

    Layers that engines run as one (query, key and value; gate and up; the experts of a mixture) share a choice. Staying
    in floating point is always a choice too, unless a search space says otherwise. The choice is optimal for the
    measured scores: solved by HiGHS, with a bound on the gap.

    Args:
        model: any model; it is changed in place.
        constraints: budgets, all of which hold. ``effective_bits``: mean bits of a weight of the layers that may be
            quantized, scales included (the default: 4.8). ``bytes``: of all parameters, a number or ``"4GiB"``.
            ``layer_cost``: ``{"limit": number, "cost": table}`` with costs of your own, such as latencies: a function
            of (module, format, elements), or ``{wildcard: {format: cost}}``. With ``"cost_model": "active_moe"``,
            weights of routed experts count for ``effective_bits`` by the share of tokens they see; ``"cost"`` has its
            ``active_moe_expert_ratio`` and ``excluded_module_name_patterns``.
        quantization_formats: configurations, names of presets or schemes, `Format`s of weights, widths of integers.
            The patterns of a configuration hold: what it excludes stays in floating point under it. Default:
            NVFP4_AWQ_LITE_CFG and FP8_DEFAULT_CFG.
        data_loader: batches. An iterator that can be gone through once is kept in memory.
        forward_step: calls the model it is given with a batch and returns the output; by default ``model(**batch)``
            for dictionaries, else ``model(batch)``.
        loss_func: the loss of (output, batch). By default the output's ``loss``; where it has none, that of its logits
            against tokens drawn from the model's own predictions.
        forward_backward_step: in place of both: runs the model on a batch and calls ``backward`` on the loss.
        disabled_layers: wildcards on names of modules that stay in floating point.
        num_calib_steps, num_score_steps: the most batches for calibration, and for scores.
        verbose: log the choice.
        method: ``gradient``, ``kl_div`` or ``curvature``: see `detent.search.scores`.
        checkpoint: a JSON file for the scores: where it is there already, they are not measured again.
        module_search_spaces: for some modules other formats: dictionaries with ``module_name_patterns``,
            ``quantization_formats`` and ``allow_no_quant``. The first that matches holds.
        fixed_quantization_config: a configuration for all that no search space matches, in place of
            `quantization_formats`. It is in use while the others are scored, and counts in the budgets.
        structure: of the model, where it is known.

    Returns:
        The model, calibrated, and the search state: see `detent.search.outcome`.

    Raises:
        DetentError: an argument isn't valid; the budget can't be met (the message says the least that is reachable);
            there is no data, or it doesn't reach a layer; the loss doesn't depend on any layer. The model is then as
            it was.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model, state = detent.auto_quantize(
        ...     model,
        ...     constraints={"effective_bits": 6.5},
        ...     quantization_formats=["w_int4_per_group_g32_sym", detent.INT8_DEFAULT_CFG],
        ...     data_loader=[torch.randn(8, 32) for _ in range(4)],
        ...     forward_step=lambda model, batch: model(batch),
        ...     loss_func=lambda output, batch: output.square().mean(),
        ... )
        >>> state["best"]["constraints"]["effective_bits"] <= 6.5
        True
    """
    data = SearchData(data_loader, forward_step, loss_func, forward_backward_step, num_calib_steps, num_score_steps)
    if method not in METHODS:
        close = nearest(str(method), list(METHODS))
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DetentError(f"unknown method {shown(method)}{hint}; known: {', '.join(METHODS)}")
    choices = Choices.of(quantization_formats, module_search_spaces, fixed_quantization_config, disabled_layers)
    with unchanged_on_failure(model):
        flags = {name: module.training for name, module in model.named_modules()}
        replace_quant_module(model)
        with evaluating(model), torch.no_grad(), without_cache(model):
            search = Search(model, choices, structure, method, data)
            state = search.run(constraints, None if checkpoint is None else user_path(checkpoint))
        for name, training in flags.items():
            for _, quantizer in quantizers_of(model.get_submodule(name)):
                quantizer.train(training)
    if verbose:
        for row in auto_quantize_table(state):
            _log.info(
                "%s: %s, %.3f bits, score %.3g", ", ".join(row["layers"]), row["format"], row["bits"], row["score"]
            )
    return model, state
