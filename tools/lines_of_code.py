"""Lines of code of each room of the package: without docstrings, comments and blank lines.

python tools/lines_of_code.py [FOLDER]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "detent"
#: What the whole library may have: it is meant to be read.
BUDGET = 21_000

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """How many lines hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def by_room(package: Path = PACKAGE) -> Counter[str]:
    """{folder, or file outside folders: lines of code}."""
    rooms: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        rooms[path.relative_to(package).parts[0]] += lines_of_code(path.read_text(encoding="utf-8"))
    return rooms


if __name__ == "__main__":
    rooms = by_room(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    for room, lines in rooms.most_common():
        print(f"{lines:6,}  {room}")
    print(f"{sum(rooms.values()):6,}  together (budget: {BUDGET:,})")
