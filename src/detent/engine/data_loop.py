"""The user's `forward_loop`, run as often as data is needed, though the user's function runs once.

What the loop calls the model with is remembered and replayed. Where a loop calls only parts of the model, it is run
again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detent.algorithms.modes import ForwardLoop
from detent.data.batches import CalibrationBatches
from detent.distributed import rank, size
from detent.engine.calls import Call, PassOver
from detent.errors import DetentError
from detent.model.scopes import evaluating
from detent.padding import current_token_mask, token_mask
from detent.pretrained.facts import input_device
from detent.progress import track


class _FirstCallDone(BaseException):
    """Leaves the user's loop after its first call; not an `Exception`, so that the loop doesn't catch it."""


class DataLoop:
    """A source of calibration data: call it with the model.

    Attributes:
        forward_loop: the user's function, or None where there is no data (the object is then false).
        calls: how often the model was called in the last run.
        heard: called with each call of the user's function, before the model is.
    """

    def __init__(self, forward_loop: ForwardLoop | None) -> None:
        if forward_loop is not None and not callable(forward_loop):
            raise DetentError(
                "forward_loop: a function that calls the model it is given on calibration data, not a"
                f" {type(forward_loop).__name__}; for a data loader write: lambda model: [model(x) for x in loader]"
            )
        self.forward_loop = forward_loop
        self.calls = 0
        self.heard: Callable[[Call], None] = lambda call: None
        self._remembered: list[Call] = []
        #: How many tokens are before each batch, of all processes; [] where that isn't known.
        self._all_starts: list[int] = []

    @staticmethod
    def of(batches: CalibrationBatches, device: torch.device) -> DataLoop:
        """A loop over batches that has run already, as it were: its calls are known, without the model. Where several
        processes share the run, each has its share of the batches.

        Raises:
            DetentError: there are fewer batches than processes.
        """
        loop = DataLoop(lambda model: run_batches(model, batches))
        tokens = [int(batch["attention_mask"].sum()) for batch in batches]
        loop._all_starts = list(accumulate(tokens, initial=0))[:-1]
        loop._check_share()
        for batch in islice(batches, rank(), None, size()):
            arguments = {name: tensor.to(device) for name, tensor in batch.items()}
            loop._remembered.append(Call((), {**arguments, "use_cache": False}, batch["attention_mask"]))
        loop.calls = len(loop._remembered)
        return loop

    def __bool__(self) -> bool:
        return self.forward_loop is not None

    def __call__(self, model: nn.Module) -> None:
        """Run the model on all data.

        Raises:
            DetentError: there is no data.
        """
        if self.forward_loop is None:
            raise DetentError("there is no calibration data: pass a forward_loop")
        if self._remembered:
            for call in self._remembered:
                self.heard(call)
                with _mask_from_arguments(model), token_mask(call.mask), suppress(PassOver):
                    model(*call.args, **call.kwargs)
            return
        remembered: list[Call] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _check_ids(model, args, kwargs)
            remembered.append(Call(args, dict(kwargs), current_token_mask()))
            self.heard(remembered[-1])

        hook = model.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            with _mask_from_arguments(model):
                self._run(model)
        finally:
            hook.remove()
        self.calls = len(remembered)
        self._remembered = remembered

    def first(self, model: nn.Module) -> None:
        """Run the model, or the part of it that the loop calls, once: on the first of the data."""
        if self._remembered:
            call = self._remembered[0]
            model(*call.args, **call.kwargs)
            return
        depth = 0

        def enter(*_: Any) -> None:
            nonlocal depth
            depth += 1

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                raise _FirstCallDone

        hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
        hooks += [module.register_forward_hook(leave) for module in model.modules()]
        try:
            self._run(model)
        except _FirstCallDone:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, model: nn.Module) -> None:
        assert self.forward_loop is not None
        if _takes_an_argument(self.forward_loop):
            self.forward_loop(model)
        else:
            self.forward_loop()  # type: ignore[call-arg]

    def limited(self, model: nn.Module, rows: int | None) -> DataLoop:
        """The first calls of the same data that have `rows` vectors of input in total (tokens, where it is ids)."""
        if rows is None:
            return self
        part = DataLoop(self.forward_loop)
        part._all_starts = [start for start in self._all_starts if start < rows]
        kept, count = [], 0
        for call in self.calls_of(model):
            if count >= rows:
                break
            kept.append(call)
            count += call.rows
        if self._all_starts:
            part._check_share()
            kept = self._remembered[: len(part.starts)]
        if not kept:
            return self
        part._remembered, part.calls = kept, len(kept)
        return part

    @property
    def batches(self) -> int:
        """How many batches all processes have together; 0 where that isn't known."""
        return len(self._all_starts)

    @property
    def starts(self) -> list[int]:
        """How many tokens of the data are before each batch of this process; [] where that isn't known."""
        return self._all_starts[rank() :: size()]

    def _check_share(self) -> None:
        if self.batches < size():
            raise DetentError(
                f"{size()} processes share {self.batches} batches of calibration data, so that some have none: start"
                f" at most {self.batches} processes, or give at least {size()} batches: more samples, a smaller"
                " batch_size or a larger max_tokens"
            )

    def calls_of(self, model: nn.Module) -> list[Call]:
        """What the loop calls the model with; runs it, if it hasn't run yet."""
        if not self._remembered:
            self(model)
        return list(self._remembered)


def _check_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Token ids have to be ones that a language model knows.

    Raises:
        DetentError: they aren't.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    embed: Any = getattr(model, "get_input_embeddings", None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel() or not callable(embed):
        return
    try:
        table = embed()
    except NotImplementedError:  # a model of transformers without one, such as one for images
        return
    known = getattr(table, "num_embeddings", None)
    if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise DetentError(
            f"the calibration data holds token id {int(ids.max() if ids.max() >= known else ids.min())}, but the model"
            f" knows ids from 0 to {known - 1}; use the tokenizer that came with the model"
        )


def _takes_an_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C without a signature
        return True
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@contextmanager
def _mask_from_arguments(model: nn.Module) -> Iterator[None]:
    """Padding never enters statistics: where a call passes an `attention_mask` [batch, seq], its zeros are left out.

    The call may be of the model or of a part of it (``model.model(...)``): the mask of the outermost module that is
    given one holds for everything that it calls.
    """
    active: list[ExitStack] = []

    def watch(module: nn.Module, signature: inspect.Signature) -> list[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = _mask_argument(signature, args, kwargs) if current_token_mask() is None else None
            stack = ExitStack()
            if mask is not None:
                stack.enter_context(token_mask(mask))
            active.append(stack)

        def after(*_: Any) -> None:
            if active:  # empty where an earlier hook raised
                active.pop().close()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]

    hooks: list[RemovableHandle] = []
    for module in model.modules():
        signature = _signature(module)
        if module is model or "attention_mask" in signature.parameters:
            hooks += watch(module, signature)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while active:
            active.pop().close()


def _signature(module: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):  # a function of C without a signature
        return inspect.Signature()


def _mask_argument(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The `attention_mask` of a call: by keyword, by position, or inside a batch that is passed as a mapping."""
    mask = kwargs.get("attention_mask")
    if mask is None and "attention_mask" in signature.parameters:
        try:
            mask = signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        except TypeError:  # the call itself will fail, with a better message
            return None
    if mask is None and args and isinstance(args[0], Mapping):
        mask = args[0].get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        return None  # [tokens, tokens], added to attention's scores
    return mask


def run_batches(model: nn.Module, batches: CalibrationBatches, task: str = "Calibrating") -> None:
    """Run a model over all batches, for what its observers see; the outputs are thrown away.

    Gradients and dropout are off, no key/value cache is kept, and padding is masked for
    :func:`detent.padding.drop_padding`.
    """
    device = input_device(model)
    with torch.no_grad(), evaluating(model):
        for batch in track(batches, task, len(batches)):
            with token_mask(batch["attention_mask"]):
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
