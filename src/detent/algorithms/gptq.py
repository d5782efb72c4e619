"""`gptq`: round one input column after the other, and let the columns that are still free make up for the error.

Objective: ``tr((W - W^) G (W - W^)^T)``, G the second moment of the layer's inputs (GPTQ, arXiv 2210.17323; its H is
2G/n). Scales are fixed beforehand and belong to the columns' own places, so columns may be taken in any order ("static
groups"): here by falling diagonal of G, and no index has to be stored. A channel that never carries a value (zero
diagonal) costs nothing, so its weights are rounded to nearest.

In that order ``G + damping = U D U^T`` with U unit upper triangular and D diagonal, so that the objective of a row's
error d = w - w^ is ``sum_k D_k (d_k + sum_{l<k} U_lk d_l)^2``: column k is rounded to what is nearest to
``w_k + sum_{l<k} U_lk d_l``. That is GPTQ's result without inverting G (it is Babai's nearest plane, arXiv 2507.18553),
and the sum is the objective that was reached. What earlier columns add to later ones is added in halves: those
of the first half of the columns to the second in one matrix product, and so on within either half.

If the result has a larger objective than round-to-nearest (RTN) under the same scales, row by row, that row keeps RTN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detent.algorithms.layer import Layer
from detent.algorithms.objective import (
    Units,
    check_elementwise,
    energy_of,
    nearest_values,
    output_error,
    rounded_to_nearest,
    rows_error,
    units_of,
)
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, LayerFacts, codes_together, register
from detent.algorithms.retarget import retarget
from detent.algorithms.scale_search import searched_scales
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork, Stage
from detent.config.algorithm import GPTQCalibConfig
from detent.errors import DetentError
from detent.formats import Format, Scales

#: Damping, as a share of G's mean diagonal, from which on a second moment counts as unusable.
_MOST_DAMPING = 1.0
#: Columns that are rounded one by one before their errors are carried to the next ones.
_FEW = 16
#: Rows whose objective is nearer to that of round-to-nearest than this share of it are compared in exact
#: products.
_CLOSE = 0.02
#: Elements rounded together: about six copies of them are in memory.
_MOST_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class RoundedWeight:
    """A weight on its grid.

    Attributes:
        weight: float32 [out, in], every value that of a code: encoding it under the same scales is exact.
        before, after: the objective of round-to-nearest, and of `weight`.
        energy: the objective of a weight of zeros, estimated from some rows where there are many.
        kept_rows: rows that keep round-to-nearest, since the algorithm would have made them worse.
    """

    weight: Tensor
    before: float
    after: float
    energy: float
    kept_rows: int


@dataclass(frozen=True)
class Factor:
    """A second moment made ready for rounding any number of weights; see `factorise`.

    Attributes:
        moment: G, float32 [in, in].
        order: [in], the columns in the order in which they are rounded.
        cost: D, float64 [in]; 0 for dead channels.
        carry: U^T, float32 [in, in]: row k says what the errors of the columns before it add to column k.
        damping: the share of the mean diagonal that was added to G's diagonal.
        added: what was added.
        dead: bool [in], in the columns' own places: channels without a value.
    """

    moment: Tensor
    order: Tensor
    cost: Tensor
    carry: Tensor
    damping: float
    added: float
    dead: Tensor


def factorise(moment: Tensor, *, damping: float = 0.01, act_order: bool = True) -> Factor:
    """Take G apart.

    Args:
        moment: G, float32 [in, in], symmetric and positive semi-definite.
        damping: share of the mean diagonal added to G's diagonal; raised tenfold until G can be factorised.
        act_order: take columns by falling diagonal of G.

    Raises:
        DetentError: G isn't positive definite under any damping.
    """
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(moment), device=moment.device)
    # U D U^T is the Cholesky factorisation with rows and columns counted from the end.
    backwards = order.flip(0)
    g = moment.index_select(0, backwards).index_select(1, backwards)
    if bool(dead.any()):
        g.masked_fill_(dead[backwards][:, None] | dead[backwards], 0.0)
    mean = float(g.diagonal().sum(dtype=torch.float64) / max(1, int((~dead).sum())))
    g.diagonal().add_(dead[backwards].to(g.dtype) * (mean or 1.0))
    share = damping
    while share < max(_MOST_DAMPING, 2 * damping):
        # float32 is enough for the usual damping: it perturbs G by far less than what is added.
        for precise in (False, True):
            damped = g.double() if precise else g.clone()
            damped.diagonal().add_(share * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            roots = lower.diagonal()
            if not int(failed) and bool(torch.isfinite(roots).all()) and bool((roots > 0).all()):
                cost = torch.where(dead[order], 0.0, roots.flip(0).double().square())
                carry = (lower / roots).T.flip(0, 1).float().contiguous()
                return Factor(moment, order, cost, carry, share, share * mean, dead)
        share = max(share * 10, 1e-4)
    raise DetentError("gptq: the second moment isn't positive definite under any damping; check the calibration data")


@dataclass(frozen=True)
class Job:
    """A weight to round.

    Attributes:
        weight: float [out, in].
        format: one whose codes are chosen one by one (not MX4/6/9, not progressive).
        scales: to round under, in the shape of the format's grid.
        target: float [out, in], what to come near instead of `weight` (see `retarget`); the objective is then
            ``tr((T - W^) G (T - W^)^T)``. Round-to-nearest stays that of `weight`.
    """

    weight: Tensor
    format: Format
    scales: Scales
    target: Tensor | None = None

    @property
    def goal(self) -> Tensor:
        """float32 [out, in], what to come near."""
        return (self.weight if self.target is None else self.target).detach().to(torch.float32)


def gptq(jobs: Sequence[Job], factor: Factor) -> list[RoundedWeight]:
    """Round weights that multiply the same inputs so that the layers' outputs change least.

    Args:
        jobs: the weights; those of one format are rounded together.
        factor: of the second moment of their inputs.

    Raises:
        DetentError: shapes don't fit, or a format can't be served.
    """
    width = len(factor.order)
    for job in jobs:
        check_elementwise(job.format, "gptq")
        if job.weight.shape[1] != width:
            shape = f"{job.weight.shape[0]} x {job.weight.shape[1]}"
            raise DetentError(f"gptq: a weight of {shape} needs a second moment of {job.weight.shape[1]} squared")
    results: dict[int, RoundedWeight] = {}
    for fmt in {job.format for job in jobs}:
        chosen = [i for i, job in enumerate(jobs) if job.format == fmt]
        rounded = _round_alike([jobs[i] for i in chosen], factor)
        results |= dict(zip(chosen, rounded, strict=True))
    return [results[i] for i in range(len(jobs))]


def _round_alike(jobs: Sequence[Job], factor: Factor) -> list[RoundedWeight]:
    fmt, order = jobs[0].format, factor.order
    weight = torch.cat([job.weight.detach().to(torch.float32) for job in jobs])
    target = weight if all(job.target is None for job in jobs) else torch.cat([job.goal for job in jobs])
    sizes = [len(job.weight) for job in jobs]
    plain = torch.cat(
        [rounded_to_nearest(part, fmt, job.scales) for part, job in zip(weight.split(sizes), jobs, strict=True)]
    )
    units = Units.stacked([units_of(fmt, job.scales, (len(job.weight), len(order))) for job in jobs])
    units = replace(units, at=units.at[order.cpu()])
    result, after = torch.empty_like(target), torch.empty(len(target), dtype=torch.float64, device=target.device)
    step, back = max(1, _MOST_ELEMENTS // len(order)), torch.argsort(order)
    for rows in (slice(start, start + step) for start in range(0, len(target), step)):
        columns = _Columns(target[rows].T.contiguous()[order], factor.carry, fmt, units.some(rows))
        columns.round(0, len(order))
        after[rows] = columns.objective(factor)
        result[rows] = columns.values[back].T
    if bool(factor.dead.any()):
        result[:, factor.dead] = plain[:, factor.dead]

    before = rows_error(target - plain, factor.moment)
    close = (after - before).abs() <= _CLOSE * before
    if bool(close.any()):
        before[close] = rows_error((target - plain)[close], factor.moment, exact=True)
        after[close] = rows_error((target - result)[close], factor.moment, exact=True)
    worse = ~(after <= before)
    result[worse] = plain[worse]
    energy = [energy_of(part, lambda d: float(output_error(d, factor.moment))) for part in target.split(sizes)]
    return [
        RoundedWeight(rows, float(was.sum()), float(torch.minimum(was, now).sum()), whole, int(kept.sum()))
        for whole, rows, was, now, kept in zip(
            energy, *(tensor.split(sizes) for tensor in (result, before, after, worse)), strict=True
        )
    ]


class _Columns:
    """The columns of a weight while they are rounded, transposed to [in, out] so that each is contiguous.

    Attributes:
        work: what each column is rounded to, as far as it is known.
        values: what it was rounded to. error: the target less that.
    """

    def __init__(self, target: Tensor, carry: Tensor, fmt: Format, units: Units) -> None:
        self.target, self.work = target, target.clone()
        self.values, self.error = torch.empty_like(target), torch.empty_like(target)
        self._carry, self._fmt, self._units = carry, fmt, units

    def round(self, start: int, stop: int) -> None:
        """Round columns from `start` to before `stop`; errors from before `start` are in their `work` already."""
        carry, error, work = self._carry, self.error, self.work
        if stop - start > _FEW:
            middle = start + (stop - start + 1) // 2
            self.round(start, middle)
            work[middle:stop].addmm_(carry[middle:stop, start:middle], error[start:middle])
            self.round(middle, stop)
            return
        for k in range(start, stop):
            if k > start:
                work[k].addmv_(error[start:k].T, carry[k, start:k])
            value = nearest_values(work[k], self._fmt, *self._units.of(k))
            self.values[k] = value
            torch.sub(self.target[k], value, out=error[k])

    def objective(self, factor: Factor) -> Tensor:
        """The objective of each row once all columns are rounded, float64 [out]. Ends the use of `work`."""
        cost = factor.cost.float() @ self.work.sub_(self.values).square_()
        added = factor.added * ((~factor.dead[factor.order]).float() @ self.error.square())
        return (cost.double() - added).clamp_min(0.0)


# ---- at a site ------------------------------------------------------------------------------------------------------


@register(GPTQCalibConfig)
class GPTQHandler(Handler[GPTQCalibConfig]):
    """Scales of least error, unless an algorithm before chose some; then rounding column by column."""

    def wants(self, step: GPTQCalibConfig) -> Wanted:
        return Wanted(second_moment=True, cross_moment=step.retarget, references=step.retarget)

    def refusal(self, step: GPTQCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer)

    def needs_blocks(self, step: GPTQCalibConfig) -> bool:
        return step.retarget

    def sees_quantized(self, step: GPTQCalibConfig, layers: Iterable[LayerFacts]) -> bool:
        """Not with 4 bits or more under float activations: there it changes perplexity by less than the noise of the
        calibration text, and costs a second forward pass."""
        coarse = any(f.input is not None or (f.weight is not None and f.weight.element.bits < 4) for f in layers)
        return coarse or step.retarget or step.sequential

    def one_by_one(self, step: GPTQCalibConfig) -> bool:
        return step.sequential

    def solve(self, step: GPTQCalibConfig, site: SiteWork) -> None:
        if not site.layers:
            return
        jobs = [_job(site, layer, step) for layer in site.layers]
        try:
            factor = factorise(site.statistics.moment(), damping=step.perc_damp, act_order=step.act_order)
            results = gptq(jobs, factor)
        except DetentError as error:
            raise DetentError(f"{site.readers[0].name}: {error}") from None
        damped = factor.damping > step.perc_damp
        for layer, job, result in zip(site.layers, jobs, results, strict=True):
            site.ledger.adopt(layer, result.weight, job.scales, latent=job.goal)
            notices = [f"needed damping {factor.damping:g}, not {step.perc_damp:g}"] if damped else []
            if result.kept_rows:
                notices.append(f"{result.kept_rows} of {len(result.weight)} rows keep round-to-nearest")
            outcome = Outcome(
                "gptq",
                "tr(D G D^T)" + (" against the float model's outputs" if job.target is not None else ""),
                result.before,
                result.after,
                result.energy,
                {"damping": factor.damping, "act_order": step.act_order},
                "; ".join(notices),
                noteworthy=damped,
            )
            site.note(layer, outcome)


def _job(site: SiteWork, layer: Layer, step: GPTQCalibConfig) -> Job:
    """What a layer is rounded to, and under which scales."""
    weight, statistics, target = layer.matrix(), site.statistics, None
    if step.retarget and statistics.cross_moment is not None:
        target = retarget(weight, statistics.moment(), statistics.cross_moment, damping=step.retarget_damping)
    stage = site.state(layer).stage
    if step.scale_search and stage < Stage.SEARCHED:
        scales = searched_scales(site, layer, step.search_steps, signed=step.signed_scales, target=target)
        return Job(weight, layer.format, scales, target)
    if stage is Stage.FRESH:
        site.set_range_of(layer, None)
    return Job(weight, layer.format, layer.scales(), target)
