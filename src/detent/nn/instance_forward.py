"""Modules whose `forward` was set on the instance, in front of that of their class.

accelerate's hooks and offloading do it, so do `functools.partial`, decorators and other patches. Python finds an
instance's attribute before that of its class, so giving such a module a quantized class changes nothing by itself: the
replacement must be made to call the quantized forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_MARK = "_float_forward"


def rebind_forward(module: nn.Module, original: Callable[..., Any]) -> None:
    """Let what replaces a converted module's forward on the instance call the forward that its class has now.

    Everything that holds the bound forward of the original class is replaced: attributes of the instance
    (accelerate keeps it as ``_old_forward``), partials, and variables that a function encloses. The objects themselves
    stay as they are, so that a conversion can be undone.

    Args:
        module: of its quantized class already.
        original: the forward of the class that it had.
    """
    if "forward" not in module.__dict__:
        return
    before, after = MethodType(original, module), MethodType(type(module).forward, module)
    new = {name: _replaced(value, before, after) for name, value in module.__dict__.items()}
    if all(value is module.__dict__[name] for name, value in new.items()):
        front = module.__dict__["forward"]
        module.__dict__[_MARK] = getattr(front, "__qualname__", type(front).__name__)
    module.__dict__.update(new)


def float_forward(module: nn.Module) -> str:
    """What replaces a converted module's forward on the instance and can't be made to call it; "" for nothing."""
    return str(module.__dict__.get(_MARK, "")) if "forward" in module.__dict__ else ""


def _replaced(value: Any, before: MethodType, after: MethodType) -> Any:
    """`value` with `after` in the place of `before`, however deep; the same object where it isn't in there."""

    def within(x: Any) -> Any:
        return _replaced(x, before, after)

    if isinstance(value, MethodType):
        if value == before:
            return after
        function = within(value.__func__)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
        new = [within(x) for x in parts]
        if all(a is b for a, b in zip(parts, new, strict=True)):
            return value
        middle = 1 + len(value.args)
        return partial(new[0], *new[1:middle], **dict(zip(value.keywords, new[middle:], strict=True)))
    if isinstance(value, FunctionType) and value.__closure__:
        cells = [_cell(cell, before, after) for cell in value.__closure__]
        if all(a is b for a, b in zip(cells, value.__closure__, strict=True)):
            return value
        function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
        function.__kwdefaults__ = value.__kwdefaults__
        function.__dict__.update(value.__dict__)
        return function
    return value


def _cell(cell: CellType, before: MethodType, after: MethodType) -> CellType:
    """A cell that holds the replaced value; the same cell where nothing in it is replaced, or it is still empty."""
    try:
        held = cell.cell_contents
    except ValueError:
        return cell
    if not isinstance(held, MethodType | partial | FunctionType):
        return cell
    new = _replaced(held, before, after)
    return cell if new is held else CellType(new)
