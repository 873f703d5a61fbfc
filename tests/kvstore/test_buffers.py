"""A buffer is used again only when nobody can see it any more."""

from kvstore.buffers import CopyBuffers


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
    buffers = CopyBuffers(1000, kept_bytes=1500)
    first, second = buffers.take(), buffers.take()
    assert first.obj is not second.obj
    first[:1], second[:1] = b"1", b"2"
    assert bytes(first[:1]) == b"1"
