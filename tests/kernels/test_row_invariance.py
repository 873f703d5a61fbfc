"""A row's bits do not depend on the rows around it: same row, other batch, equal bits."""

import pytest
import torch

from kernels.harness import OPS

OPERATIONS = {op.name: op for op in OPS}
HIDDEN, ROWS = 1024, 33
BATCHES = (1, 2, 7, 16, 33)


def rows(width, dtype, seed=0):
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls(dtype):
    """Operation name and a function of the rows that are in the batch."""
    x, y, weight = rows(HIDDEN, dtype), rows(HIDDEN, dtype, 1), rows(HIDDEN, dtype, 2)[0]
    yield "rms_norm", lambda batch: (x[batch], weight, 1e-5)
    yield "add_rms_norm", lambda batch: (x[batch], y[batch], weight, 1e-5)
    yield "swiglu", lambda batch: (x[batch],)
    temperature, top_k = torch.linspace(0, 2, ROWS), torch.arange(ROWS) % 3 * 20
    top_p, min_p = 1 - torch.arange(ROWS) % 2 * 0.2, torch.arange(ROWS) % 5 * 0.01
    seeds, positions = torch.arange(ROWS) * 77, torch.arange(ROWS) % 4
    columns = (3 * x, temperature, top_k, top_p, min_p, seeds, positions)
    yield "sample", lambda batch: (*(column[batch] for column in columns), 0)
    yield "vocab_argmax", lambda batch: (x[batch], 0)
    for scheme in ("fp8", "fp8 groups", "int8"):
        yield "rms_norm_quantised", lambda batch, scheme=scheme: (x[batch], weight, 1e-5, scheme)
        yield "add_rms_norm_quantised", lambda batch, scheme=scheme: (x[batch], y[batch], weight, 1e-5, scheme)
        yield "swiglu_quantised", lambda batch, scheme=scheme: (x[batch], scheme)


def results(name, arguments):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    out = OPERATIONS[name](*moved)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_alone_is_the_row_in_a_batch(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, arguments in calls(dtype):
            whole = results(name, arguments(slice(0, ROWS)))
            for size in BATCHES:
                first = ROWS - size
                part = results(name, arguments(slice(first, ROWS)))
                for out, want in zip(part, whole, strict=True):
                    assert torch.equal(out.view(torch.uint8), want[first:].view(torch.uint8)), (name, size)
    finally:
        torch.set_num_threads(before)
