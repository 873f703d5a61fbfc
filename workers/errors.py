"""Errors of the engine.

EngineError
 +- ModelError          the model directory or its split cannot be served; one line that names the file or the field
 +- InvalidRequest      the request can never be served by this worker; placing it elsewhere would not help
 +- AdapterError        an adapter cannot be served; one line that names its path
 +- StepFailed          steps raise, or a step raised on another rank; the message names the rank
 +- RankLost            a rank died or hangs, and the worker with it; the message names the rank
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything that the engine refuses."""


class ModelError(EngineError):
    """The model cannot be served; the message names the path or the field."""


class InvalidRequest(EngineError):
    """The request cannot be served; the message names the field."""


class AdapterError(EngineError):
    """An adapter cannot be served; the message names the path, and the module or field."""

    def __init__(self, message: str, is_unfit: bool = False) -> None:
        """is_unfit: no worker of this model can serve it."""
        super().__init__(message)
        self.is_unfit = is_unfit


class StepFailed(EngineError):
    """A step raised; the message says where and why."""


class RankLost(EngineError):
    """A rank of the worker died or hangs; the message names it."""


def rank_name(rank: int, tp: int, pp: int) -> str:
    """What messages call a rank of a worker."""
    return f"rank {rank} of {tp * pp} (tp_rank {rank % tp}, pp_stage {rank // tp})"
