"""Running a model block by block: what enters the first block is recorded once, then each block runs by itself.

The calibration loop runs once over a model whose blocks pass their input on. What every block is called with besides
(masks, positions) is recorded then, per batch. On the first sequence of the first batch the blocks do run, and running
each by itself on what it was called with is compared with that; if anything differs (state that blocks hand on
otherwise, caches), the model is not traversed block by block, and the reason is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detent.engine.calls import _CACHES, BlockCall, PassOver, cut_call, find_hidden, hidden_of, like_output, with_hidden
from detent.engine.host import CannotStream, Host
from detent.engine.store import TensorStore
from detent.model.scopes import without_cache
from detent.padding import current_token_mask, token_mask

#: How far a replayed block may be from the real run, relative to the largest magnitude of its output.
_TOLERANCE = 1e-3

Run = Callable[[nn.Module], Any]


@dataclass
class BlockChain:
    """The blocks of a model and what calibration data makes of their inputs.

    Attributes:
        names, blocks: in the order in which they run.
        calls: for each block, for each batch.
        masks: which tokens are real, for each batch.
        inputs: of the first block.
        templates: for each block an output, for its form.
    """

    names: list[str]
    blocks: list[nn.Module]
    calls: list[list[BlockCall]]
    masks: list[Tensor | None]
    inputs: TensorStore
    templates: list[Any]
    _spill: tempfile.TemporaryDirectory[str] | None = None
    _stores: int = field(default=0)

    @property
    def batches(self) -> int:
        return len(self.masks)

    def store(self) -> TensorStore:
        """An empty store, on disk if that was asked for."""
        if self._spill is None:
            return TensorStore()
        self._stores += 1
        folder = Path(self._spill.name) / str(self._stores)
        folder.mkdir()
        return TensorStore(folder)

    def close(self) -> None:
        """Remove what was spilled."""
        if self._spill is not None:
            self._spill.cleanup()

    def run(
        self, index: int, batch: int, hidden: Tensor, block: nn.Module | None = None, *, rows: slice | None = None
    ) -> Tensor:
        """The output of a block for `hidden`, called as in that batch.

        Args:
            index, batch: number of the block and of the batch.
            hidden: what enters it.
            block: another in its place.
            rows: only these sequences of the batch; see `can_cut`.
        """
        call, mask = self.calls[index][batch], self.masks[batch]
        if rows is not None:
            portion = cut_call(hidden, call, mask, rows)
            assert portion is not None
            hidden, call, mask = portion
        args, kwargs = with_hidden(call, hidden)
        with token_mask(mask):
            return hidden_of((block or self.blocks[index])(*args, **kwargs))

    def can_cut(self, index: int, batch: int, hidden: Tensor) -> bool:
        """Whether a block can be called with a part of a batch's sequences."""
        return cut_call(hidden, self.calls[index][batch], self.masks[batch], slice(0, 1)) is not None

    def device(self, index: int) -> torch.device:
        """The device of a block's parameters."""
        return next((p.device for p in self.blocks[index].parameters()), torch.device("cpu"))

    def run_all(self, index: int, inputs: TensorStore) -> Iterator[Tensor]:
        """The output of a block for every batch of inputs."""
        device = self.device(index)
        for batch in range(len(inputs)):
            yield self.run(index, batch, inputs.get(batch, device))


@dataclass(frozen=True)
class NoChain:
    """Why a model isn't traversed block by block."""

    reason: str


def record_chain(
    model: nn.Module, names: Sequence[str], run: Run, *, spill: bool = False, host: Host | None = None
) -> BlockChain | NoChain:
    """Run the calibration loop once and record what enters the blocks.

    Args:
        model: in eval mode, quantizers off.
        names: of the blocks, in order.
        run: the calibration loop.
        spill: keep hidden states on disk instead of in memory.
        host: where the blocks are. With one that streams, each pass ends with the last block.
    """
    host = host or Host()
    if len(names) < 2:
        return NoChain("no chain of repeated blocks was found in it")
    blocks = [model.get_submodule(name) for name in names]
    recorder = _Recorder(names, blocks, host, spill)
    try:
        with host.outside(), recorder.installed(model):
            run(model)
        chain = BlockChain(
            list(names), blocks, recorder.calls, recorder.masks, recorder.inputs, recorder.templates, recorder.spill
        )
        reason = recorder.trouble or _mismatch(chain, recorder, host)
    except BaseException:
        recorder.close()
        raise
    if reason:
        recorder.close()
        return NoChain(reason)
    return chain


class _Recorder:
    """Stands in for the blocks while the loop runs.

    On the first batch each block computes, on its first sequence alone, so that it can be compared with the block run
    by itself. From the second batch on no block computes: each returns its input in the form of its first output, and
    only what the first block is given, and what all of them are called with besides, is recorded.
    """

    def __init__(self, names: Sequence[str], blocks: list[nn.Module], host: Host, spill: bool) -> None:
        self._names, self._blocks, self._host = names, blocks, host
        self.calls: list[list[BlockCall]] = [[] for _ in blocks]
        self.masks: list[Tensor | None] = []
        self.spill = tempfile.TemporaryDirectory(prefix="detent-", dir=host.states) if spill or host.states else None
        folder = None
        if self.spill is not None:
            folder = Path(self.spill.name) / "0"
            folder.mkdir()
        self.inputs = TensorStore(folder)
        #: For each block the call on the first sequence, what entered it there, and what came out.
        self.first: list[tuple[BlockCall, Tensor, Tensor]] = []
        self.first_mask: Tensor | None = None
        #: What the model was given back by the block before, to check that the next one is called with just that.
        self._handed_on: Tensor | None = None
        self._trouble = ""
        #: For each block its first output, whose form later ones take, and the last call.
        self.templates: list[Any] = [None for _ in blocks]
        self._last: list[BlockCall | None] = [None for _ in blocks]

    def close(self) -> None:
        if self.spill is not None:
            self.spill.cleanup()

    @property
    def trouble(self) -> str:
        """Why the model can't be traversed block by block; "" if it can."""
        return self._trouble

    @trouble.setter
    def trouble(self, reason: str) -> None:
        if self._host.streams:  # the blocks have no weights to go on with
            raise CannotStream(reason)
        self._trouble = reason

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        for index, block in enumerate(self._blocks):
            original = block.forward
            block.forward = self._stand_in(index, original)
        try:
            with without_cache(model):
                yield
        finally:
            for block in self._blocks:
                del block.forward

    def _stand_in(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.trouble:
                return original(*args, **kwargs)
            found = find_hidden(args, kwargs)
            if found is None:
                self.trouble = "a block is called without a hidden state that could be recognised"
                return original(*args, **kwargs)
            hidden, call, cached = found
            if cached:
                self.trouble = "the calibration loop generates with a cache, which replaying blocks can't follow"
                return original(*args, **kwargs)
            if index == 0:
                self.masks.append(current_token_mask())
                self.inputs.append(hidden.detach())
            batch = len(self.masks) - 1
            if len(self.calls[index]) != batch:
                self.trouble = "blocks run more than once, or not in the order of their list"
                return original(*args, **kwargs)
            self.calls[index].append(self._shared(index, call))
            if batch:
                output = like_output(self.templates[index], hidden)
            else:
                with self._host.block(self._names[index]):
                    output = self._first(index, original, hidden, call, args, kwargs)
            if self._host.streams and not self.trouble and index == len(self._blocks) - 1:
                raise PassOver
            return output

        return forward

    def _first(
        self,
        index: int,
        original: Callable[..., Any],
        hidden: Tensor,
        call: BlockCall,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a block on the first sequence of the first batch (all of it, if it can't be cut).

        Cut, the block sees one sequence while the model goes on with all of them: the block's own `hidden` is passed
        through unchanged, and the next block is fed the one sequence that the block before really gave.
        """
        if index and self._handed_on is not None and not torch.equal(hidden.nan_to_num(), self._handed_on.nan_to_num()):
            self.trouble = "the input of a block is not the output of the block before it"
        # A cache object, even an empty one, would be filled with one sequence only, so such a call isn't cut.
        whole = args, kwargs
        cached = any(kwargs.get(name) is not None for name in _CACHES)
        small = None if cached else cut_call(hidden, call, self.masks[0], slice(0, 1))
        if small is None:
            entered, self.first_mask = hidden, self.masks[0]
        else:
            entered, call, self.first_mask = small
            entered = self.first[-1][2][:1] if index else entered
            args, kwargs = with_hidden(call, entered)
        with token_mask(self.first_mask):
            output = original(*args, **kwargs)
        left = hidden_of(output).detach().clone()
        if left.shape != entered.shape:  # later batches skip the blocks: what enters one has to fit the next
            self.trouble = (
                f"a block changes the shape of what enters it, from {tuple(entered.shape)} to {tuple(left.shape)}"
            )
            # Recording has failed here; the model goes on with all of its sequences.
            return output if small is None else original(*whole[0], **whole[1])
        self.first.append((call, entered.detach().clone(), left))
        self.templates[index] = output
        self._handed_on = left if small is None else hidden.detach().clone()
        return output if small is None else like_output(output, hidden)

    def _shared(self, index: int, call: BlockCall) -> BlockCall:
        """`call` with the tensors of an earlier call where they are equal, so that masks are held once.

        That is this block's call in the batch before; in the first batch, the call of the block before it. Within a
        batch, most models hand the same tensor to every block anyway.
        """
        previous = self._last[index] or (self._last[index - 1] if index else None)

        def same(new: Any, old: Any) -> Any:
            if isinstance(new, Tensor) and isinstance(old, Tensor) and new is not old:
                fits = new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
                return old if fits and torch.equal(new, old) else new
            if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
                return tuple(same(a, b) for a, b in zip(new, old, strict=True))
            return new

        if previous is not None:
            call.kwargs = {k: same(v, previous.kwargs.get(k)) for k, v in call.kwargs.items()}
            if len(call.args) == len(previous.args):
                call.args = same(call.args, previous.args)
        self._last[index] = call
        return call


def _mismatch(chain: BlockChain, recorder: _Recorder, host: Host) -> str:
    """Why replaying the first batch doesn't give what really came out; "" if it does."""
    if not chain.batches:
        return "the calibration data never reached the blocks"
    if any(len(calls) != chain.batches for calls in chain.calls):
        return "some blocks don't run for every batch"
    for name, block, (call, entered, left) in zip(chain.names, chain.blocks, recorder.first, strict=True):
        args, kwargs = with_hidden(call, entered)
        with host.block(name), token_mask(recorder.first_mask):
            again = hidden_of(block(*args, **kwargs))
        if again.shape != left.shape or not _close(again, left):
            return f"{name} run by itself doesn't give what it gives inside the model"
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a[finite].float(), b[finite].float()
    return not b.numel() or bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


@contextmanager
def replaced_outputs(chain: BlockChain, outputs: TensorStore) -> Iterator[None]:
    """While active, the model skips its blocks: the last one gives `outputs`, batch after batch."""
    batch = -1
    last = len(chain.blocks) - 1

    def stand_in(index: int, template: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal batch
            found = find_hidden(args, kwargs)
            assert found is not None
            if index == 0:
                batch += 1
            return like_output(template, outputs.get(batch, found[0].device) if index == last else found[0])

        return forward

    for index, block in enumerate(chain.blocks):
        block.forward = stand_in(index, chain.templates[index])
    try:
        yield
    finally:
        for block in chain.blocks:
            del block.forward
