"""What a file may not be, whatever its language: the check behind the commit hook, for files of version control.

    python tools/check_files.py FILE ...    names each fault; exit code 1 if there is one

- text ends with one newline and has no trailing spaces, no carriage returns and no conflict marks;
- nothing is larger than 512 KiB but the sample model.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LARGEST = 512 * 1024
LARGE = ("src/detent/data/sample_model/model.safetensors",)
_CONFLICT = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)


def faults(path: Path) -> list[str]:
    """What is wrong with one file, in words."""
    content = path.read_bytes()
    if path.as_posix().endswith(LARGE):
        return []
    found = [f"{len(content)} bytes, and {LARGEST} is the limit"] if len(content) > LARGEST else []
    if b"\0" in content[:8192]:
        return found
    if content and (not content.endswith(b"\n") or content.endswith(b"\n\n")):
        found.append("doesn't end with one newline")
    if b"\r" in content:
        found.append("has carriage returns")
    if match := re.search(rb"[ \t]+$", content, flags=re.MULTILINE):
        line = content.count(b"\n", 0, match.start()) + 1
        found.append(f"trailing spaces in line {line}")
    if _CONFLICT.search(content):
        found.append("has conflict marks")
    return found


def main() -> None:
    found = [(name, fault) for name in sys.argv[1:] for fault in faults(Path(name))]
    for name, fault in found:
        print(f"{name}: {fault}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
