"""A GGUF's header: what is read, and that whatever is wrong with a file is one line that names it."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError
from checkpoint.gguf.block_types import BLOCK_TYPES, REMOVED_TYPES
from checkpoint.gguf.container import read_header
from checkpoint.gguf.directory import open_gguf
from checkpoint.gguf.weights import GgufWeights
from tests.checkpoint.gguf.gguf_files import demo_tokenizer, quantised, stored_tensors, weights_of, write_gguf

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a vocabulary of 300, in several types."""
    texts = demo_tokenizer()
    tokens = texts["ggml.tokens"][:300]
    known = set(tokens)
    merges = [merge for merge in texts["ggml.merges"] if set(merge.split(" ")) | {merge.replace(" ", "")} <= known]
    texts |= {"ggml.tokens": tokens, "ggml.merges": merges, "ggml.token_type": texts["ggml.token_type"][:300]}
    tensors = quantised(stored_tensors("llama", weights_of("llama", 300)), [Q.Q4_0, Q.Q8_0, Q.F16])
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", "llama", tensors, tokenizer=texts)


def test_a_header_is_what_another_reader_reads(small: Path) -> None:
    header, reader = read_header(small), gguf.GGUFReader(small)
    known = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == known
    theirs = [
        (t.name, t.tensor_type.name, [int(n) for n in t.shape][::-1], t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert [(t.name, t.kind.name, list(t.shape), t.offset, t.num_bytes) for t in header.tensors] == theirs


def test_all_types_are_known() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind is not Q.Q8_1:  # of which gguf says 40 bytes, and ggml itself 36
            assert (BLOCK_TYPES[kind].name, BLOCK_TYPES[kind].block_size, BLOCK_TYPES[kind].block_bytes) == (
                kind.name,
                *sizes,
            )
    assert not REMOVED_TYPES.keys() & BLOCK_TYPES.keys()


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {
        "uint8": 200, "int8": -5, "uint16": 60000, "int16": -30000, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**63, "int64": -(2**63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "é",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    lists = {"x.ints": [1, -2], "x.floats": [0.5], "x.texts": ["a", ""], "x.flags": [True, False]}
    for key, value in lists.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = read_header(tmp_path / "x.gguf").metadata
    assert {key.removeprefix("x."): read[key] for key in read if key.removeprefix("x.") in values} == values
    assert {key: read[key] for key in lists} == lists


def _entry(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    text = name.encode()
    numbers = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return struct.pack("<Q", len(text)) + text + numbers


def _file(*tensors: bytes, metadata: bytes = b"", num_entries: int = 0, data_bytes: int = 256) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), num_entries) + metadata + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data_bytes)


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


_HUGE = struct.pack("<Q", 2**63)
_WRONG = {
    "nothing": (b"", "it is empty"),
    "another format": (b"\x80\x04pickle" * 9, "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not 2 or 3"),
    "ends in the header": (b"GGUF\3\0\0\0\0\0", "ends within the number of tensors"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "the number of tensors is 1152921504606846976"),
    "too many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "the number of metadata entries is"),
    "a long key": (_file(metadata=_HUGE + bytes(20), num_entries=1), "the length of the key of metadata entry 0"),
    "a key twice": (_file(metadata=_pair("k", 0, b"\1") * 2, num_entries=2), "k is given twice"),
    "an unknown value": (_file(metadata=_pair("k", 99, b"\1" * 8), num_entries=1), "k has the unknown type 99"),
    "a long text": (_file(metadata=_pair("k", 8, _HUGE), num_entries=1), "the length of k is 9223372036854775808"),
    "a long list": (
        _file(metadata=_pair("k", 9, struct.pack("<I", 10) + _HUGE), num_entries=1),
        "the length of k is 9223372036854775808",
    ),
    "a list of lists": (
        _file(metadata=_pair("k", 9, struct.pack("<IQ", 9, 1)), num_entries=1),
        "k has the unknown type 9",
    ),
    "a flag of 2": (_file(metadata=_pair("k", 7, b"\2"), num_entries=1), "k is 2 and should be true or false"),
    "no UTF-8": (
        _file(metadata=_pair("k", 8, struct.pack("<Q", 1) + b"\xff"), num_entries=1),
        "k is not UTF-8",
    ),
    "an odd alignment": (
        _file(metadata=_pair("general.alignment", 4, struct.pack("<I", 24)), num_entries=1),
        "general.alignment is '24'",
    ),
    "no dimensions": (_file(_entry("x", [], 0, 0)), "x has 0 dimensions"),
    "many dimensions": (_file(_entry("x", [1] * 9, 0, 0)), "x has 9 dimensions"),
    "a dimension of 0": (_file(_entry("x", [4, 0], 0, 0)), "x is [0, 4]"),
    "half a block": (_file(_entry("x", [33], 2, 0)), "x is [33], which Q4_0 in blocks of 32 cannot be"),
    "an unknown type": (_file(_entry("x", [4], 77, 0)), "the type of x is 77, which is unknown"),
    "a removed type": (_file(_entry("x", [4], 31, 0)), "the type of x is Q4_0_4_4, which llama.cpp has removed"),
    "an odd offset": (_file(_entry("x", [4], 0, 8)), "the offset of x, 8, is no multiple of the alignment, 32"),
    "an offset behind the end": (_file(_entry("x", [4], 0, 2**40)), "ends within x, or that tensor's offset is wrong"),
    "a huge tensor": (_file(_entry("x", [2**62, 2**62], 0, 0)), "ends within x"),
    "the same offset": (_file(_entry("x", [4], 0, 0), _entry("y", [4], 0, 0)), "x and y overlap"),
    "a name twice": (_file(_entry("x", [4], 0, 0), _entry("x", [4], 0, 32)), "x is given twice"),
    "a name of control characters": (_file(_entry("x\n\x1b[2J", [4], 0, 0)), "the name of tensor 0 is"),
}  # fmt: skip


@pytest.mark.parametrize("what", _WRONG)
def test_what_is_wrong_is_named(what: str, tmp_path: Path) -> None:
    content, complaint = _WRONG[what]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ")
    assert complaint in said
    assert "\n" not in said


def test_a_file_may_end_anywhere(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    data = read_header(small).tensors[0].offset
    path = tmp_path / "cut.gguf"
    for length in (*range(0, data, 97), *range(data, len(content), 4999), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            read_header(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_make_the_reader_fail_otherwise(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bits that flip, numbers that lie, ends that are missing: an error of one line, or a model that can be read."""
    content = bytearray(small.read_bytes())
    header_bytes = read_header(small).tensors[0].offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_bytes - 8))
        lie = data.draw(st.sampled_from([1, 4, 8]))
        content[at : at + lie] = data.draw(st.binary(min_size=lie, max_size=lie) | st.just(b"\xff" * lie))
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content[:end])
    said = _read_whole(path)
    assert not said or said.startswith(f"{path}: ")
    assert "\n" not in said


def _read_whole(path: Path) -> str:
    """What is wrong with a file; "" where nothing is."""
    try:
        weights = GgufWeights(path)
        for name in weights.tensors:
            weights.read(name)
        open_gguf(path)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """Nothing is allocated by a length that the file has no bytes for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content, _ in _WRONG.values():
        (tmp_path / "wrong.gguf").write_bytes(content)
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "wrong.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_parts_are_what_the_whole_is(small: Path) -> None:
    weights = GgufWeights(small)
    for name, tensor in weights.tensors.items():
        whole = weights.read(name)
        assert whole.shape == tensor.shape
        part = tuple(slice(size // 4, size // 2 + 1) for size in tensor.shape)
        np.testing.assert_array_equal(weights.read(name, part), whole[part])
        np.testing.assert_array_equal(weights.read(name, part[:1]), whole[part[:1]])
