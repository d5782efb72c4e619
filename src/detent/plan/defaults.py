"""What stays in floating point unless the user says otherwise, found by structure."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from detent.pretrained.facts import outside_language
from detent.structure import Structure

#: What routers are usually called, for models whose structure can't be found.
_ROUTERS = ("*.gate", "*.router", "*router.*", "*.shared_expert_gate")


def stays_by_default(model: nn.Module, structure: Structure | None) -> Callable[[str], str]:
    """A function that gives the reason why a module stays by default; "" if it doesn't.

    The output embedding stays, since errors there reach the logits undamped; routers and gates, which decide by small
    differences; and whatever is outside the language model: what the class or the configuration puts there, and what
    text alone doesn't reach, unless it stands among the blocks (cross-attention, experts without a token).
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    output = get_head() if callable(get_head) else None
    heads: set[str | None] = {name for name, module in model.named_modules() if module is output}
    if not heads and structure is not None and structure.stream is not None:
        heads = {structure.stream.head} - {None}
    outside = outside_language(model)
    deciding = () if structure is None else (*structure.routers, *structure.gates)
    elsewhere = set() if structure is None else _elsewhere(structure)

    def reason(name: str) -> str:
        if name in heads:
            return "output embedding, kept by default"
        if outside(name) or name in elsewhere:
            return "outside of the language model, kept by default"
        if name in deciding or (structure is None and any(fnmatchcase(name, pattern) for pattern in _ROUTERS)):
            return "router or gate, kept by default"
        return ""

    return reason


def _elsewhere(structure: Structure) -> set[str]:
    """The modules that text doesn't reach and that aren't in a list of blocks."""
    lists = tuple({f"{block.rpartition('.')[0]}." for block in structure.blocks})
    return {name for name in structure.unread if lists and not name.startswith(lists)}
