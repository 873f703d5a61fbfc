"""What the demo models read: the Python sources of the running interpreter's standard library.

Whole modules are held out for measuring; no test of any module is in the corpus, so the tests of the held-out
modules are not trained on. Knows nothing of models or tokens.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Ordinary, hand-written modules of every kind (data structures, text, parsing, numbers, network, tools); a name is a
# module `name.py` or a whole package `name/`.
HELD_OUT_MODULES = (
    "bisect", "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "graphlib", "heapq", "html",
    "ipaddress", "json", "queue", "sched", "shlex", "statistics", "string", "textwrap", "wsgiref", "zipapp",
)  # fmt: skip

_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "turtledemo"})


def _is_generated_table(path: Path) -> bool:
    """Character-map tables under encodings/ are printed by a script: a megabyte of numbers teaches no Python."""
    return path.parent.name == "encodings" and "decoding_table" in path.read_text(encoding="utf-8", errors="replace")


def modules() -> list[tuple[str, Path]]:
    """(top-level module name, file) for every source file of the corpus, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or _is_generated_table(path):
            continue
        found.append((relative.parts[0].removesuffix(".py"), path))
    return found


def texts(held_out: bool) -> list[str]:
    """The sources of the held-out modules, or of all the others."""
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for name, path in modules()
        if (name in HELD_OUT_MODULES) == held_out
    ]
