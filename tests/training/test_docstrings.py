"""The corpus of the example adapter: only docstrings of functions change, and all of them have one form."""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path

import pytest

from training import corpus
from training.qlora.docstrings import Function, styled
from training.qlora.docstrings import corpus as styled_corpus

STDLIB = Path(sysconfig.get_paths()["stdlib"])
COMMITTED = Path(__file__).resolve().parents[2] / "training" / "data" / "docstrings"

BEFORE = '''\
class Store:
    # A comment.
    async def read_all(self, path, *parts, limit=None, key="name", **options):  # what is read
        # This comment stays.
        if not path:
            raise ValueError("no path")
        return path, parts

    def is_open(self) -> bool:
        """Whether it is open

        Much more text.
        """
        def inner(): return 1
        return True

    def each(self):
        "All of them, one by one"
        yield from ()

    def close(self): pass
'''

AFTER = '''\
class Store:
    # A comment.
    async def read_all(self, path, *parts, limit=None, key="name", **options):  # what is read
        """Read all.

        Args:
            path: The path.
            limit: The limit. Defaults to None.
            key: The key.
            *parts: The parts.
            **options: The options.

        Returns:
            The result.

        Raises:
            ValueError: If something is wrong.
        """
        # This comment stays.
        if not path:
            raise ValueError("no path")
        return path, parts

    def is_open(self) -> bool:
        """Whether it is open.

        Returns:
            True or False.
        """
        def inner(): return 1
        return True

    def each(self):
        """All of them, one by one.

        Yields:
            The next value.
        """
        yield from ()

    def close(self): pass
'''


def test_docstrings_are_made_from_the_code() -> None:
    assert styled(BEFORE) == AFTER


def test_what_has_the_form_keeps_it() -> None:
    assert styled(AFTER) == AFTER


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, Function) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_code_of_the_library_stays_as_it_is(every: int) -> None:
    """Modules at the top level, not only those of the corpus."""
    paths = sorted(STDLIB.glob("*.py"))[::every]
    assert len(paths) > 100 / every
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert _without_docstrings(styled(source)) == _without_docstrings(source), path.name


def test_the_parts_are_small_and_apart() -> None:
    train, held_out = styled_corpus(STDLIB)
    assert set(held_out) <= set(corpus.HELD_OUT_MODULES)
    assert not set(train) & set(corpus.HELD_OUT_MODULES)
    assert sum(len(text.encode()) for part in (train, held_out) for text in part.values()) < 200_000
    assert len(train) >= 10
    assert len(held_out) >= 2


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the committed texts are those of CPython 3.11.7")
def test_the_committed_texts_are_those_that_the_command_writes() -> None:
    for name, part in zip(("train", "held_out"), styled_corpus(STDLIB), strict=True):
        committed = {path.stem: path.read_text(encoding="utf-8") for path in (COMMITTED / name).glob("*.txt")}
        assert committed == part
