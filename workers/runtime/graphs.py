"""Runs a pipeline stage from captured graphs, at a set of capture sizes: one launch instead of hundreds.

A batch of decodes is one graph. In a mixed batch everything between two attentions is a graph, and attention runs
eagerly between them, since its grid depends on the batch. A batch is padded to the next capture size; what pads it
writes no slot, attends to nothing and is cut off again. Large batches run eagerly: there the GPU is slower than Python.

On a CPU a "graph" is the same call made again, with its results copied to where the first ones lie, so that buffers,
padding and capture sizes are the same code there. Knows nothing of requests' lives.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import StepPlan
from workers.model.batch import Batch
from workers.model.layers.layer_cache import LayerCache
from workers.model.stage import Stage
from workers.runtime.batching import InputBuffers, Padding, PreparedBatch

MAX_PIECEWISE_TOKENS = 512  # a larger batch keeps the GPU busy for longer than it takes to launch
_SMALLEST_PIECEWISE = 8
_IDLE_CHUNK_TOKENS = 2

Call = Callable[[], tuple[Tensor, ...]]


def decode_capture_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, ... and max_num_seqs: padding costs little where a step reads all weights anyway."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_capture_sizes(max_num_tokens: int) -> list[int]:
    """Powers of two, and the largest mixed batch that is worth it."""
    most = min(MAX_PIECEWISE_TOKENS, max_num_tokens)
    sizes, size = [], _SMALLEST_PIECEWISE
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class Captured:
    """A call that can be made again: it reads the tensors that it read, and leaves its results in `outputs`."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class CudaCapture:
    """Records calls as CUDA graphs that share one pool of memory: their outputs stay, and no two replays overlap."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, call: Call) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()  # compiles kernels and sets up libraries, neither of which may happen during capture
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, transfers) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = call()
        return Captured(graph.replay, outputs)


def repeat_on_cpu(call: Call) -> Captured:
    """What a graph does, without one."""
    outputs = call()

    def replay() -> None:
        for kept, new in zip(outputs, call(), strict=True):
            kept.copy_(new)

    return Captured(replay, outputs)


class GraphedStage:
    """A stage's graphs. `capture` on all ranks at once, before anything runs."""

    def __init__(self, stage: Stage, kv_caches: list[LayerCache], inputs: InputBuffers) -> None:
        self._stage = stage
        self._kv_caches = kv_caches
        self._inputs = inputs
        self._decode_capture_sizes: list[int] = []
        self._token_capture_sizes: list[int] = []
        self._decodes: dict[int, Captured] = {}
        self._pieces: dict[int, list[Captured]] = {}  # of each layer up to its attention, then the rest
        self._attended = self._received = torch.empty(0)

    # -------------------------------------------------------------------------------------------------------- warm-up
    def capture(self, max_num_seqs: int, max_num_tokens: int, block_size: int, show_progress: bool) -> None:
        """Record all sizes, the largest first: the smaller ones fit into its memory."""
        self._decode_capture_sizes = decode_capture_sizes(max_num_seqs)
        self._token_capture_sizes = [size for size in token_capture_sizes(max_num_tokens) if size >= _IDLE_CHUNK_TOKENS]
        layer = self._stage.layers[0]
        device, dtype = self._stage.device, self._stage.dtype
        record = CudaCapture() if device.type == "cuda" else repeat_on_cpu
        most = max(self._decode_capture_sizes[-1], *self._token_capture_sizes, 1)
        self._attended = torch.zeros(most, layer.attended_width, dtype=dtype, device=device)
        self._received = torch.zeros(2 * most * self._stage.hidden_size, dtype=dtype, device=device)
        captures = [(True, size) for size in reversed(self._decode_capture_sizes)]
        captures += [(False, size) for size in reversed(self._token_capture_sizes)]
        bar = tqdm(captures, desc="capturing graphs", unit="graph", disable=None if show_progress else True)
        for is_decode, size in bar:
            padding = self._decode_padding(size) if is_decode else Padding(num_tokens=size)
            plan = self._idle_plan(1 if is_decode else _IDLE_CHUNK_TOKENS)
            self._inputs.apply(plan)
            batch = self._inputs.fill(plan, block_size, self._stage.batch_invariant, padding).batch
            if is_decode:
                self._decodes[size] = record(self._whole(batch, size))
            else:
                self._pieces[size] = list(self._record_pieces(record, batch, size))

    def _idle_plan(self, num_tokens: int) -> StepPlan:
        """A run of tokens that count as cached, so that nothing is written."""
        tables = [[0] for _ in self._inputs.state.block_tables]
        return direct_plan([DirectChunk([0] * num_tokens, 0, num_tokens, tables, int(num_tokens == 1))])

    def _whole(self, batch: Batch, size: int) -> Call:
        def call() -> tuple[Tensor, ...]:
            features: list[Tensor] = []
            anew = replace(batch)  # without plans: lengths are others in each replay
            return self._stage.forward(anew, self._kv_caches, self._received_rows(size), features), *features

        return call

    def _record_pieces(self, record: Callable[[Call], Captured], batch: Batch, size: int) -> Iterator[Captured]:
        """From one attention to the next; each piece reads what the one before it left. Features come last of each."""
        stage, attended = self._stage, self._attended[:size]

        def first() -> tuple[Tensor, ...]:
            hidden, residual = stage.enter(batch, self._received_rows(size))
            features = stage.features(stage.layer_range.start, hidden, residual)
            return *stage.layers[0].before_attention(hidden, residual, batch, self._kv_caches[0]), *features

        def between(index: int, residual: Tensor) -> Call:
            def call() -> tuple[Tensor, ...]:
                hidden, after = stage.layers[index - 1].after_attention(attended, residual)
                features = stage.features(stage.layer_range[index], hidden, after)
                return *stage.layers[index].before_attention(hidden, after, batch, self._kv_caches[index]), *features

            return call

        piece = record(first)
        yield piece
        for index in range(1, len(stage.layers)):
            piece = record(between(index, piece.outputs[1]))
            yield piece
        residual = piece.outputs[1]

        def last() -> tuple[Tensor, ...]:
            hidden, after = stage.layers[-1].after_attention(attended, residual)
            return hidden, after, *stage.features(stage.layer_range.stop, hidden, after)

        yield record(last)

    # ------------------------------------------------------------------------------------------------------- one step
    def padding_for(self, plan: StepPlan) -> Padding | None:
        """The capture size that a step's batch is padded to; None: it is too large for a graph."""
        num_tokens = int(plan.num_tokens.sum())
        if num_tokens == plan.num_requests:
            size = _next_size(self._decode_capture_sizes, num_tokens)
            return None if size is None else self._decode_padding(size)
        size = _next_size(self._token_capture_sizes, num_tokens)
        return None if size is None else Padding(num_tokens=size)

    def run(self, prepared: PreparedBatch, received: Tensor | None, features: list[Tensor]) -> Tensor:
        """As Stage.forward, on a batch that was filled up as padding_for said. The next run overwrites the features."""
        batch = prepared.batch
        size = len(batch.token_ids)
        rows = self._received_rows(size)
        if received is not None and rows is not None:
            rows.copy_(received)
        if len(batch.seq_lens) == size:
            decode = self._decodes[size]
            decode.replay()
            features += decode.outputs[1:]
            return decode.outputs[0]
        *pieces, last = self._pieces[size]
        n = prepared.num_tokens
        for layer, kv_cache, piece in zip(self._stage.layers, self._kv_caches, pieces, strict=True):
            piece.replay()
            self._attended[:n].copy_(layer.attention(piece.outputs[0][:n], batch, kv_cache))
            self._stage.on_layer()
            features += piece.outputs[2:]
        last.replay()
        hidden, residual, *after = last.outputs
        features += after
        return self._stage.leave(hidden, residual, batch)

    def _decode_padding(self, size: int) -> Padding:
        return Padding(size, size, self._inputs.max_blocks)

    def _received_rows(self, size: int) -> Tensor | None:
        """The input buffer of a stage after the first."""
        if self._stage.is_first:
            return None
        hidden = self._stage.hidden_size
        return self._received[: 2 * size * hidden].view(2, size, hidden)


def _next_size(capture_sizes: Sequence[int], size: int) -> int | None:
    index = bisect_left(capture_sizes, size)
    return capture_sizes[index] if index < len(capture_sizes) else None
