"""Rules against the names of a model's quantizers: what each quantizer becomes, and which rules match nothing.

`names` below maps the full name of each quantizer (``model.layers.0.mlp.up_proj.weight_quantizer``) to the class names
that its module goes by (``{"nn.Linear"}``); a plain list of names will do where no rule has a parent class.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cache

from detent.config.attributes import Attributes, QuantizerAttributeConfig
from detent.config.quant_cfg import Rule, is_enabled, switched
from detent.errors import DetentError

QuantizerNames = Mapping[str, Collection[str]] | Iterable[str]


def matches(rule: Rule, name: str, parent_classes: Collection[str] = ()) -> bool:
    """Whether a rule applies to a quantizer.

    Wildcards (`*`, `?`, `[...]`, as in `fnmatch`, case-sensitive) are matched against the whole name; a quantizer of
    one expert, ``...weight_quantizers.3``, also goes by ``...weight_quantizer``.
    """
    if rule.parent_class is not None and rule.parent_class not in parent_classes:
        return False
    plain = _plain_start(rule.pattern)
    if plain and not name.startswith(plain):  # by far the most calls, where a model has many layers
        return False
    spellings = [name]
    if expert := re.fullmatch(r"(.*quantizer)s\.\d+", name):
        spellings.append(expert[1])
    if not isinstance(rule.pattern, str):
        return any(rule.pattern(spelling) for spelling in spellings)
    pattern = "*" if _is_default(rule) else rule.pattern
    return any(fnmatchcase(spelling, pattern) for spelling in spellings)


@cache
def _plain_start(pattern: object) -> str:
    """What every name that a pattern matches begins with, as far as the pattern says."""
    return "" if not isinstance(pattern, str) or pattern == "default" else re.split(r"[*?[]", pattern, maxsplit=1)[0]


def match(
    rules: Iterable[Rule], name: str, parent_classes: Collection[str] = (), current: Attributes | None = None
) -> Attributes | None:
    """What a quantizer becomes: the attributes of the last rule that matches, as later rules switch them.

    Args:
        rules: from `normalize`, in order.
        name: the full name of the quantizer.
        parent_classes: the class names of its module.
        current: what it is now; returned where no rule matches.

    A rule that switches a quantizer of which nothing is known switches the default attributes (8-bit integers).
    """
    for rule in rules:
        if not matches(rule, name, parent_classes):
            continue
        if rule.attributes is not None:
            current = rule.attributes
        else:
            current = switched(current or QuantizerAttributeConfig(), bool(rule.enable))
    return current


def check_matches(
    rules: Iterable[Rule], names: QuantizerNames, *, strict: bool = True, must_enable: bool = True
) -> list[str]:
    """Hold the rules against a model before anything is changed; warnings as text.

    An entry that sets a format and matches nothing, and a configuration that leaves no quantizer enabled, are errors;
    an exclusion that matches nothing is a warning. Neither holds for what presets always exclude, or for a preset's own
    entry that covers names that not every model has.

    Args:
        rules: from `normalize`.
        names: the model's quantizers.
        strict: False turns the errors into warnings.
        must_enable: False where the model has quantizers that are set already, so that rules which only switch some off
            are fine.

    Raises:
        DetentError: with the nearest pattern or name that would match.
    """
    rules = list(rules)
    table = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, ())
    errors, warnings = [], []
    for rule in rules:
        if _is_default(rule) or any(matches(rule, name, classes) for name, classes in table.items()):
            continue
        if rule.enables and not rule.may_match_nothing:
            verb = "sets a format" if rule.attributes is not None else "enables quantizers"
            errors.append(f"quant_cfg entry {rule.source} {verb} but matches no quantizer{_suggestion(rule, table)}")
        elif not rule.enables and not rule.is_default_exclusion:
            warnings.append(
                f"quant_cfg entry {rule.source} excludes nothing: no quantizer matches{_suggestion(rule, table)}"
            )
    if must_enable and not errors:
        errors = _nothing_enabled(rules, table)
    if errors and strict:
        raise DetentError("; ".join(errors))
    return errors + warnings


def _nothing_enabled(rules: list[Rule], table: Mapping[str, Collection[str]]) -> list[str]:
    if any(is_enabled(match(rules, name, classes)) for name, classes in table.items()):
        return []
    if not table:
        return ["quant_cfg quantizes nothing: the model has no quantizers, so none of its modules is of a known kind"]
    enabling = [rule for rule in rules if rule.enables]
    if not enabling:
        return [
            "quant_cfg quantizes nothing: no entry sets a format; add one such as '*weight_quantizer': {'num_bits': 8}"
        ]
    for rule in enabling:
        for name, classes in table.items():
            if matches(rule, name, classes):
                last = [r for r in rules if matches(r, name, classes)][-1]
                return [
                    "quant_cfg quantizes nothing: a later entry switches off whatever an earlier one sets;"
                    f" for {name!r} the last entry that matches is {last.source}"
                ]
    sources = ", ".join(rule.source for rule in enabling)
    return [f"quant_cfg quantizes nothing: of the entries that set a format ({sources}) none matches{_example(table)}"]


def _is_default(rule: Rule) -> bool:
    return rule.pattern == "default" and rule.parent_class is None


def _example(table: Mapping[str, Collection[str]]) -> str:
    return f"; the model has quantizers such as {next(iter(table))!r}" if table else "; the model has no quantizers"


def _suggestion(rule: Rule, table: Mapping[str, Collection[str]]) -> str:
    """'; did you mean X?' with the pattern or name of the model that is most like the rule's."""
    if rule.parent_class is not None:
        known = sorted({name for classes in table.values() for name in classes})
        if rule.parent_class not in known:
            return f" of a module of class {rule.parent_class!r}; the model has {', '.join(known) or 'none'}"
    if not isinstance(rule.pattern, str) or not table:
        return _example(table)
    pattern: str = rule.pattern
    candidates = dict.fromkeys(c for name in _distinct(table) for c in _patterns_like(name, pattern))
    best = max(candidates, key=lambda c: SequenceMatcher(None, c, pattern).ratio())
    return f"; did you mean {best!r}?"


def _distinct(names: Iterable[str]) -> list[str]:
    """One name of each kind: names that differ in numbers only are alike."""
    return list({re.sub(r"\d+", "0", name): name for name in reversed(list(names))}.values())


def _patterns_like(name: str, pattern: str) -> list[str]:
    """The name, or patterns that match it, spelled in the way of `pattern`."""
    if not re.search(r"[*?[]", pattern):
        return [name]
    *path, leaf = name.split(".")
    found = [f"*{leaf}"] + [f"*{part}*" for part in path] + [f"*{part}*{leaf}" for part in path]
    found += [f"*.{part}.*" for part in path] + [f"*.{part}.{leaf}" for part in path]
    return [c for c in found if not re.search(r"\*\.?\d+[.*]", c)]
