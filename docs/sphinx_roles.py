"""An extension of the site's docstring reader (griffe)."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A Sphinx role, as docstrings write references: ":func:`detent.quantize`", ":class:`~detent.formats.Format`".
_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|data|attr|exc|obj):`~?([^`]+)`")


class SphinxRoles(griffe.Extension):
    """Shows such references as plain code; editors and help() read the docstrings themselves, which keep them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
