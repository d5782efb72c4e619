"""`quant_cfg`: which quantizer gets which attributes. Two spellings, one meaning.

* A dictionary ``{pattern: attributes}``: patterns are wildcards on quantizer names, or callables ``name -> bool``;
  a class name as key (``"nn.Conv2d": {pattern: attributes}``) limits its patterns to modules of that class.
* A list of entries ``{"quantizer_name": pattern, "parent_class": ..., "cfg": attributes, "enable": bool}``.

Rules, in both:

* ``"default"`` comes first, whatever its place; after it, in order, the last entry that matches a quantizer wins;
* attributes replace everything set before; ``{"enable": False}`` alone, and an entry without ``cfg``, only switch;
* a list of attributes means that many quantizers in sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from detent.config.attributes import Attributes, QuantizerAttributeConfig, SequentialConfig, parse_attributes
from detent.config.base import nearest, shown
from detent.config.exclusions import is_default_exclusion
from detent.errors import DetentError

Pattern = str | Callable[[str], bool]

_ENTRY_FIELDS = ("quantizer_name", "parent_class", "cfg", "enable")


class PresetPattern(str):
    """A wildcard that came with a preset and covers names that not every model has: it may match nothing."""

    __slots__ = ()


@dataclass(frozen=True)
class Rule:
    """One entry, checked.

    Attributes:
        pattern: what quantizer names it applies to.
        parent_class: the class name that the quantizer's module must have, or None for any.
        attributes: what matching quantizers become, or None if the rule only switches them on or off.
        enable: for a rule that only switches: on or off; else None (the attributes decide).
        is_default_exclusion: it excludes one of the places that presets always exclude.
        may_match_nothing: it came with a preset and covers names that not every model has.
        source: the entry as the user wrote it, for messages.
    """

    pattern: Pattern
    parent_class: str | None
    attributes: Attributes | None
    enable: bool | None
    is_default_exclusion: bool
    may_match_nothing: bool
    source: str

    @property
    def enables(self) -> bool:
        """Whether matching quantizers are on afterwards."""
        if self.attributes is None:
            return bool(self.enable)
        return is_enabled(self.attributes)


class QuantCfg(list[dict[str, Any]]):
    """Entries in order, which can also be used as the dictionary ``{pattern: attributes}`` that they amount to.

    ``cfg["*input_quantizer"]["enable"] = False``, ``cfg["*lm_head*"] = {"enable": False}``, ``**cfg``, ``*cfg`` and
    ``cfg.append({"quantizer_name": ..., "enable": False})`` all work. A new pattern goes to the end and so wins over
    earlier ones; assigning to an existing pattern keeps its place. `copy` is deep.
    """

    def __init__(self, entries: Mapping[Any, Any] | Iterable[Any] = ()) -> None:
        super().__init__()
        self.update(entries)

    def keys(self) -> list[Any]:
        """Patterns, and class names for entries with a parent class, in the order of their first entry."""
        return list(dict.fromkeys(_key(entry) for entry in self))

    def values(self) -> list[Any]:
        return [self[key] for key in self.keys()]

    def items(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self.keys()]

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        if isinstance(key, dict):
            return super().__contains__(key)
        return any(_key(entry) == key for entry in self)

    def __getitem__(self, key: Any) -> Any:
        """An entry by number, else the attributes of a pattern: what is changed in them is changed in the entry."""
        if isinstance(key, int | slice):
            return super().__getitem__(key)
        found = [entry for entry in self if _key(entry) == key]
        if not found:
            close = nearest(str(key), [str(known) for known in self.keys()])
            raise KeyError(f"{shown(key)} is not in quant_cfg" + (f"; did you mean {close[0]!r}?" if close else ""))
        if found[0].get("parent_class") is not None:
            return {entry["quantizer_name"]: _live_attributes(entry) for entry in found}
        return _live_attributes(found[-1])

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int | slice):
            super().__setitem__(key, value)
            return
        new = _entries(key, value)
        places = [i for i, entry in enumerate(self) if _key(entry) == key]
        if not places:
            self.extend(new)
            return
        if len(new) == 1:  # keeps the tag of a preset's pattern
            new[0]["quantizer_name"] = self[places[-1]].get("quantizer_name", key)
        for place in reversed(places[:-1]):
            super().__delitem__(place)
        last = places[-1] - len(places) + 1
        super().__setitem__(slice(last, last + 1), new)

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, int | slice):
            super().__delitem__(key)
            return
        if key not in self:
            raise KeyError(key)
        super().__setitem__(slice(None), [entry for entry in self if _key(entry) != key])

    def pop(self, key: Any = -1, *default: Any) -> Any:
        """An entry by number, or the attributes of a pattern, removed."""
        if isinstance(key, int):
            return super().pop(key)
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, other: Mapping[Any, Any] | Iterable[Any] = (), **patterns: Any) -> None:
        """From a dictionary: sets each pattern. From a list or another `QuantCfg`: adds its entries at the end."""
        if isinstance(other, Mapping):
            for key, value in other.items():
                if isinstance(key, int | slice):  # as an index it would replace an entry by its number
                    raise DetentError(f"quant_cfg: a pattern is a wildcard or a callable, not {key!r}")
                self[key] = value
        else:
            self.extend(other)
        for key, value in patterns.items():
            self[key] = value

    def copy(self) -> Self:
        """A deep copy."""
        return copy.deepcopy(self)


def normalize(quant_cfg: Any) -> list[Rule]:
    """The rules of a `quant_cfg`, in the order in which they apply; `"default"` first.

    Raises:
        DetentError: not a dictionary or list of entries, an entry that sets nothing, or attributes that aren't valid;
            the message names the entry.
    """
    if isinstance(quant_cfg, Mapping | list | tuple):
        entries = quant_cfg if isinstance(quant_cfg, QuantCfg) else QuantCfg(quant_cfg)
    else:
        raise DetentError(f"quant_cfg: a dictionary of patterns or a list of entries, not {shown(quant_cfg)}")
    rules = [_rule(entry) for entry in entries]
    first = [r for r in rules if r.pattern == "default" and r.parent_class is None]
    return first + [rule for rule in rules if rule not in first]


def is_enabled(attributes: Attributes | None) -> bool:
    """Whether attributes, or one of several in sequence, are enabled."""
    if isinstance(attributes, SequentialConfig):
        return any(step.enable for step in attributes)
    return attributes is not None and attributes.enable


def switched(attributes: Attributes, enable: bool) -> Attributes:
    """The same attributes, on or off."""
    if isinstance(attributes, SequentialConfig):
        return SequentialConfig(step.model_copy(update={"enable": enable}) for step in attributes)
    return attributes.model_copy(update={"enable": enable})


def class_name(cls: type) -> str:
    """What a module class is called as `parent_class`: "nn.Linear" for PyTorch's own, else its plain name."""
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _rule(entry: Any) -> Rule:
    source = _describe(entry)
    if not isinstance(entry, Mapping):
        raise DetentError(f"quant_cfg: an entry is a dictionary with a quantizer_name, not {shown(entry)}")
    unknown = [key for key in entry if key not in _ENTRY_FIELDS]
    if unknown:
        raise DetentError(
            f"quant_cfg entry {source}: unknown field {shown(unknown[0])}; fields: {', '.join(_ENTRY_FIELDS)}"
        )
    pattern, parent, cfg, enable = (entry.get(field) for field in _ENTRY_FIELDS)
    if not (isinstance(pattern, str) or callable(pattern)) or pattern == "":
        raise DetentError(f"quant_cfg entry {source}: quantizer_name is a wildcard or a callable, not {shown(pattern)}")
    if isinstance(parent, type):
        parent = class_name(parent)
    if parent is not None and not isinstance(parent, str):
        raise DetentError(f"quant_cfg entry {source}: parent_class is a class or its name, not {shown(parent)}")
    if enable is not None and not isinstance(enable, bool):
        raise DetentError(f"quant_cfg entry {source}: enable is True or False, not {shown(enable)}")
    attributes, switch = _attributes(cfg, enable, source)
    return Rule(
        pattern=pattern,
        parent_class=parent,
        attributes=attributes,
        enable=switch,
        is_default_exclusion=switch is False and is_default_exclusion(pattern, parent),
        may_match_nothing=isinstance(pattern, PresetPattern),
        source=source,
    )


def _attributes(cfg: Any, enable: bool | None, source: str) -> tuple[Attributes | None, bool | None]:
    """(attributes, None), or (None, on or off) for an entry that only switches."""
    if cfg is None:
        if enable is None:
            raise DetentError(f"quant_cfg entry {source} sets nothing: give cfg (attributes), enable, or both")
        return None, enable
    if isinstance(cfg, Mapping) and not isinstance(cfg, QuantizerAttributeConfig):
        if not cfg:
            raise DetentError(f"quant_cfg entry {source}: cfg is empty; leave it out to switch the quantizer only")
        if set(cfg) == {"enable"}:
            if cfg["enable"] is False or enable is False:
                return None, False
            raise DetentError(
                f"quant_cfg entry {source}: {{'enable': True}} alone doesn't say how to quantize; add num_bits"
            )
    try:
        attributes = parse_attributes(cfg)
    except DetentError as error:
        raise DetentError(f"quant_cfg entry {source}: {error}") from None
    return (switched(attributes, False) if enable is False else attributes), None


def _entries(key: Any, value: Any) -> list[dict[str, Any]]:
    """The entries that ``cfg[key] = value`` stands for."""
    if _scopes_a_class(key, value):
        return [{"quantizer_name": pattern, "parent_class": key, "cfg": cfg} for pattern, cfg in value.items()]
    if isinstance(key, type):
        raise DetentError(f"quant_cfg[{class_name(key)}]: a class maps patterns to attributes, such as {{'*': ...}}")
    if not isinstance(value, Mapping | list | tuple):
        raise DetentError(f"quant_cfg[{shown(key)}]: attributes are a dictionary or a list of them, not {shown(value)}")
    return [{"quantizer_name": key, "cfg": value}]


def _scopes_a_class(key: Any, value: Any) -> bool:
    """Whether a key is a module class (``"nn.Conv2d"``) over patterns rather than a pattern over attributes.

    A class name has no wildcard and a last part with a capital letter, and everything below it is attributes again.
    """
    if not isinstance(value, Mapping) or isinstance(value, QuantizerAttributeConfig) or not value:
        return False
    is_class = isinstance(key, type) or (
        isinstance(key, str) and key.replace(".", "_").isidentifier() and key.rpartition(".")[2][:1].isupper()
    )
    return is_class and all(isinstance(attributes, Mapping | list | tuple) for attributes in value.values())


def _key(entry: Mapping[str, Any]) -> Any:
    """The key of an entry in the dictionary view."""
    parent = entry.get("parent_class")
    return entry.get("quantizer_name") if parent is None else parent


class _Switch(dict[str, Any]):
    """The attributes of an entry that only switches: changing them changes the entry, which gets a cfg if it must."""

    def __init__(self, entry: dict[str, Any]) -> None:
        super().__init__(enable=entry.get("enable", True))
        self._entry = entry

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name == "enable" and "cfg" not in self._entry:
            self._entry["enable"] = value
        else:
            self._entry.pop("enable", None)
            self._entry["cfg"] = self

    def update(self, *others: Any, **values: Any) -> None:
        for name, value in dict(*others, **values).items():
            self[name] = value

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


def _live_attributes(entry: dict[str, Any]) -> Any:
    if entry.get("cfg") is None:
        return _Switch(entry)
    if entry.get("enable") is False and isinstance(entry["cfg"], dict | QuantizerAttributeConfig):
        entry["cfg"]["enable"] = entry.pop("enable")  # one place for it, so that it can be switched on here
    return entry["cfg"]


def _describe(entry: Any) -> str:
    """The entry as a short text: its pattern, with the class that limits it."""
    if not isinstance(entry, Mapping):
        return shown(entry)
    pattern, parent = entry.get("quantizer_name"), entry.get("parent_class")
    name = repr(str(pattern)) if isinstance(pattern, str) else getattr(pattern, "__name__", shown(pattern))
    if parent is None:
        return name
    return f"{name} of {class_name(parent) if isinstance(parent, type) else parent}"
