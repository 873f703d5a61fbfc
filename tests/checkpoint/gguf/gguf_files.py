"""Small GGUF files, written by llama.cpp's own package `gguf`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from checkpoint.gguf.block_types import QUANTISED

Array = npt.NDArray[Any]

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"
SIZES = {"layers": 2, "hidden": 64, "width": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "experts": 4, "used": 2}


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Array | tuple[Array, gguf.GGMLQuantizationType]],
    metadata: Mapping[str, Any] = {},
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """metadata: keys without the architecture's prefix, beside those of SIZES; None takes one out. tokenizer: keys
    after `tokenizer.`; else that of the demo model."""
    writer = gguf.GGUFWriter(path, architecture)
    prefixed = {f"{architecture}.{key}": value for key, value in {**_sizes(architecture), **metadata}.items()}
    texts = demo_tokenizer() if tokenizer is None else tokenizer
    for key, value in {**prefixed, **{f"tokenizer.{key}": value for key, value in texts.items()}}.items():
        if value is not None:
            add_value(writer, key.removeprefix(f"{architecture}.~"), value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """In the types that llama.cpp's converter uses."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _sizes(architecture: str) -> dict[str, Any]:
    found = {
        "block_count": SIZES["layers"],
        "context_length": 512,
        "embedding_length": SIZES["hidden"],
        "feed_forward_length": SIZES["width"],
        "attention.head_count": SIZES["heads"],
        "attention.head_count_kv": SIZES["kv_heads"],
        "attention.key_length": SIZES["head_dim"],
        "attention.value_length": SIZES["head_dim"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    if architecture == "qwen3moe":
        found |= {"expert_count": SIZES["experts"], "expert_used_count": SIZES["used"]}
        found |= {"expert_feed_forward_length": SIZES["width"]}
    return found


def demo_tokenizer() -> dict[str, Any]:
    """The demo model's vocabulary as a GGUF has it."""
    return byte_level_tokenizer(json.loads((DEMO / "tokenizer.json").read_text()), "gpt-2")


def byte_level_tokenizer(tokenizer: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """What a tokenizer.json of BPE over bytes says, as a GGUF has it."""
    vocab = dict(tokenizer["model"]["vocab"]) | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in special else 1 for token in tokens],
        "ggml.merges": merges,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 0,
        "chat_template": "{{ messages[0]['content'] }}",
    }


def weights_of(architecture: str, vocab_size: int, seed: int = 0, tied: bool = True) -> dict[str, Array]:
    """Random fp32 tensors of SIZES, under Hugging Face's names."""
    random = np.random.default_rng(seed)
    hidden, width, head_dim = SIZES["hidden"], SIZES["width"], SIZES["head_dim"]
    queries, keys = SIZES["heads"] * head_dim, SIZES["kv_heads"] * head_dim

    def matrix(*shape: int) -> Array:
        return (random.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(vocab_size, hidden), "model.norm.weight": _norm(random, hidden)}
    if not tied:
        found["lm_head.weight"] = matrix(vocab_size, hidden)
    for layer in range(SIZES["layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = _norm(random, hidden)
        shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        for name, shape in {**shapes, "o_proj": (hidden, queries)}.items():
            found[f"{prefix}self_attn.{name}.weight"] = matrix(*shape)
        if architecture != "llama":
            for name in ("q_norm", "k_norm"):
                found[f"{prefix}self_attn.{name}.weight"] = _norm(random, head_dim)
        mlps = [f"{prefix}mlp."]
        if architecture == "qwen3moe":
            found[f"{prefix}mlp.gate.weight"] = matrix(SIZES["experts"], hidden)
            mlps = [f"{prefix}mlp.experts.{expert}." for expert in range(SIZES["experts"])]
        for mlp in mlps:
            found[f"{mlp}gate_proj.weight"] = matrix(width, hidden)
            found[f"{mlp}up_proj.weight"] = matrix(width, hidden)
            found[f"{mlp}down_proj.weight"] = matrix(hidden, width)
    return found


def _norm(random: np.random.Generator, size: int) -> Array:
    return (1 + 0.1 * random.standard_normal(size)).astype(np.float32)


def stored_tensors(architecture: str, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The same as llama.cpp's converter stores them: names, stacked experts, turned rows of Llama's heads."""
    kind = gguf.MODEL_ARCH_NAMES
    number = next(arch for arch, name in kind.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, SIZES["layers"])
    found: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}
    for name, array in weights.items():
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            stacks.setdefault(f"{head}.experts.{rest.partition('.')[2]}", []).append(array)
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = _turned(array, SIZES["head_dim"])
        found[_gguf_name(names, name)] = array
    return found | {_gguf_name(names, name): np.stack(arrays) for name, arrays in stacks.items()}


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    stem = names.get_name(name.removesuffix(".weight"))
    assert stem is not None, name
    return f"{stem}.weight"


def _turned(array: Array, head_dim: int) -> Array:
    """LlamaModel.permute of llama.cpp's converter."""
    heads = len(array) // head_dim
    return array.reshape(heads, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def quantised(
    tensors: Mapping[str, Array], kinds: Sequence[gguf.GGMLQuantizationType]
) -> dict[str, Array | tuple[Array, gguf.GGMLQuantizationType]]:
    """Matrices in these types in turn, norms and the router in fp32."""
    found: dict[str, Array | tuple[Array, gguf.GGMLQuantizationType]] = {}
    for index, (name, array) in enumerate(tensors.items()):
        if array.ndim < 2 or "gate_inp" in name:
            found[name] = array
            continue
        kind = kinds[index % len(kinds)]
        found[name] = (gguf.quants.quantize(array, kind), kind)
    return found


_HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q8_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where 16-bit floats stand in a block that does not begin with one."""


def random_rows(name: str, num_rows: int, blocks_per_row: int) -> npt.NDArray[np.uint8]:
    """Any bytes, but for scales that are numbers of an ordinary size: uint8 [num_rows, row_bytes]."""
    random = np.random.default_rng(len(name))
    block = QUANTISED[name]
    rows = random.integers(0, 256, (num_rows, blocks_per_row * block.block_bytes), dtype=np.uint8)
    blocks = rows.reshape(-1, block.block_bytes)
    normal = random.standard_normal((len(blocks), 1))
    if name == "MXFP4":
        blocks[:, 0] = random.integers(0, 250, len(blocks))  # exponents; the largest would overflow
        blocks[: min(4, len(blocks)), 0] = (0, 1, 2, 3)[: len(blocks)]
    elif name == "NVFP4":
        blocks[:, :4] &= 0x7F  # scales have no sign
        blocks[0, :4] = (0, 0x7F, 1, 7)
    elif name == "IQ1_M":
        blocks[:, 55] = (blocks[:, 55] & 0x0F) | 0x30  # the scale's exponent
    elif name == "Q8_K":
        blocks[:, :4] = normal.astype(np.float32).view(np.uint8)
    else:
        for at in _HALVES.get(name, (0,)):
            blocks[:, at : at + 2] = random.permutation(normal).astype(np.float16).view(np.uint8)
    return rows
