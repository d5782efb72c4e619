"""Where the blocks of a model are while they are calibrated one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from detent.algorithms.site_work import Ledger
from detent.engine.store import TensorStore
from detent.errors import DetentError


class CannotStream(DetentError):
    """A model can't be calibrated block by block, so it has to be in memory whole."""


class Host:
    """What has a model's blocks: this one leaves them where they are, all in memory.

    Attributes:
        streams: whether a block's weights have values only inside `block`. Then the model is never run as a whole.
        states: a folder for hidden states; None keeps them in memory.
    """

    streams = False
    states: Path | None = None

    def block(self, name: str) -> AbstractContextManager[None]:
        """A block has its weights inside."""
        return nullcontext()

    def outside(self, *, whole: bool = False) -> AbstractContextManager[None]:
        """What isn't in a block has its weights inside; but for the output embedding, unless `whole`."""
        return nullcontext()

    def resumed(self) -> tuple[int, TensorStore, TensorStore | None] | None:
        """Where an interrupted run goes on: the number of the first block that isn't finished, what enters it, and what
        the float model has there, where that was kept. None: at the beginning."""
        return None

    def finished(self, name: str, ledger: Ledger, changed: set[str]) -> None:
        """A block's weights and ranges are final. Called inside `block`, or inside `outside`.

        Args:
            name: of the block; "" for what is outside of all of them.
            ledger: what algorithms did, in this block and others.
            changed: names of the parameters outside of quantized weights that have other values now.
        """

    def handed_on(self, index: int, inputs: TensorStore, references: TensorStore | None) -> None:
        """`inputs` are what enters block `index`, `references` what the float model has there. Called outside of
        `block`, after the one before is finished."""
