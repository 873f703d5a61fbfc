"""A peer without an engine, run as a peer is: its tokens are the prompt's length, or it fails as its options say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bench.peers.peer_side import PeerOptions, serve
from bench.peers.workload import Call, Completion


class FakePeer:
    """Dies or answers wrongly when it is asked for the call that work_dir names by its number of new tokens."""

    def __init__(self, options: PeerOptions) -> None:
        if options.model_dir == "missing":
            raise SystemExit("no such model")
        print("a library talks on stdout")
        self._options = options
        self.about = {"version": "1.0-fake", "dtype": options.dtype, "folder": os.getcwd(), "path": sys.path[0]}
        self.about["pid"] = str(os.getpid())

    def run(self, call: Call) -> Sequence[Completion]:
        if self._options.work_dir == f"dies at {call.max_tokens}":
            raise SystemExit("out of memory")
        num_tokens = call.max_tokens - (self._options.work_dir == f"short at {call.max_tokens}")
        print("and goes on talking")
        return [Completion(0.5, 1.5, [len(prompt)] * num_tokens) for prompt in call.prompts]


if __name__ == "__main__":
    serve(FakePeer)
