"""Continuous batching of Hugging Face transformers. Runs in an interpreter that has transformers and torch."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

from bench.peers.peer_side import PeerOptions, serve
from bench.peers.workload import Call, Completion

_CACHE_PAGES, _MAX_BATCHED_TOKENS = 64, 2048  # pages have 256 tokens by default
_SILENCE_S = 300.0


class TransformersPeer:
    """The manager of continuous batching with shared prefixes; never stopped, for the process ends with it."""

    def __init__(self, options: PeerOptions) -> None:
        if options.precision:
            sys.exit("measured with weights in 16 bits only")
        import torch
        import transformers

        torch.set_num_threads(options.num_threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model_dir, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        ).eval()
        batching = transformers.ContinuousBatchingConfig(
            num_blocks=_CACHE_PAGES,
            max_batch_tokens=_MAX_BATCHED_TOKENS,
            allow_block_sharing=True,
        )
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()
        self._names = itertools.count()
        self.about = {"version": transformers.__version__, "dtype": options.dtype}

    def run(self, call: Call) -> Sequence[Completion]:
        """As in Peer."""
        names = [f"request-{next(self._names)}" for _ in call.prompts]
        first_s: dict[str, float] = {}
        done: dict[str, Completion] = {}
        began_s = time.perf_counter()
        for name, prompt in zip(names, call.prompts, strict=True):
            self._manager.add_request(
                list(prompt), request_id=name, max_new_tokens=call.max_tokens, streaming=True, eos_token_id=-1
            )
        while len(done) < len(names):
            output = self._manager.get_result(timeout=_SILENCE_S)
            if output is None or output.error:
                raise RuntimeError(str(output.error) if output is not None else f"silent for {_SILENCE_S:.0f} s")
            now_s = time.perf_counter() - began_s
            if output.generated_tokens:
                first_s.setdefault(output.request_id, now_s)
            if output.is_finished():
                ids = list(output.generated_tokens)
                done[output.request_id] = Completion(first_s[output.request_id], now_s, ids)
        return [done[name] for name in names]


if __name__ == "__main__":
    serve(TransformersPeer)
