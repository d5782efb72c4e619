"""The blocks of a model that come from a checkpoint one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from detent.checkpoints import Source
from detent.engine.host import Host
from detent.model.skeleton import StreamedWeights
from detent.pretrained.names import CheckpointNames


class StreamedBlocks(Host):
    """A model whose blocks have their weights only while they are needed.

    Args:
        source: the checkpoint. names: of it, for this model.
        model: from `model_without_weights`.
        blocks: the names of those that run one after the other.
        device: where they run.
        states: a folder for hidden states; None keeps them in memory.
    """

    streams = True

    def __init__(
        self,
        source: Source,
        names: CheckpointNames,
        model: nn.Module,
        blocks: Sequence[str],
        *,
        device: str = "cpu",
        states: Path | None = None,
    ) -> None:
        self._model, self._blocks, self.states = model, list(blocks), states
        self._weights = StreamedWeights(source, names, model, device)
        everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        inside = {block: [n for n in everything if n.startswith(f"{block}.")] for block in self._blocks}
        elsewhere = [n for n in everything if not any(n in members for members in inside.values())]
        shared = set(self._weights.stored(elsewhere))
        self._inside = {
            block: [n for n in self._weights.stored(members) if n not in shared] for block, members in inside.items()
        }
        self._elsewhere = self._weights.stored(elsewhere)
        self._head = self._weights.stored(_head_alone(model, elsewhere))
        self._weights.put_buffers()

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        self._weights.put(self._inside[name])
        yield
        self._weights.free(self._inside[name])

    @contextmanager
    def outside(self, *, whole: bool = False) -> Iterator[None]:
        names = self._elsewhere if whole else [name for name in self._elsewhere if name not in self._head]
        self._weights.put(names)
        yield
        self._weights.free(names)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """The model can be run as a whole: each block is read when it is called, and freed when it is done."""
        with ExitStack() as stack:
            stack.enter_context(self.outside(whole=True))
            for name in self._blocks:
                block, mine = self._model.get_submodule(name), self._inside[name]
                read = block.register_forward_pre_hook(lambda *_, mine=mine: self._weights.put(mine))
                free = block.register_forward_hook(lambda *_, mine=mine: self._weights.free(mine), always_call=True)
                stack.callback(read.remove)
                stack.callback(free.remove)
            yield


def _head_alone(model: nn.Module, parameters: list[str]) -> list[str]:
    """The parameters of an output embedding that is tied to nothing: no block needs them."""
    get: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = {} if head is None else {id(p): p for p in head.parameters()}
    places = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in parameters if id(places[name]) in own and uses[id(places[name])] == 1]
