"""An adapter's directory: where it may be, and what is in it. Blocking; meant for a thread.

Knows nothing of names that clients use, or of routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint.adapters.config import CONFIG_NAME
from checkpoint.adapters.directory import TENSORS_NAME, Adapter, read_adapter
from checkpoint.errors import CheckpointError
from router.adapters.targets import AdapterTarget, check_fits
from router.errors import AdapterRefused, PathForbidden


def below(root: str, path: str, param: str) -> Path:
    """The directory of a path, relative to the root or absolute, without links. Raises PathForbidden, AdapterRefused.

    A path that leads out of the root is refused alike whether something is there or not, and so is a file of the
    adapter that is a link to the outside.
    """
    if not path or "\0" in path:
        raise AdapterRefused(f"{param}: must be the path of a directory, not {path[:100]!r}", param=param)
    try:
        home = Path(root).resolve()
        directory = (home / path).resolve()
        for found in (directory, *((directory / name).resolve() for name in (CONFIG_NAME, TENSORS_NAME))):
            if not found.is_relative_to(home):
                raise PathForbidden(f"{param}: {path} leads out of {root} (adapters.root)", param=param)
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise AdapterRefused(
            f"{param}: {path[:100]}: {getattr(error, 'strerror', None) or error}", param=param
        ) from None
    if directory == home:
        raise PathForbidden(f"{param}: {path} is adapters.root itself, not a directory below it", param=param)
    return directory


def read_fitting(directory: Path, targets: Sequence[AdapterTarget], max_rank: int, param: str) -> Adapter:
    """The adapter in a directory, if the model can be served with it. Raises AdapterRefused."""
    try:
        _refuse_pipes(directory)
        adapter = read_adapter(directory)
        check_fits(adapter, targets, max_rank)
    except CheckpointError as error:
        raise AdapterRefused(f"{param}: {error}", param=param) from None
    return adapter


def _refuse_pipes(directory: Path) -> None:
    """To open one would wait for somebody who writes. Raises CheckpointError."""
    for path in (directory / CONFIG_NAME, directory / TENSORS_NAME):
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path}: not a regular file")
        except OSError as error:  # such as a name that is too long
            raise CheckpointError(f"{str(path)[:100]}: {error.strerror}") from None
