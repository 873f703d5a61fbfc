"""Models from GGUF files give the tokens that transformers gives with the same weights, dequantised by `gguf`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint.errors import CheckpointError
from checkpoint.gguf.block_types import QUANTISED
from checkpoint.gguf.directory import open_gguf
from checkpoint.gguf.packaged import packaged_gguf
from tests.checkpoint.gguf.gguf_files import (
    demo_tokenizer,
    quantised,
    random_rows,
    stored_tensors,
    weights_of,
    write_gguf,
)  # fmt: skip
from tests.quant.served import last_logits
from tests.workers.engine_group import EngineGroup
from workers.config import EngineConfig
from workers.errors import ModelError
from workers.model.arithmetic import Arithmetic
from workers.model.loader import Checkpoint
from workers.model.products import linear_of
from workers.model.products.grouped import kind_of
from workers.model.quant.storage import Cut
from workers.model.quant.weights import DenseWeight, GroupedWeight
from workers.model.registry import load_config
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint, check_split
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import SamplingParams

Q = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
MAX_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
PROMPTS = [[5, 90, 200, 17], list(range(40, 73))]
MIXTURES = {
    "Q4_0": [Q.Q4_0],
    "Q4_1 and Q8_0": [Q.Q4_1, Q.Q8_0, Q.Q4_1],
    "many": [Q.Q5_0, Q.F16, Q.Q5_1, Q.Q4_0, Q.MXFP4, Q.BF16, Q.F32],
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2)], ids=lambda p: f"tp{p[0]}pp{p[1]}")
def group(request: pytest.FixtureRequest) -> Iterator[EngineGroup]:
    with EngineGroup(*request.param) as group:
        yield group


def _config(directory: Path, group: EngineGroup, dtype: str = "float32") -> EngineConfig:
    return EngineConfig(
        str(directory), tp=group.tp, pp=group.pp, device="cpu", dtype=dtype, block_size=16, num_blocks=64
    )


def _oracle_model(path: Path, directory: Path) -> Any:
    """transformers' own model in fp32, with values and names by `gguf`, and rows turned back."""
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    loaded = model.load_state_dict(_state(path, config, set(model.state_dict())), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    model.tie_weights()
    return model


def _oracle(path: Path, directory: Path, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Greedy tokens of the oracle."""
    model = _oracle_model(path, directory)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
                eos_token_id=None,
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def _state(path: Path, config: Mapping[str, Any], wanted: set[str]) -> dict[str, torch.Tensor]:
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, torch.Tensor] = {}
    for name in wanted - {"lm_head.weight"} | ({"lm_head.weight"} if "output.weight" in tensors else set()):
        parts = [".gate_proj", ".up_proj"] if name.endswith("experts.gate_up_proj") else [""]
        arrays = []
        for part in parts:
            stem = name.removesuffix(".weight").replace(".gate_up_proj", part)
            tensor = tensors[f"{names.get_name(stem)}.weight"]
            array = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            arrays.append(array.reshape([int(size) for size in tensor.shape][::-1]))
        array = np.concatenate(arrays, axis=-2) if len(arrays) > 1 else arrays[0]
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = len(array) // config["head_dim"]
            array = array.reshape(heads, config["head_dim"] // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        found[name] = torch.from_numpy(array)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, list[list[int]]]]:
    """Directory of a model by architecture and mixture, and its oracle's tokens. Made once."""
    made: dict[tuple[str, str], tuple[Path, list[list[int]]]] = {}
    vocab_size = len(demo_tokenizer()["ggml.tokens"])

    def make(architecture: str, mixture: str) -> tuple[Path, list[list[int]]]:
        key = architecture, mixture
        if key not in made:
            path = tmp_path_factory.mktemp("model") / f"{architecture}.gguf"
            weights = {
                name: 4 * array for name, array in weights_of(architecture, vocab_size, tied=mixture != "many").items()
            }
            write_gguf(path, architecture, quantised(stored_tensors(architecture, weights), MIXTURES[mixture]))
            directory = open_gguf(path)
            made[key] = directory, _oracle(path, directory, PROMPTS)
        return made[key]

    return make


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3moe"])
def test_tokens_are_those_of_transformers(
    architecture: str, mixture: str, group: EngineGroup, models: Callable[[str, str], tuple[Path, list[list[int]]]]
) -> None:
    directory, expected = models(architecture, mixture)
    check_checkpoint(directory, load_config(directory))
    assert group.run(_config(directory, group), PROMPTS, GREEDY).completions == expected


def _of_blocks(path: Path, kinds: list[str]) -> Path:
    """A Llama whose matrices have these types in turn, of any bytes, with scales that give ordinary numbers."""
    hidden, heads, vocab_size = 256, 8, len(demo_tokenizer()["ggml.tokens"])
    shapes = {"attn_q": (256, 256), "attn_k": (256, 256), "attn_v": (256, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    layers = -(-len(kinds) // len(shapes))
    tensors: dict[str, Any] = {"output_norm.weight": np.ones(hidden, np.float32)}
    tensors["token_embd.weight"] = np.random.default_rng(0).standard_normal((vocab_size, hidden)).astype(np.float16)
    for index, (layer, part) in enumerate((layer, part) for layer in range(layers) for part in shapes):
        kind = kinds[index % len(kinds)]
        outputs, inputs = shapes[part]
        rows = random_rows(kind, outputs, inputs // QUANTISED[kind].block_size)
        if kind == "MXFP4":
            rows.reshape(-1, 17)[:, 0] = 119  # a block's exponent
        tensors[f"blk.{layer}.{part}.weight"] = (rows, Q[kind])
        # Values of random blocks are of any size: norms make up for it.
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    sizes = {
        "block_count": layers, "embedding_length": hidden, "feed_forward_length": 512, "attention.head_count": heads,
        "attention.head_count_kv": heads, "attention.key_length": 32, "attention.value_length": 32,
    }  # fmt: skip
    return write_gguf(path, "llama", tensors, sizes)


_KINDS = sorted(QUANTISED.keys() - {"Q8_1", "Q8_K", "Q1_0", "Q2_0"})  # which `gguf` does not dequantise


@pytest.mark.parametrize("kind", _KINDS)
def test_every_type_is_read_as_gguf_reads_it(kind: str, tmp_path: Path) -> None:
    """Matrix by matrix, whole and cut at a block's edge among the inputs and anywhere among the outputs."""
    path = _of_blocks(tmp_path / "x.gguf", [kind])
    directory = open_gguf(path)
    model = load_config(directory)
    check_checkpoint(directory, model)
    weights = Checkpoint(directory, torch.float32, CPU)
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.ffn_down.weight")
    wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    name = "model.layers.0.mlp.down_proj"
    storage = model.weight_format.rule.storage_of(name)
    assert storage.edges == (1, QUANTISED[kind].block_size)
    for rows, columns in ((slice(0, 256), slice(0, 512)), (slice(100, 131), slice(256, 512))):
        read = storage.read(weights, Cut(name, 256, 512, rows, columns))
        is_dense = kind.startswith(("IQ1", "IQ2", "IQ3"))
        assert isinstance(read, DenseWeight if is_dense else GroupedWeight)
        assert torch.equal(read.dense(torch.float32), wanted[rows, columns])


ON_CUDA = SimpleNamespace(groups=SimpleNamespace(device=torch.device("cuda")), batch_invariant=False)
"""The products that CUDA gets, which the operations' CPU twins compute."""


@pytest.mark.parametrize("kind", [kind for kind in _KINDS if not kind.startswith(("IQ1", "IQ2", "IQ3"))])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_products_with_packed_types_are_those_with_their_numbers(kind: str, num_rows: int, tmp_path: Path) -> None:
    """In bfloat16: on CUDA by codes in 4 or 8 bits, on a CPU by what is fastest there."""
    path = _of_blocks(tmp_path / "x.gguf", [kind])
    directory = open_gguf(path)
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.ffn_down.weight")
    wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    name = "model.layers.0.mlp.down_proj"
    storage = load_config(directory).weight_format.rule.storage_of(name)
    read = storage.read(Checkpoint(directory, torch.bfloat16, CPU), Cut(name, 256, 512, slice(0, 256), slice(0, 512)))
    x = torch.randn(num_rows, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    on_cuda = linear_of([read], torch.bfloat16, ON_CUDA, None)
    assert on_cuda.kind == kind_of(read)
    assert "dequantized" not in on_cuda.kind
    for linear in (on_cuda, linear_of([read], torch.bfloat16, Arithmetic(ParallelGroups(Shard(), CPU), False), None)):
        expected = x.float() @ wanted.T
        assert (linear(x).float() - expected).norm() <= 0.01 * expected.norm()


def test_types_that_are_dequantized_share_a_product(tmp_path: Path) -> None:
    """q_proj and k_proj in 6 bits, v_proj in 5: on a CPU one product, as both are multiplied as numbers there."""
    directory = open_gguf(_of_blocks(tmp_path / "x.gguf", ["Q6_K", "Q6_K", "Q5_K", "Q4_K", "IQ3_S", "Q8_0", "Q8_0"]))
    model = load_config(directory)
    weights = Checkpoint(directory, torch.float32, CPU)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    cuts = [Cut(name, 256, 256, slice(0, 256), slice(0, 256)) for name in names]
    shares = [model.weight_format.rule.storage_of(cut.name).read(weights, cut) for cut in cuts]
    linear = linear_of(shares, torch.float32, Arithmetic(ParallelGroups(Shard(), CPU), False), None)
    assert linear.kind == "W6A16 g16 and W5A16 g32 dequantized to float32"
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    expected = x @ torch.cat([share.dense(torch.float32) for share in shares]).T
    assert (linear(x) - expected).norm() <= 1e-5 * expected.norm()


def test_a_cut_within_a_block_is_refused_by_name(tmp_path: Path) -> None:
    model = load_config(open_gguf(_of_blocks(tmp_path / "x.gguf", ["Q4_K", "Q8_0"])))
    check_split(model, 2, 1)
    with pytest.raises(ModelError, match=r"tp=4 cuts the 512 inputs of .*down_proj within a group of 256"):
        check_split(model, 4, 1)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for kind in ("Q4_K", "Q6_K"):
        path = _of_blocks(tmp_path / f"{kind}.gguf", [kind])
        entry = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.attn_v.weight")
        content = bytearray(path.read_bytes())
        at = entry.data_offset + (0 if kind == "Q4_K" else 208)
        content[at : at + 2] = np.float16("inf").tobytes()
        path.write_bytes(content)
        directory = open_gguf(path)
        model, weights = load_config(directory), Checkpoint(directory, torch.float32, CPU)
        with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.v_proj\.weight holds values that are not finite"):
            build_stage(model, weights, ParallelGroups(Shard(), CPU))


def test_what_products_are_made_of_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = open_gguf(_of_blocks(tmp_path / "x.gguf", ["Q6_K"] * 3 + ["Q4_K"] * 4))
    caplog.set_level("INFO")
    build_stage(load_config(directory), Checkpoint(directory, torch.float32, CPU), ParallelGroups(Shard(), CPU))
    assert "W6A16 g16 dequantized to float32" in caplog.text
    assert "W4A16 g32 dequantized to float32" in caplog.text


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        path = packaged_gguf("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    assert path is not None
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_says_what_transformers_says(dtype: str, smollm2: Path) -> None:
    """In bfloat16, which rounds more than transformers does here, the answer begins the same."""
    directory = open_gguf(smollm2)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompts = [
        tokenizer.encode(text).ids
        for text in (
            "The capital of France is",
            "def fibonacci(n):",
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
        )
    ]
    expected = _oracle(smollm2, directory, prompts, 16)
    assert tokenizer.decode(expected[0]).startswith(" Paris.")
    num_equal = 16 if dtype == "float32" else 2
    with EngineGroup(1, 1) as group:
        sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        found = group.run(_config(directory, group, dtype), prompts, sampling).completions
    assert [ids[:num_equal] for ids in found] == [ids[:num_equal] for ids in expected]


@pytest.mark.slow
def test_a_real_model_has_the_logits_of_transformers(smollm2: Path) -> None:
    directory = open_gguf(smollm2)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(Path(__file__).read_text()[:1500]).ids)
    with torch.inference_mode():
        expected = _oracle_model(smollm2, directory)(ids[None]).logits[0]
    found = last_logits(directory, torch.float32, ids, len(ids))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
