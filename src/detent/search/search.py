"""A search at work: calibrate every option, score it, solve, and leave the model as chosen."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from detent.distributed import gathered
from detent.engine import calibration
from detent.engine.data_loop import DataLoop
from detent.engine.traversal import unreached
from detent.errors import DetentError
from detent.external.files import is_file, placed, read_as, unreadable
from detent.external.schemas import SavedSearch
from detent.model.conversion import named_quantizers, set_quantizer_by_cfg, settle
from detent.model.usage import quantizer_usage
from detent.notices import notify
from detent.progress import track
from detent.search import scores as measures
from detent.search.candidates import Switch, find_candidates
from detent.search.choices import Choices
from detent.search.data import SearchData
from detent.search.options import NONE, Option
from detent.search.outcome import solve_state, state_of
from detent.search.scores import Scores
from detent.search.units import Unit, grouped
from detent.structure import Structure, find_structure

METHODS = ("gradient", "kl_div", "curvature")
#: Seconds between two writings of the checkpoint.
_SAVE_EVERY = 20.0
#: Elements of a weight that its fingerprint is made of.
_PRINTED = 1024


class Search:
    """A search on a converted model in eval mode.

    Args:
        model: changed in place.
        choices: what its layers may become.
        structure: of the model; None: found here.
        method: of `METHODS`.
        data: what it runs on.

    Raises:
        DetentError: a pattern matches nothing.
    """

    def __init__(
        self, model: nn.Module, choices: Choices, structure: Structure | None, method: str, data: SearchData
    ) -> None:
        self.model, self._choices, self._method, self._data = model, choices, method, data
        self._structure = structure or _found(model, lambda m: data.forward(m, next(data.batches(1))))
        self._candidates = find_candidates(model, choices.options)
        choices.check(model, self._candidates)
        owners: dict[int, list[str]] = {}
        for name in self._candidates:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        groups = grouped(list(self._candidates), self._structure, owners.values())
        self.units = [choices.of_unit(group, self._candidates) for group in groups]
        self._switch = Switch(model, self._candidates)
        #: Units with something to choose; what has one option needs no score.
        self._open = [unit for unit in self.units if len(unit.options) > 1]

    def run(self, constraints: Mapping[str, Any] | None, checkpoint: Path | None) -> dict[str, Any]:
        """Do all of it; the search state. Raises DetentError as `auto_quantize` does."""
        solve_state(self._state({}, 0), constraints)  # a budget that can't be met is said before the work
        loop, signature = self._data.loop(), self._signature()
        saved = _saved(checkpoint, signature)
        scored = saved is not None and saved.finished
        if saved is not None:
            for name, bits in saved.bits.items():
                self._candidates[name].bits.update(bits)
        if not scored:
            for option in self._choices.options:
                self._calibrate(option, [unit for unit in self._open if option.name in unit.options], loop)
            self._fix(loop)
        scores, steps = self._scores(checkpoint, signature, saved)
        state = self._state(scores, steps)
        state["best"] = solve_state(state, constraints)
        chosen = dict(zip(self.units, state["best"]["recipe"].values(), strict=True))
        for option in self._choices.options:
            mine = [unit for unit, name in chosen.items() if name == option.name]
            self._calibrate(option, mine if scored else [unit for unit in mine if len(unit.options) == 1], loop)
        if scored:
            self._fix(loop)
        fixed = self._choices.fixed
        searched = {unit: name for unit, name in chosen.items() if fixed is None or name != fixed.name}
        self._switch.put({layer: name for unit, name in searched.items() for layer in unit.modules})
        settle(self.model)
        with quantizer_usage(self.model) as usage:
            loop.first(self.model)
        usage.check()
        return state

    def _calibrate(self, option: Option, units: Sequence[Unit], loop: DataLoop) -> None:
        if units and option.config is not None and option is not self._choices.fixed:
            self._switch.calibrate(option, [name for unit in units for name in unit.modules], loop, self._structure)

    def _fix(self, loop: DataLoop) -> None:
        """Put the fixed configuration in use, for all that isn't searched."""
        fixed = self._choices.fixed
        if fixed is None or fixed.config is None:
            return
        set_quantizer_by_cfg(self.model, fixed.config.quant_cfg)
        searched = {name for unit in self.units if unit.options != (fixed.name,) for name in unit.modules}
        for name, quantizer in named_quantizers(self.model):
            if name.rpartition(".")[0] in searched:
                quantizer.disable()
        settle(self.model)
        calibration.run(self.model, fixed.algorithm, loop, structure=self._structure)

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _scores(
        self, checkpoint: Path | None, signature: dict[str, str], saved: SavedSearch | None
    ) -> tuple[Scores, int]:
        """{unit: {option: score}}, and on how many batches; resumed from, and kept in, the checkpoint."""
        scores: Scores = {unit.name: {o: 0.0 for o in unit.options if o != NONE} for unit in self._open}
        steps, seen = 0, set[str]()
        if saved is not None:
            scores, steps, seen = saved.scores, saved.steps, set(saved.seen)
        if not self._open or (saved is not None and saved.finished):
            return scores, steps
        written = time.monotonic()

        def save(*, finished: bool) -> None:
            bits = {name: candidate.bits for name, candidate in self._candidates.items()}
            parts = {"signature": signature, "scores": scores, "bits": bits, "steps": steps, "seen": sorted(seen)}
            _write(checkpoint, {**parts, "finished": finished})

        measure = {"gradient": self._gradient, "kl_div": self._divergence, "curvature": self._curvature}[self._method]
        with measures.frozen(self.model), self._watched(seen), measure(scores) as score:
            for number, batch in enumerate(
                track(self._data.batches(self._data.score_steps), "Scoring", self._data.steps)
            ):
                if number < steps:
                    continue
                with measures.padding_of(batch):
                    score(batch, number)
                steps = number + 1
                if self._method != "curvature" and time.monotonic() - written > _SAVE_EVERY:
                    save(finished=False)
                    written = time.monotonic()
        if blind := [unit.name for unit in self._open if not seen & set(unit.modules)]:
            raise DetentError(unreached(blind, "layers"))
        if not any(value for options in scores.values() for value in options.values()):
            raise DetentError(
                "every score is zero: the loss doesn't change with the output of any layer; check forward_step and"
                " loss_func"
            )
        parts = gathered(scores)  # of all processes that share the data
        scores = {u: {o: sum(part[u][o] for part, _ in parts) for o in options} for u, options in scores.items()}
        save(finished=True)
        return scores, steps

    @contextmanager
    def _watched(self, seen: set[str]) -> Iterator[None]:
        """Within, the names of layers that are called go into `seen`."""
        modules = {name: self.model.get_submodule(name) for unit in self._open for name in unit.modules}
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name, module in modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _by_layer(self, scores: Scores) -> tuple[Scores, dict[str, nn.Module]]:
        """The scores of each layer's unit, and its module."""
        own = {name: scores[unit.name] for unit in self._open for name in unit.modules}
        return own, {name: self.model.get_submodule(name) for name in own}

    @contextmanager
    def _gradient(self, scores: Scores) -> Iterator[Callable[[Any, int], None]]:
        own, modules = self._by_layer(scores)
        with measures.gradients_at(modules, measures.GradientScores(own, modules, self._switch.switched)):
            yield partial(self._data.backward, self.model)

    @contextmanager
    def _divergence(self, scores: Scores) -> Iterator[Callable[[Any, int], None]]:
        members = {unit.name: unit.modules for unit in self._open}

        def score(batch: Any, number: int) -> None:
            run = lambda: measures.log_probabilities(self._data.forward(self.model, batch), batch)  # noqa: E731
            measures.divergence_scores(scores, members, run, self._switch.switched)

        yield score

    @contextmanager
    def _curvature(self, scores: Scores) -> Iterator[Callable[[Any, int], None]]:
        own, modules = self._by_layer(scores)
        curvature = {name: measures.Curvature(measures.layer_of(self.model, name)) for name in own}
        with measures.gradients_at(modules, lambda name, x, kwargs, g: curvature[name].see(x[0], g)):
            yield partial(self._data.backward, self.model)
        measures.curvature_scores(own, curvature, self._switch.switched)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _state(self, scores: Scores, steps: int) -> dict[str, Any]:
        """The search state, but for what is best."""
        shares = {} if self._structure is None else self._structure.routed_shares(getattr(self.model, "config", None))
        own_bytes = sum(candidate.count * candidate.float_bits // 8 for candidate in self._candidates.values())
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self.model.state_dict().values()}
        state = state_of(
            self.units,
            self._candidates,
            scores,
            shares,
            method=self._method,
            steps=steps,
            other_bytes=max(0, sum(tensors.values()) - own_bytes),
        )
        state["algorithms"] = {
            option.name: [step.model_dump(mode="json", exclude_unset=True) for step in option.algorithm]
            for option in self._choices.options
            if option.config is not None
        }
        return state

    def _signature(self) -> dict[str, str]:
        """What scores depend on, by what a user would call it."""
        state = self._state({}, 0)
        stats = state["candidate_stats"].values()
        prints = []
        for name in self._candidates:
            for tensor in self.model.get_submodule(name).parameters(recurse=False):
                some = tensor.detach().flatten()[:: max(1, tensor.numel() // _PRINTED)]
                prints.append(zlib.crc32(some.float().cpu().contiguous().numpy().tobytes()))
        return {
            "method": self._method,
            "layers": _digest([unit["module_names"] for unit in stats]),
            "formats": _digest([[unit["formats"], unit["settings"]] for unit in stats] + [state["algorithms"]]),
            "weights": _digest(prints),
            "numbers of steps": f"{self._data.calib_steps} and {self._data.score_steps}",
        }


def _found(model: nn.Module, run: Callable[[nn.Module], Any]) -> Structure | None:
    """The structure of a model; None, with a notice, where none can be found."""
    try:
        return find_structure(model)
    except DetentError:  # nothing says what it takes, so the user's own data has to
        pass
    try:
        return find_structure(model, run)
    except DetentError as error:
        notify(f"no structure was found, so layers that engines fuse may get different formats: {error}")
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def _saved(path: Path | None, signature: Mapping[str, str]) -> SavedSearch | None:
    """What a checkpoint has, if there is one. Raises DetentError: it is of another search."""
    if path is None or not is_file(path):
        return None
    saved = read_as(SavedSearch, path)
    other = [name for name, value in signature.items() if saved.signature.get(name) != value]
    if other:
        raise DetentError(
            f"{path} holds the scores of another search: its {' and '.join(other)} differ; name another checkpoint, or"
            " remove it"
        )
    return saved


def _write(path: Path | None, parts: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        placed(path, lambda fresh: fresh.write_text(json.dumps(parts), encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from None
