"""The error of this package."""


class CheckpointError(Exception):
    """The model directory cannot be served; one line that names the file and the key or tensor."""
