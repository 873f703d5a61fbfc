"""Processes for ranks, forked from one that has imported torch and the engine: a rank starts at once.

What is read from the environment at import (TRITON_INTERPRET, say) is that of the first rank's start. Where pytest runs
outside of the repository's folder nothing is imported beforehand, and ranks start slowly.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def context() -> ForkServerContext:
    """For pipes and shared memory between the ranks and a test."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.workers.engine_group"])
    return made


def start_rank(target: Callable[..., None], *args: Any) -> BaseProcess:
    """One that has the environment of now; it ends with the test's process."""
    process = context().Process(target=_run, args=(dict(os.environ), target, args), daemon=True)
    process.start()
    return process


def _run(environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
