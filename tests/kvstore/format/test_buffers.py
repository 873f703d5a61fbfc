"""A buffer is used again only when no view of it is left."""

import ctypes

from kvstore.format.buffers import ALIGNMENT_BYTES, CopyBuffers


def test_a_buffer_in_use_is_never_handed_out_again() -> None:
    buffers = CopyBuffers(1000)
    first = buffers.take()[10:20]
    first[:] = b"0123456789"
    for _ in range(5):
        buffers.take()[:] = bytes(1000)
    assert first == b"0123456789"


def test_a_view_of_a_view_keeps_its_buffer() -> None:
    buffers = CopyBuffers(1000)
    view = buffers.take()
    inner = view[:500][100:200]
    inner[:] = bytes([7]) * 100
    del view
    for _ in range(5):
        buffers.take()[:] = bytes(1000)
    assert inner == bytes([7]) * 100


def test_a_released_buffer_is_used_again() -> None:
    buffers = CopyBuffers(1000)
    view = buffers.take()
    memory = view.obj
    del view
    assert buffers.take().obj is memory


def test_buffers_beyond_the_kept_ones_are_made_anew() -> None:
    buffers = CopyBuffers(1000, kept_bytes=6000)
    first, second = buffers.take(), buffers.take()
    assert first.obj is not second.obj
    first[:1], second[:1] = b"1", b"2"
    assert bytes(first[:1]) == b"1"


def test_every_view_begins_with_a_page() -> None:
    buffers = CopyBuffers(1000, kept_bytes=6000)
    views = [buffers.take() for _ in range(4)]
    for view in views:
        assert len(view) == 1000
        assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT_BYTES == 0
