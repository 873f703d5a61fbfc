"""Every tensor of a checkpoint is used as it is, or refused by name; every byte of it counts in its digest."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import digest
from checkpoint.digest import file_digest
from checkpoint.errors import CheckpointError
from checkpoint.tensors import stored_tensors, weights_digest
from checkpoint.tokenizer_keys import check_tokenizer_files
from tests.processes import python_environment
from tests.workers.tiny_llama import SHAPES, make_checkpoint
from workers.errors import ModelError
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint, tensor_layout
from workers.parallel import ParallelGroups, Shard

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class _Noting(Checkpoint):
    """Notes what is read."""

    def read(self, name: str, shape: tuple[int, ...], *how: object) -> torch.Tensor:
        self.read_shapes = {**getattr(self, "read_shapes", {}), name: shape}
        return super().read(name, shape, *how)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_what_a_model_reads(shape: str, tmp_path: Path) -> None:
    directory = make_checkpoint(shape, tmp_path)
    model = load_config(directory)
    weights = _Noting(directory, torch.float32, CPU)
    build_stage(model, weights, ParallelGroups(Shard(), CPU))
    wanted = tensor_layout(model).wanted.items()
    assert weights.read_shapes == {name: tensor.shape for name, tensor in wanted if not tensor.is_optional}
    check_checkpoint(directory, model)


def _add(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)), None),
        (_add("model.layers.0.self_attn.q_proj.bias", torch.ones(32)), r"q_proj\.bias: nothing uses this tensor"),
        (_add(Q_PROJ + "_scale_inv", torch.ones(1, 1)), r"q_proj\.weight_scale_inv: nothing uses this tensor"),
        (
            _add(Q_PROJ, torch.zeros(32, 32).to(torch.float8_e4m3fn)),
            r"q_proj\.weight is F8_E4M3; by config\.json",
        ),
        (
            _add(Q_PROJ, torch.zeros(32, 32, dtype=torch.int8)),
            r"q_proj\.weight is I8; by config\.json",
        ),
        (_add(Q_PROJ, torch.zeros(32, 31)), r"q_proj\.weight is \[32, 31\], config\.json says \[32, 32\]"),
        (lambda tensors: tensors.pop(Q_PROJ), rf"no tensor {Q_PROJ}"),
    ],
)
def test_a_tensor_that_is_not_used_as_it_is_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], complaint: str | None, tmp_path: Path
) -> None:
    directory = make_checkpoint("gqa", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    model = load_config(directory)
    if complaint is None:
        check_checkpoint(directory, model)
        return
    with pytest.raises(ModelError, match=complaint):
        check_checkpoint(directory, model)


@pytest.mark.parametrize(
    ("value", "dtype", "is_refused"),
    [
        (float("nan"), torch.float32, True),
        (float("-inf"), torch.bfloat16, True),
        (1e5, torch.float16, True),
        (1e5, torch.bfloat16, False),
    ],
)
def test_a_weight_that_is_no_finite_number_is_refused(
    value: float, dtype: torch.dtype, is_refused: bool, tmp_path: Path
) -> None:
    directory = make_checkpoint("gqa", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[Q_PROJ][3, 5] = value
    save_file(tensors, directory / "model.safetensors")
    weights = Checkpoint(directory, dtype, CPU)
    if not is_refused:
        weights.read(Q_PROJ, (32, 32))
        return
    with pytest.raises(ModelError, match=rf"{Q_PROJ} holds values that are not finite numbers in {str(dtype)[6:]}"):
        weights.read(Q_PROJ, (32, 32))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint("gqa", tmp_path)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 16060556\n")

    def check() -> None:
        if name == "tokenizer.json":
            check_tokenizer_files(directory)
        check_checkpoint(directory, load_config(directory))

    with pytest.raises((CheckpointError, ModelError), match=rf"{name}: is a pointer of Git LFS and not the file"):
        check()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"b\.safetensors: x stands in a\.safetensors too"):
        stored_tensors(tmp_path)


def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./x\.safetensors' is not the name of a file beside it"):
        stored_tensors(tmp_path)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are remembered in this test; files are settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
    monkeypatch.setattr(digest, "_read_here", {})
    return tmp_path / "cache" / "switchyard" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read whole."""
    seen: list[Path] = []
    read = digest._read
    monkeypatch.setattr(digest, "_read", lambda path: (seen.append(path), read(path))[1])
    return seen


def test_any_byte_changed_in_place_gives_another_digest(tmp_path: Path, memory: Path) -> None:
    """Only 256 bytes of each file counted: a weight changed between two of them left the digest as it was."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(40 << 20))
    before, stat = weights_digest(tmp_path), path.stat()
    for offset in (0, 100_000, 20_000_001, (40 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x01")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync -t and tar leave it
        changed = weights_digest(tmp_path)
        assert changed != before, offset
        before = changed


def test_without_a_home_nothing_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 54321)  # as a container gives it, without an entry in passwd
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    assert file_digest(path) == file_digest(path)
    assert len(reads) == 2


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, memory: Path, reads: list[Path]) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    first = file_digest(path)
    assert [file_digest(path) for _ in range(3)] == [first] * 3
    assert len(reads) == 1
    other = tmp_path / "other"
    other.write_bytes(b"weightz")
    os.replace(other, path)
    assert file_digest(path) != first
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, memory: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock a second write would leave the same times."""
    monkeypatch.setattr(digest, "_SETTLED_S", 60.0)
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    assert file_digest(path) == file_digest(path)
    assert len(reads) == 2


def test_processes_of_a_host_read_a_file_once(tmp_path: Path, memory: Path, reads: list[Path]) -> None:
    path = tmp_path / "w"
    path.write_bytes(os.urandom(1 << 20))
    mine = file_digest(path)
    code = f"""
from pathlib import Path
from checkpoint import digest
digest._read = None  # a file that is not remembered would have to be read
print(digest.file_digest(Path({str(path)!r})))
"""
    environment = {**python_environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    theirs = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == mine


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"state": 1}'])
def test_a_broken_memory_is_no_memory(tmp_path: Path, memory: Path, broken: str) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    first = file_digest(path)
    (entry,) = memory.iterdir()
    entry.write_text(broken)
    assert file_digest(path) == first


@pytest.mark.parametrize("home", ["file", "no locks", "relative"])
def test_without_a_folder_to_remember_in_each_process_reads_once(
    home: str, tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    if home == "file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif home == "no locks":

        def refuse(file: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("checkpoint.digest.fcntl.flock", refuse)
    else:  # a user without a home: what would be one is a folder of that name here
        monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache"))
        monkeypatch.chdir(tmp_path)
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    assert file_digest(path) == file_digest(path)
    assert len(reads) == 1
    assert not (tmp_path / "~").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    read = digest._read
    monkeypatch.setattr(digest, "_read", lambda path: (read(path), path.write_bytes(b"others"))[0])
    with pytest.raises(CheckpointError, match=r"w: changed while it was read"):
        file_digest(path)


def test_parts_of_a_large_file_all_count(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_PART_BYTES", 1 << 16)
    monkeypatch.setattr(digest, "_READ_BYTES", 1 << 12)
    seen = set()
    for offset in range(0, 200_000, 6151):
        content = bytearray(200_000)
        content[offset] = 1
        (tmp_path / "w").write_bytes(content)
        seen.add(file_digest(tmp_path / "w"))
    assert len(seen) == len(range(0, 200_000, 6151))


def test_processes_that_start_together_read_a_file_once(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    code = f"""
import time
from pathlib import Path
from checkpoint import digest
from workers.model.registry import load_config
digest._SETTLED_S = -1.0
read = digest._read
def slow(path):
    print("read", flush=True)
    time.sleep(1)
    return read(path)
digest._read = slow
print(digest.file_digest(Path({str(path)!r})))
"""
    environment = {**python_environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sum(words.count("read") for words in said) == 1
    assert len({words[-1] for words in said}) == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path, memory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: No such file"):
        file_digest(tmp_path / "nothing")


def test_a_scalar_is_read(tmp_path: Path) -> None:
    """Scales of 8-bit weights may be one."""
    save_file({"scale": torch.tensor(0.25)}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path, torch.float32, CPU).read("scale", ())
    assert (read.shape, float(read)) == ((), 0.25)
