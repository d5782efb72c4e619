"""Arguments of the shell, in the form that the parser takes.

The flags of AMD Quark's quantize_quark.py are spelled with underscores; hyphens mean the same. ``--exclude_layers``
takes any number of names (none: "exclude nothing"), which the parser library can't express: each name gets the flag
put before it, as do those of ``--pre_quantization_optimization`` and ``--model_export``. ``--group_size_per_layer
PATTERN SIZE`` becomes one value, ``PATTERN=SIZE``.
"""

from __future__ import annotations

#: Flags that take every argument up to the next flag.
MANY = ("--exclude_layers", "--pre_quantization_optimization", "--model_export")
#: Flags that take two arguments.
PAIRS = ("--group_size_per_layer",)
#: The value of such a flag without arguments.
NOTHING = ""


def normalize(arguments: list[str]) -> list[str]:
    """The same arguments with underscores in long flags, and one value for each `MANY` flag."""
    out: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*out, argument, *rest]
        if not argument.startswith("--"):
            out.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name in PAIRS and not equals and len(rest) > 1:
            out += [name, f"{rest.pop(0)}={rest.pop(0)}"]
            continue
        if name not in MANY or equals:
            out.append(name + equals + value)
            continue
        values = []
        while rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        for value in values or [NOTHING]:
            out += [name, value]
    return out
