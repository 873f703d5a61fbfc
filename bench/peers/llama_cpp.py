"""llama.cpp by the package xllamacpp: its server's own scheduler, in this process. Reads a GGUF that we have written.

Its stream has texts and no ids, so ids are counted and not compared.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.peers.peer_side import PeerOptions, serve
from bench.peers.workload import CONTEXT_TOKENS, Call, Completion


class LlamaCppPeer:
    """One slot for each request, continuous batching, prompts cached."""

    def __init__(self, options: PeerOptions) -> None:
        import xllamacpp

        found = sorted(Path(options.work_dir).glob("*.gguf"))
        if not found:
            sys.exit(f"no .gguf in {options.work_dir}: write one with `switchyard quantize --format gguf`")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(found[0])
        parameters.n_parallel = options.max_num_seqs
        parameters.n_ctx = options.max_num_seqs * CONTEXT_TOKENS
        for threads in (parameters.cpuparams, parameters.cpuparams_batch):
            threads.n_threads = options.num_threads
        self._server = xllamacpp.Server(parameters)
        self.about = {"version": metadata.version("xllamacpp"), "dtype": found[0].stem}

    def run(self, call: Call) -> Sequence[Completion]:
        """As in Peer."""
        began_s = time.perf_counter()
        found: list[Completion] = [Completion(0.0, 0.0, []) for _ in call.prompts]

        def one(index: int) -> None:
            times: list[float] = []
            count = 0

            def note(message: dict[str, Any]) -> bool:
                nonlocal count
                times.append(time.perf_counter() - began_s)
                count = message.get("usage", {}).get("completion_tokens", count)
                return False

            self._server.handle_completions(
                {
                    "prompt": list(call.prompts[index]),
                    "n_predict": call.max_tokens,
                    "stream": True,
                    "temperature": 0,
                    "ignore_eos": True,
                },
                note,
            )
            # The first message may have no text yet: parts of a character are held back.
            found[index] = Completion(times[0], times[-1], [0] * count)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(call.prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


if __name__ == "__main__":
    serve(LlamaCppPeer)
