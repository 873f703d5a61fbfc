"""What model.dtype=auto means on a processor: measured once, remembered, and never less than the model is stored in."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from checkpoint.gguf.directory import open_gguf
from deploy import cpu_dtype
from deploy.cpu_dtype import fastest_cpu_dtype
from tests.checkpoint.gguf.gguf_files import demo_tokenizer, quantised, stored_tensors, weights_of, write_gguf
from tests.fake_model import DEMO

WITH_BF16 = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx512f avx512_bf16\n"
WITHOUT = "processor\t: 0\nmodel name\t: Old CPU\nflags\t\t: fpu avx2\n"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "switchyard" / "cpu-speed.json"


def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_dtype, "_CPUINFO", tmp_path / "cpuinfo")


notes: list[str] = []


def test_the_processor_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    processor(tmp_path, monkeypatch, WITH_BF16)
    chosen = fastest_cpu_dtype(DEMO, notes.append)
    remembered = json.loads(memory.read_text())
    assert remembered["speed_up"] > 0
    assert "Fast CPU" in remembered["processor"]
    assert notes[-1].startswith(f"model.dtype=auto: {chosen}")
    assert chosen == ("bfloat16" if remembered["speed_up"] >= 1.2 else "float32")
    for speed_up, dtype in ((1.9, "bfloat16"), (1.1, "float32")):
        memory.write_text(json.dumps({**remembered, "speed_up": speed_up}))
        assert fastest_cpu_dtype(DEMO, notes.append) == dtype
    memory.write_text("not JSON")
    assert fastest_cpu_dtype(DEMO, notes.append) in ("bfloat16", "float32")
    assert json.loads(memory.read_text())["processor"] == remembered["processor"]


def test_a_processor_without_the_arithmetic_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    processor(tmp_path, monkeypatch, WITHOUT)
    assert fastest_cpu_dtype(DEMO, notes.append) == "float32"
    assert not memory.exists()


def test_scales_of_a_quantized_model_may_have_32_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    processor(tmp_path, monkeypatch, WITH_BF16)
    save_file({"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    fastest_cpu_dtype(tmp_path, notes.append)
    assert memory.exists()


def test_a_model_in_32_bits_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    processor(tmp_path, monkeypatch, WITH_BF16)
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert fastest_cpu_dtype(tmp_path, notes.append) == "float32"
    assert fastest_cpu_dtype(tmp_path / "nothing", notes.append) == "float32"
    assert not memory.exists()


@pytest.mark.parametrize(("kind", "keeps_32_bits"), [("Q4_0", False), ("F16", False), ("F32", True)])
def test_norms_of_a_gguf_do_not_count(
    kind: str, keeps_32_bits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    processor(tmp_path, monkeypatch, WITH_BF16)
    monkeypatch.setattr(cpu_dtype, "_measured", lambda note: 3.0)
    vocab_size = len(demo_tokenizer()["ggml.tokens"])
    tensors = quantised(
        stored_tensors("qwen3moe", weights_of("qwen3moe", vocab_size)), [gguf.GGMLQuantizationType[kind]]
    )
    directory = open_gguf(write_gguf(tmp_path / "x.gguf", "qwen3moe", tensors))
    assert fastest_cpu_dtype(directory, notes.append) == ("float32" if keeps_32_bits else "bfloat16")
