"""What a search found, as plain JSON: the scores and costs of every option, and what follows from them.

Solving again for other constraints needs nothing else. The keys of a search state:

- ``method``: how scores were measured. ``steps``: on how many batches.
- ``candidate_stats``: for each unit ``NAME.quant_recipe`` its ``module_names``, and for each of its ``formats`` the
  ``scores``, the ``costs`` (bits of all its weights, scales included) and, by module, ``bits`` and the ``settings`` of
  quantizers; ``elements`` are numbers of weights, ``routed`` the share of tokens that a router sends to a module.
- ``other_bytes``: what the rest of the model takes.
- ``best``: the ``recipe`` {unit: format}, its ``constraints`` as reached, its ``score``, and ``gap``: no other choice
  has a score lower by more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from detent.config.attributes import Attributes, SequentialConfig
from detent.config.base import ConfigField, ConfigModel, as_keywords, shown, size_in_bytes
from detent.config.quantize_config import PresetConfig
from detent.errors import DetentError
from detent.notices import notify
from detent.search.candidates import Candidate
from detent.search.options import matched
from detent.search.problem import Limit, Solution, solve
from detent.search.scores import Scores
from detent.search.units import Unit

#: Bits of a weight where no constraint is given.
DEFAULT_BITS = 4.8
SUFFIX = ".quant_recipe"


def state_of(
    units: Sequence[Unit],
    candidates: Mapping[str, Candidate],
    scores: Scores,
    shares: Mapping[str, float],
    *,
    method: str,
    steps: int,
    other_bytes: int,
) -> dict[str, Any]:
    """A search state, without what is best.

    Args:
        units, candidates: what is chosen from.
        scores: {unit: {option: score}}; what isn't there is 0.
        shares: of tokens, by layer, for routed experts.
        method, steps, other_bytes: see above.
    """
    stats = {}
    for unit in units:
        found = [candidates[name] for name in unit.modules]
        bits = [[candidate.bits[option] for candidate in found] for option in unit.options]
        stats[unit.name + SUFFIX] = {
            "module_names": list(unit.modules),
            "formats": list(unit.options),
            "scores": [scores.get(unit.name, {}).get(option, 0.0) for option in unit.options],
            "costs": [sum(one) for one in bits],
            "bits": bits,
            "elements": [candidate.count for candidate in found],
            "routed": [shares.get(name) for name in unit.modules],
            "settings": [
                {c.name: {leaf: _plain(a) for leaf, a in c.settings.get(option, {}).items()} for c in found}
                for option in unit.options
            ],
        }
    return {"method": method, "steps": steps, "candidate_stats": stats, "other_bytes": other_bytes, "algorithms": {}}


def _plain(attributes: Attributes) -> Any:
    """Attributes as JSON, never empty."""
    if isinstance(attributes, SequentialConfig):
        return [_plain(one) for one in attributes]
    return attributes.to_dict() or {"num_bits": attributes.num_bits}


# ---- constraints ----------------------------------------------------------------------------------------------------


class CostDetails(ConfigModel):
    """How `effective_bits` counts.

    Attributes:
        active_moe_expert_ratio: the share of tokens that reaches a routed expert; None: by the model's configuration.
        excluded_module_name_patterns: wildcards on modules that don't count.
    """

    active_moe_expert_ratio: float | None = ConfigField(None, gt=0, le=1)
    excluded_module_name_patterns: list[str] = ConfigField([])


class LayerCost(ConfigModel):
    """A budget of the user's own.

    Attributes:
        limit: the most that all layers together may cost.
        cost: a function of (module, format, elements), or ``{wildcard: {format: cost}}``.
    """

    limit: float = ConfigField(gt=0, allow_inf_nan=False)
    cost: Any = ConfigField()


class Constraints(ConfigModel):
    """Budgets; see `detent.auto_quantize`. Raises DetentError as every configuration does."""

    effective_bits: float | None = ConfigField(None, gt=0, allow_inf_nan=False)
    bytes: int | str | None = ConfigField(None)
    layer_cost: LayerCost | None = ConfigField(None)
    cost_model: Literal["weight", "active_moe"] = ConfigField("weight")
    cost: CostDetails = ConfigField(CostDetails())

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> Constraints:
        """Those of a dictionary; without a budget in it, `DEFAULT_BITS`."""
        if given is not None and not isinstance(given, Mapping):
            raise DetentError(f"constraints: a dictionary such as {{'effective_bits': 4.8}}, not {shown(given)}")
        constraints = Constraints(**as_keywords(given or {}))
        if all(getattr(constraints, name) is None for name in ("effective_bits", "bytes", "layer_cost")):
            return Constraints(**{**constraints, "effective_bits": DEFAULT_BITS})
        return constraints


def limits_of(state: Mapping[str, Any], constraints: Mapping[str, Any] | None) -> list[Limit]:
    """The budgets that `constraints` sets for the units of a state.

    Raises:
        DetentError: unknown keys, values that aren't positive, a table that lacks a cost.
    """
    given, units, limits = Constraints.of(constraints), _units(state), []
    if given.effective_bits is not None:
        limits.append(_bits_limit(state, given, given.effective_bits))
    if given.bytes is not None:
        size = size_in_bytes(given.bytes) if isinstance(given.bytes, str) else given.bytes
        if size is None or size <= 0:
            raise DetentError(f"constraints: bytes is a number, or a size such as '4GiB', not {shown(given.bytes)}")
        costs = [[sum(bits) / 8 for bits in unit["bits"]] for unit in units]
        limits.append(Limit("bytes", size, costs, state["other_bytes"], text="{:,.0f}"))
    if given.layer_cost is not None:
        table = given.layer_cost.cost
        costs = [
            [
                math.fsum(_cost_of(table, name, option, count) for name, count in _members(unit))
                for option in unit["formats"]
            ]
            for unit in units
        ]
        limits.append(Limit("layer_cost", given.layer_cost.limit, costs))
    return limits


def _units(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(state["candidate_stats"].values())


def _members(unit: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(zip(unit["module_names"], unit["elements"], strict=True))


def _bits_limit(state: Mapping[str, Any], given: Constraints, bits: float) -> Limit:
    """The mean bits of a weight, of those that count by the cost model."""
    ratio, excluded = given.cost.active_moe_expert_ratio, given.cost.excluded_module_name_patterns
    model = given.cost_model
    weights, total = [], 0.0
    for unit in _units(state):
        shares = [1.0 if share is None or model == "weight" else ratio or share for share in unit["routed"]]
        shares = [0.0 if matched(n, excluded) else s for n, s in zip(unit["module_names"], shares, strict=True)]
        weights.append(shares)
        total += math.fsum(s * count for s, count in zip(shares, unit["elements"], strict=True))
    if model == "active_moe" and not any(share is not None for unit in _units(state) for share in unit["routed"]):
        raise DetentError("constraints: cost_model active_moe counts routed experts, and none were found; use weight")
    if not total:
        raise DetentError("constraints: excluded_module_name_patterns leaves no layer to count")
    costs = [
        [math.fsum(s * b for s, b in zip(shares, bits, strict=True)) for bits in unit["bits"]]
        for unit, shares in zip(_units(state), weights, strict=True)
    ]
    # A number of bits that was reported is reachable again, whatever its last digit was rounded to.
    return Limit("effective_bits", bits * total * (1 + 1e-12), costs, per=total, text="{:.4g}")


def _cost_of(table: Any, module: str, option: str, elements: int) -> float:
    """What the user says that a layer costs under an option: a function, or {wildcard: {option: cost}}."""
    cost: Any = None
    if callable(table):
        cost = table(module, option, elements)
    elif isinstance(table, Mapping):
        rows = [row for pattern, row in table.items() if matched(module, [pattern]) and isinstance(row, Mapping)]
        cost = next((row[option] for row in reversed(rows) if option in row), None)
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
        raise DetentError(
            f"constraints: layer_cost has no cost of {option} for {module} (found {shown(cost)}); give a function of"
            " (module, format, elements), or {wildcard: {format: cost}} with all formats, 'none' included"
        )
    return float(cost)


# ---- solutions ------------------------------------------------------------------------------------------------------


def solve_state(state: Mapping[str, Any], constraints: Mapping[str, Any] | None) -> dict[str, Any]:
    """The best choice under constraints: what a state has as ``best``. Raises DetentError as `solve` does."""
    limits = limits_of(state, constraints)
    return _described(state, solve([unit["scores"] for unit in _units(state)], limits), limits)


def _described(state: Mapping[str, Any], solution: Solution, limits: Sequence[Limit]) -> dict[str, Any]:
    units, picks = _units(state), solution.picks
    spent = [sum(unit["bits"][pick]) for unit, pick in zip(units, picks, strict=True)]
    elements = sum(sum(unit["elements"]) for unit in units)
    reached: dict[str, float] = {
        "effective_bits": sum(spent) / elements,
        "bytes": state["other_bytes"] + sum(spent) / 8,
    }
    reached |= {limit.name: limit.spent(picks) / limit.per for limit in limits}
    recipe = {
        name: unit["formats"][pick] for (name, unit), pick in zip(state["candidate_stats"].items(), picks, strict=True)
    }
    return {
        "recipe": recipe,
        "constraints": reached,
        "score": solution.score,
        "gap": solution.gap,
        "is_satisfied": True,
    }


def get_auto_quantize_config(
    search_state: Mapping[str, Any], constraints: Mapping[str, Any] | None = None, verbose: bool = False
) -> PresetConfig:
    """The configuration that a search found, or finds for other constraints without scoring again.

    Args:
        search_state: from `auto_quantize`, or its checkpoint.
        constraints: as for `auto_quantize`; None for those of the search.
        verbose: without effect: `auto_quantize_table` gives the choice as data.

    Returns:
        A configuration with an entry for each quantizer. Its algorithm is that of the chosen formats where they all
        have the same, else ``"max"``, which a notice tells.

    Raises:
        DetentError: the constraints can't be met; the message says the least that is reachable.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model, state = detent.auto_quantize(
        ...     model, {"effective_bits": 8}, ["INT8_DEFAULT_CFG", "w_int4_per_group_g32_sym"], [torch.randn(8, 32)],
        ...     loss_func=lambda output, data: output.square().mean(),
        ... )
        >>> config = detent.get_auto_quantize_config(state, {"effective_bits": 6})
        >>> config["algorithm"], len(config["quant_cfg"]) > 1
        ('max', True)
    """
    best = search_state["best"] if constraints is None else solve_state(search_state, constraints)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithms: list[Any] = []
    for name, unit in search_state["candidate_stats"].items():
        pick = unit["formats"].index(best["recipe"][name])
        for module, settings in unit["settings"][pick].items():
            entries += [{"quantizer_name": joined(module, leaf), "cfg": cfg} for leaf, cfg in settings.items()]
        algorithm = search_state["algorithms"].get(unit["formats"][pick])
        if algorithm and algorithm not in algorithms:
            algorithms.append(algorithm)
    same = algorithms[0] if len(algorithms) == 1 else "max"
    if len(algorithms) > 1:
        notify("the chosen formats have different algorithms, and a configuration has one: it is max")
    return PresetConfig(quant_cfg=entries, algorithm="max" if same == [{"method": "max"}] else same)


def joined(module: str, quantizer: str) -> str:
    """The full name of a quantizer."""
    return f"{module}.{quantizer}" if module else quantizer


# ---- to look at -----------------------------------------------------------------------------------------------------


def auto_quantize_table(
    search_state: Mapping[str, Any], constraints: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """What was chosen, a row for each unit: its ``layers``, ``format``, ``bits`` of a weight and ``score``.

    Args:
        search_state: from `auto_quantize`, or its checkpoint.
        constraints: others than those of the search.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model, state = detent.auto_quantize(
        ...     model, {"effective_bits": 8}, ["INT8_WEIGHT_ONLY_CFG"], [torch.randn(8, 32)],
        ...     loss_func=lambda output, data: output.square().mean(), disabled_layers="2",
        ... )
        Traceback (most recent call last):
        ...
        detent.errors.DetentError: effective_bits can't be 8: the least that the formats reach is 11.56; ...
        >>> model, state = detent.auto_quantize(
        ...     model, {"effective_bits": 12}, ["INT8_WEIGHT_ONLY_CFG"], [torch.randn(8, 32)],
        ...     loss_func=lambda output, data: output.square().mean(), disabled_layers="2",
        ... )
        >>> [(row["layers"], row["format"]) for row in detent.auto_quantize_table(state)]
        [(['0'], 'INT8_WEIGHT_ONLY_CFG'), (['2'], 'none')]
    """
    best = search_state["best"] if constraints is None else solve_state(search_state, constraints)
    rows = []
    for name, unit in search_state["candidate_stats"].items():
        pick = unit["formats"].index(best["recipe"][name])
        bits = sum(unit["bits"][pick]) / sum(unit["elements"])
        rows.append(
            {
                "layers": unit["module_names"],
                "format": unit["formats"][pick],
                "bits": bits,
                "score": unit["scores"][pick],
            }
        )
    return rows


def auto_quantize_curve(search_state: Mapping[str, Any], points: int = 33) -> list[dict[str, Any]]:
    """The trade-off: the best choices from the fewest bits to those of least score, as ``best`` describes one.

    Args:
        search_state: from `auto_quantize`, or its checkpoint.
        points: how many targets are solved for; choices that are the same appear once.

    Example:
        >>> import torch, detent
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> model, state = detent.auto_quantize(
        ...     model, {"effective_bits": 8}, [4, "INT8_DEFAULT_CFG"], [torch.randn(8, 32)],
        ...     loss_func=lambda output, data: output.square().mean(),
        ... )
        >>> curve = detent.auto_quantize_curve(state)
        >>> all(a["score"] >= b["score"] for a, b in zip(curve, curve[1:]))
        True
    """
    (bits,) = limits_of(search_state, {"effective_bits": 1.0})
    free = solve([unit["scores"] for unit in _units(search_state)], [])
    low, high = bits.least / bits.per, bits.spent(free.picks) / bits.per
    targets = [low + (high - low) * step / max(1, points - 1) for step in range(points)]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for target in targets:
        best = solve_state(search_state, {"effective_bits": target})
        found.setdefault(tuple(best["recipe"].values()), best)
    return list(found.values())


def plot_auto_quantize_curve(search_state: Mapping[str, Any], path: str | Path, points: int = 33) -> Path:
    """Draw `auto_quantize_curve` into a file (PNG, SVG or PDF by its name), with matplotlib.

    Raises:
        DetentError: matplotlib isn't installed, or the file can't be written.

    Example:
        >>> import detent
        >>> detent.plot_auto_quantize_curve({}, "curve.txt")
        Traceback (most recent call last):
        ...
        detent.errors.DetentError: curve.txt: a plot is a .png, .svg or .pdf file
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise DetentError(f"{path}: a plot is a .png, .svg or .pdf file")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DetentError("plot_auto_quantize_curve needs matplotlib; auto_quantize_curve gives the data") from None
    curve = auto_quantize_curve(search_state, points)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["constraints"]["effective_bits"] for one in curve], [one["score"] for one in curve], marker="o")
    best = search_state["best"]
    axes.plot([best["constraints"]["effective_bits"]], [best["score"]], "s", color="tab:red", label="chosen")
    axes.set(
        xlabel="bits per weight, scales included", ylabel=f"estimated loss ({search_state['method']})", yscale="symlog"
    )
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise DetentError(f"{path}: the plot can't be written ({error})") from None
    return path
