"""Runs a command that ends when its parent has ended: `die_with_parent.py PARENT_PID COMMAND ...`.

A script of its own, started without site packages: setting this between fork and exec is not safe in a process with
threads. Linux only; elsewhere the command is run as it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        # Survives exec. The kernel sends it when the *thread* that started us ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)  # it went before we asked
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
