"""The errors of this package: one line that names the option, file or tensor."""

from __future__ import annotations


class CompressError(Exception):
    """What was asked for cannot be done as asked."""


class DiskError(CompressError):
    """The disk does not take what was made."""
