"""Whether an engine's layers are to be compiled, and where libraries are kept.

Without torch: the command line asks, too.
"""

from __future__ import annotations

from pathlib import Path

import platformdirs

from workers.config import EngineConfig

_LEAST_HIDDEN_SIZE = 256  # of a model that is compiled without being asked: smaller ones have little to gain


def wants_compiled(config: EngineConfig, hidden_size: int) -> bool:
    """On a CPU, where its layers have a compiled form."""
    if config.runner == "fake" or config.cuda_graphs or config.tp > 1 or config.batch_invariant or config.enable_lora:
        return False
    return hidden_size >= _LEAST_HIDDEN_SIZE if config.compile is None else config.compile


def library_folder() -> Path:
    """Of this user. Raises OSError or RuntimeError where there is no home."""
    folder = platformdirs.user_cache_path("switchyard", appauthor=False) / "compiled"
    if not folder.is_absolute():
        raise RuntimeError("the user has no home")
    return folder


def has_libraries() -> bool:
    """Whether anything was compiled for this user before."""
    try:
        return any(library_folder().glob("*.so"))
    except (OSError, RuntimeError):
        return False
