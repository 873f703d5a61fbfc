"""Errors of the engine.

EngineError
 +- ModelError          the model directory or its split cannot be served; one line that names the file or the field
 +- InvalidRequest      the request can never be served by this worker; placing it elsewhere would not help
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything that the engine refuses."""


class ModelError(EngineError):
    """The model cannot be served; the message names the path or the field."""


class InvalidRequest(EngineError):
    """The request cannot be served; the message names the field."""
