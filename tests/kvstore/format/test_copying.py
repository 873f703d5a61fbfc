"""Copies that are hashed on the way: the right bytes, xxhash's digest, and one look at every byte."""

import random
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from kvstore.format import _copying, copying
from kvstore.format.copying import Bytes

KEY = bytes(range(22))
LENGTHS = [1, 63, 64, 218, 219, 220, 256, 1002, 1003, 1024, 1026, 2026, 4096, 65536, 262144, 262151]

CopyDigest = Callable[[Bytes, Bytes, bytes], int]


def copy_digest(target: Bytes, source: Bytes, suffix: bytes, past_caches: bool = False) -> int:
    (digest,) = copying.copy_digests([target], [source], [suffix], past_caches)
    return digest


@pytest.fixture(params=["compiled", "past caches", "portable", "numpy"])
def in_use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CopyDigest:
    """Each of the ways in which a processor or an installation may do it."""
    if request.param == "portable":
        monkeypatch.setattr(copying, "_copying", _Portable)
    elif request.param == "numpy":
        monkeypatch.setattr(copying, "_copying", None)
    assert copying.is_compiled() is (request.param != "numpy")
    return partial(copy_digest, past_caches=request.param == "past caches")


class _Portable:
    copy_digests = staticmethod(_copying.copy_digests_portably)


def randoms(*shape: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(random.randbytes(int(np.prod(shape))), np.uint8).reshape(shape).copy()


@pytest.mark.parametrize("length", [*LENGTHS, *random.Random(0).sample(range(219, 9000), 40)])
def test_the_digest_is_that_of_payload_and_key(in_use: CopyDigest, length: int) -> None:
    source, target = randoms(length), bytearray(length)
    assert in_use(memoryview(target), source, KEY) == xxhash.xxh3_64_intdigest(source.tobytes() + KEY)
    assert target == source.tobytes()


@pytest.mark.parametrize("offset", [0, 1, 16, 32, 63])
def test_nothing_beside_a_target_is_written_wherever_lines_of_the_caches_begin(in_use: CopyDigest, offset: int) -> None:
    source, around = randoms(5000), randoms(6000)
    start = -around.ctypes.data % 64 + offset
    expected = around.copy()
    expected[start : start + 5000] = source
    assert in_use(around[start : start + 5000], source, KEY) == xxhash.xxh3_64_intdigest(source.tobytes() + KEY)
    assert (around == expected).all()


@pytest.mark.parametrize("suffix_bytes", [0, 1, 63, 64])
def test_suffixes_of_other_lengths(in_use: CopyDigest, suffix_bytes: int) -> None:
    source, suffix = randoms(3000), random.randbytes(suffix_bytes)
    assert in_use(bytearray(3000), source, suffix) == xxhash.xxh3_64_intdigest(source.tobytes() + suffix)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "slots", "row_bytes"), [(32, 16, 256), (4, 1, 32), (3, 5, 20), (1, 16, 64), (7, 3, 1)]
)
def test_a_part_of_a_cache_is_gathered_and_scattered(
    in_use: CopyDigest, layers: int, slots: int, row_bytes: int
) -> None:
    cache, other = randoms(layers, 5, 3, 2, 16, row_bytes), randoms(layers, 5, 3, 2, 16, row_bytes)
    source_part, target_part = cache[:, 2, 1, :, :slots], other[:, 4, 0, :, :slots]
    expected = other.copy()
    expected[:, 4, 0, :, :slots] = source_part
    flat = memoryview(bytearray(source_part.nbytes))
    digest = xxhash.xxh3_64_intdigest(source_part.tobytes() + KEY)
    assert in_use(flat, memoryview(source_part), KEY) == digest
    assert flat.tobytes() == source_part.tobytes()
    assert in_use(target_part, flat, KEY) == digest
    assert (other == expected).all()  # bytes around the target part are unchanged
    assert in_use(other[:, 0, 0, :, :slots], source_part, KEY) == digest


def test_a_target_of_other_elements_than_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="single bytes"):
        copying.copy(np.zeros((4, 4), np.int16)[:, ::2], randoms(16))  # type: ignore[arg-type]
    signed = np.zeros((4, 8), np.int8)[:, ::2]
    copying.copy(signed, np.ones(16, np.uint8))  # type: ignore[arg-type]
    assert (signed == 1).all()


@pytest.mark.parametrize("num_bytes", [100, 4000])
def test_other_sizes_are_refused(in_use: CopyDigest, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=r".+"):
        in_use(memoryview(bytearray(num_bytes)), randoms(num_bytes + 1), KEY)


def test_what_is_hashed_is_what_was_copied_whoever_writes_meanwhile(in_use: CopyDigest) -> None:
    """A page of an arena is written by another process while it is read: copy and digest must be of one moment."""
    source, target = np.zeros(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
    has_ended = threading.Event()

    def scribble() -> None:
        value = 0
        while not has_ended.is_set():
            value = (value + 1) % 256
            source[:] = value

    writer = threading.Thread(target=scribble)
    writer.start()
    num_mixed = 0
    try:
        for _ in range(20_000):
            digest = in_use(target, source, KEY)
            assert digest == xxhash.xxh3_64_intdigest(target.tobytes() + KEY)
            num_mixed += len(np.unique(target)) > 1
            if num_mixed == 20:
                break
    finally:
        has_ended.set()
        writer.join()
    assert num_mixed == 20, "too little was written while it was copied"


def test_many_at_once(in_use: CopyDigest) -> None:
    sources = [randoms(300 + 77 * i) for i in range(20)]
    targets = [memoryview(bytearray(source.nbytes)) for source in sources]
    keys = [random.randbytes(22) for _ in sources]
    digests = copying.copy_digests([*targets], [*sources], keys)
    assert [target.tobytes() for target in targets] == [source.tobytes() for source in sources]
    assert digests == [xxhash.xxh3_64_intdigest(s.tobytes() + k) for k, s in zip(keys, sources, strict=True)]
    assert copying.copy_digests([], [], []) == []


def test_the_compiled_module_refuses_what_it_cannot_do() -> None:
    target, source = bytearray(300), bytes(300)
    with pytest.raises(TypeError):
        _copying.copy_digests([target], [source])  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _copying.copy_digests([target], [source], (KEY,), False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many"):
        _copying.copy_digests([target], [source], [], False)
    with pytest.raises(ValueError, match="300 bytes do not go into 299"):
        _copying.copy_digests([target, bytearray(299)], [source, source], [KEY, KEY], False)
    with pytest.raises(ValueError, match="too few in all"):
        _copying.copy_digests([bytearray(200)], [bytes(200)], [KEY], False)
    with pytest.raises(ValueError, match="too long a suffix"):
        _copying.copy_digests([target], [source], [bytes(65)], False)
    with pytest.raises(ValueError, match="dimensions"):
        _copying.copy_digests([target], [np.zeros((1,) * 8 + (300,), np.uint8)], [KEY], False)
    with pytest.raises((BufferError, TypeError)):
        _copying.copy_digests([source], [source], [KEY], False)
    target.append(0)  # no buffer is held any more
