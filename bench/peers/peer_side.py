"""The part of a peer's process that all peers share: calls come as JSON lines on stdin, answers go to stdout.

Runs in the peer's own interpreter, which has nothing of this project installed: the standard library only.
Times are taken here, beside the engine, so that the pipes to this process are in no figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TextIO

from bench.peers.workload import Call, Completion

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What a peer is started with."""

    model_dir: str
    work_dir: str  # for what the peer makes of the model; kept from run to run
    dtype: str  # bfloat16 or float32
    num_threads: int
    max_num_seqs: int
    precision: str = ""  # of weights, which the peer rounds by itself: int8 or int4; "": they stay as they are


class Peer(Protocol):
    """An engine that is loaded."""

    about: dict[str, str]  # its version, and what it was set to

    def run(self, call: Call) -> Sequence[Completion]:
        """All prompts of the call at once, greedy, past the end of text; in their order."""
        ...


def _own_stdout() -> TextIO:
    """The pipe to the parent. Whatever a library prints goes to stderr from here on."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def _die_with_parent() -> None:
    """A peer is stopped most of the time, and could not see that its stdin has ended. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(load: Callable[[PeerOptions], Peer]) -> None:
    """Load the engine that the command line asks for, then answer calls until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("options", help="PeerOptions as JSON")
    options = PeerOptions(**json.loads(parser.parse_args().options))
    _die_with_parent()
    out = _own_stdout()

    def say(message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    peer = load(options)
    say(peer.about)
    for line in sys.stdin:
        say([asdict(completion) for completion in peer.run(Call(**json.loads(line)))])
    os._exit(0)  # threads of an engine may go on for ever
