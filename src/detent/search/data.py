"""The user's data and functions: what a search runs a model on, and the loss that it takes gradients of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from detent.config.base import shown
from detent.engine.data_loop import DataLoop
from detent.errors import DetentError
from detent.search.scores import own_loss


@dataclass
class SearchData:
    """The user's batches, and what is done with one.

    Attributes:
        loader: can be gone through any number of times.
        forward_step, loss_func, forward_backward_step: as for `auto_quantize`.
        calib_steps, score_steps: the most batches for each.

    Raises:
        DetentError: one isn't what it has to be, or there is no batch.
    """

    loader: Iterable[Any] | None
    forward_step: Callable[[nn.Module, Any], Any] | None
    loss_func: Callable[[Any, Any], Tensor] | None
    forward_backward_step: Callable[[nn.Module, Any], Any] | None
    calib_steps: int
    score_steps: int

    def __post_init__(self) -> None:
        for name in ("forward_step", "loss_func", "forward_backward_step"):
            if (given := getattr(self, name)) is not None and not callable(given):
                raise DetentError(f"{name}: a function, not {shown(given)}")
        for name in ("calib_steps", "score_steps"):
            if isinstance(given := getattr(self, name), bool) or not isinstance(given, int) or given < 1:
                raise DetentError(f"num_{name}: a positive whole number, not {shown(given)}")
        if self.loader is None or isinstance(self.loader, str | Mapping) or not hasattr(self.loader, "__iter__"):
            raise DetentError(f"data_loader: batches to score formats on, not {shown(self.loader)}")
        if isinstance(self.loader, Iterator):  # it can be gone through once, and calibration comes before the scores
            self.loader = list(islice(self.loader, max(self.calib_steps, self.score_steps)))
        if next(iter(self.loader), self) is self:
            raise DetentError("data_loader gives no batch; an iterator that was used before is empty")

    def batches(self, most: int) -> Iterator[Any]:
        assert self.loader is not None
        return islice(iter(self.loader), most)

    @property
    def steps(self) -> int:
        """How many batches there are for scores, as far as that is known."""
        length = getattr(self.loader, "__len__", None)
        try:
            return min(self.score_steps, length()) if length is not None else self.score_steps
        except TypeError:  # a DataLoader over a stream
            return self.score_steps

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The output of the model for a batch."""
        if self.forward_step is not None:
            return self.forward_step(model, batch)
        return model(**batch) if isinstance(batch, Mapping) else model(batch)

    def backward(self, model: nn.Module, batch: Any, number: int) -> None:
        """The gradients of a batch's loss. Raises DetentError: there is no loss, or it depends on no layer."""
        if self.forward_backward_step is not None:
            self.forward_backward_step(model, batch)
            return
        output = self.forward(model, batch)
        if self.loss_func is not None:
            loss: Any = self.loss_func(output, batch)
        else:
            loss = getattr(output, "loss", None)
            loss = own_loss(output, number) if loss is None else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise DetentError(f"loss_func: the loss is a tensor with one number, not {shown(loss)}")
        if not loss.requires_grad:
            raise DetentError(
                "the loss depends on no layer that may be quantized: the model doesn't call them on this data, or"
                " forward_step or loss_func detaches the output"
            )
        loss.backward()

    def loop(self) -> DataLoop:
        """For calibration."""
        return DataLoop(lambda model: [self.forward(model, batch) for batch in self.batches(self.calib_steps)])
