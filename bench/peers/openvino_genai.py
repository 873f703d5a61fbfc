"""OpenVINO GenAI's continuous batching. Runs in an interpreter that has openvino-genai and optimum-intel.

The model is exported once, into the work folder, and the export is used again by later runs.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.peer_side import PeerOptions, serve
from bench.peers.workload import Call, Completion

_CACHE_GB = 2
_MAX_BATCHED_TOKENS = 2048
_PRECISION = {"bfloat16": "bf16", "float32": "f32"}


def _export(options: PeerOptions) -> Path:
    done = Path(options.work_dir) / "exported"
    if not done.exists():
        partial = Path(options.work_dir) / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        weights = options.precision or "fp16"
        command += ["--model", options.model_dir, "--task", "text-generation-with-past", "--weight-format", weights]
        if code := subprocess.run([*command, str(partial)], stdin=subprocess.DEVNULL).returncode:
            sys.exit(code)  # its last line on stderr says why
        partial.rename(done)
    return done


class OpenvinoPeer:
    """The pipeline with prefix caching and chunked prefill."""

    def __init__(self, options: PeerOptions) -> None:
        import openvino_genai

        exported = _export(options)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = _MAX_BATCHED_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        precision = _PRECISION[options.dtype]
        device = {"INFERENCE_NUM_THREADS": options.num_threads, "INFERENCE_PRECISION_HINT": precision}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(exported), scheduler, "CPU", device)
        self._numbers = itertools.count()
        self.about = {
            "version": openvino_genai.__version__,
            "dtype": f"{options.precision or 'fp16'} weights, {precision} arithmetic",
        }

    def run(self, call: Call) -> Sequence[Completion]:
        """As in Peer."""
        import numpy
        import openvino
        import openvino_genai

        generation = openvino_genai.GenerationConfig(max_new_tokens=call.max_tokens, ignore_eos=True, do_sample=False)
        handles: list[Any] = []
        tokens: list[list[int]] = [[] for _ in call.prompts]
        first_s, end_s = [0.0] * len(tokens), [0.0] * len(tokens)
        began_s = time.perf_counter()
        for prompt in call.prompts:
            ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(self._pipeline.add_request(next(self._numbers), ids, generation))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now_s = time.perf_counter() - began_s
            for i, handle in enumerate(handles):
                while handle.can_read():
                    new_ids = [token for output in handle.read().values() for token in output.generated_ids]
                    if new_ids:
                        first_s[i] = first_s[i] or now_s
                        end_s[i] = now_s
                        tokens[i].extend(new_ids)
        return [Completion(*one) for one in zip(first_s, end_s, tokens, strict=True)]


if __name__ == "__main__":
    serve(OpenvinoPeer)
