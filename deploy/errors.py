"""Errors of the command line and of bringing a cluster up; each message is one line.

DeployError
 +- ConfigError     what was asked for cannot be done as asked: exit code 2, before anything is started
 +- StartError      something that was started, or should be reached, failed: exit code 1
"""

from __future__ import annotations


class DeployError(Exception):
    """Anything that ends the command with one line and an exit code."""

    exit_code = 1


class ConfigError(DeployError):
    """A wrong option, file, key or value; the message names it."""

    exit_code = 2


class StartError(DeployError):
    """The cluster could not be brought up."""


def one_line(error: BaseException | str) -> str:
    """The gist of an error: the last line that says something, as tracebacks end with their cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
