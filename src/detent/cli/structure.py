"""``detent structure``: what was found out about a model: blocks, sites, folds, experts, the residual stream."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from detent.cli import console


def structure(
    model_dir: Annotated[str, typer.Argument(help="Folder in Hugging Face layout, or a model on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Annotated[
        Path | None, typer.Option("--overrides", help="JSON file of what to use instead of what is found.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Show what a model is made of, as found by running it without its weights. Reads config.json alone."""
    from detent.report.structure import structure_json, structure_tree
    from detent.runs.structure import structure_of_folder

    name, found = structure_of_folder(model_dir, trust_remote_code=trust_remote_code, overrides=overrides)
    if as_json:
        sys.stdout.write(json.dumps(structure_json(name, found), indent=2) + "\n")
        return
    console.show(_tree(structure_tree(name, found)))


def _tree(branch: Any) -> Any:
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(escape(branch.text), highlight=False)
    for child in branch.branches:
        tree.add(_tree(child))
    return tree
