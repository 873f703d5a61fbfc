"""What the demo models read: the Python sources of the running interpreter's standard library, and their tests.

Whole modules are held out for measuring, and with them every test that is named after one of them. Knows nothing of
models or tokens.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Drawn, not chosen: every sixteenth of CPython 3.11's top-level modules in alphabetical order, from the first. The list
# is fixed here so that another version's library does not move it.
HELD_OUT_MODULES = (
    "__future__", "_threading_local", "cgi", "copyreg", "enum", "hmac", "logging", "pathlib", "pydoc", "smtpd",
    "sunau", "traceback", "xdrlib",
)  # fmt: skip

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "pydoc_data"})


@dataclass(slots=True)
class Corpus:
    """Documents by the part they play; each list in a fixed order."""

    sources: list[str] = field(default_factory=list)  # the library, without the held-out modules
    tests: list[str] = field(default_factory=list)  # the library's tests, without those of the held-out modules
    held_out: list[str] = field(default_factory=list)  # the held-out modules

    def trained(self) -> list[str]:
        """Everything that may be trained on."""
        return self.sources + self.tests


def _is_generated(path: Path) -> bool:
    """Tables that a script printed (character maps, the build's own settings): a megabyte that teaches no Python."""
    if path.name.startswith("_sysconfigdata"):
        return True
    return path.parent.name == "encodings" and "decoding_table" in path.read_text(encoding="utf-8", errors="replace")


def _tests_a_held_out_module(relative: Path) -> bool:
    """Whether a file or one of its folders is named after a held-out module: test_enum.py, test_logging/, pydoc_mod.py.

    A prefix is enough, so a few more fall out than must (test_enumerate.py).
    """
    stems = (part.removesuffix(".py").removeprefix("test_").strip("_") for part in relative.parts)
    held_out = tuple(name.strip("_") for name in HELD_OUT_MODULES)
    return any(stem.startswith(held_out) for stem in stems)


def _files() -> Iterator[tuple[Path, Path]]:
    """(path, path below the library's root) of every hand-written Python source, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and not _is_generated(path):
            yield path, relative


def read() -> Corpus:
    """The whole corpus."""
    corpus = Corpus()
    for path, relative in _files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if _TEST_FOLDERS.intersection(relative.parts):
            if not _tests_a_held_out_module(relative):
                corpus.tests.append(text)
        elif relative.parts[0].removesuffix(".py") in HELD_OUT_MODULES:
            corpus.held_out.append(text)
        else:
            corpus.sources.append(text)
    return corpus
