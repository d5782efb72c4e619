"""What a user knows better: a table, as a dictionary or a JSON file, that overrides what was found.

```json
{
  "blocks": ["encoder.stage.*"],
  "sites": {
    "*.attention.out": null,
    "*.mlp.down": {"kind": "rows", "module": "{block}.mlp.up", "parameters": ["weight"]}
  }
}
```

``blocks`` are patterns of module names. ``sites`` gives, by pattern of site names (first match), null for no fold, or a
fold: ``kind`` and ``module`` as in `Fold` (``{block}`` is the site's block), ``parameters`` (default: weight, and bias
if there is one), ``channels`` (default: channel i is row i). A fold of the table is proved like one that was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from detent.errors import DetentError
from detent.external.files import read_json, user_path


class FoldEntry(BaseModel):
    """A fold as the table gives it."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["norm", "offset_norm", "rows"]
    module: str
    parameters: tuple[str, ...] | None = None
    channels: tuple[int, ...] | None = None


class Overrides(BaseModel):
    """A table of overrides; see the head of this file for its fields."""

    model_config = ConfigDict(extra="forbid")

    blocks: list[str] | None = None
    sites: dict[str, FoldEntry | None] = {}

    @staticmethod
    def read(table: Mapping[str, Any] | str | Path | None) -> Overrides:
        """From a dictionary, or a JSON file.

        Raises:
            DetentError: the file can't be read, or the table has other fields or values than it may.
        """
        where = "overrides"
        if isinstance(table, (str, Path)):
            where = str(table)
            table = read_json(user_path(table))
        try:
            return Overrides.model_validate({} if table is None else table)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the table"
            raise DetentError(f"{where}: {field}: {first['msg']}; it has the fields 'blocks' and 'sites'") from error

    @property
    def empty(self) -> bool:
        """Whether the table says nothing."""
        return self.blocks is None and not self.sites

    def match(self, site: str) -> tuple[str, FoldEntry | None] | None:
        """The first pattern that a site's name matches, and its entry."""
        return next(((p, entry) for p, entry in self.sites.items() if fnmatchcase(site, p)), None)

    def check_used(self, sites: list[str]) -> None:
        """Raises DetentError for a pattern that matches no site."""
        unused = [p for p in self.sites if not any(fnmatchcase(name, p) for name in sites)]
        if unused:
            raise DetentError(
                f"overrides: the pattern {unused[0]!r} matches no site; sites are called, for instance,"
                f" {', '.join(sites[:4])}"
            )

    def chosen_blocks(self, model: nn.Module) -> tuple[str, ...] | None:
        """The modules that the patterns of ``blocks`` name, in the model's order; None where the table has none.

        Raises:
            DetentError: a pattern matches no module.
        """
        if self.blocks is None:
            return None
        names = [name for name, _ in model.named_modules()]
        for pattern in self.blocks:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise DetentError(f"overrides: blocks: {pattern!r} matches no module of the model")
        depth = {p: p.count(".") for p in self.blocks}
        return tuple(n for n in names if any(fnmatchcase(n, p) and n.count(".") == d for p, d in depth.items()))
