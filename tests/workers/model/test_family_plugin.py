"""Families that plugins bring, each as one file: served with tp 2 and disaggregated, beside plain torch."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.workers.engine_group import EngineGroup
from tests.workers.forked_worker import spec_for, worker
from tests.workers.worker_client import disaggregate
from workers.config import EngineConfig
from workers.engine.request import SamplingParams
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint, tensor_layout

PLUGINS = ("tests.plugins.windowed_llama", "tests.plugins.parallel_llama")
CONFIG = {
    "architectures": ["WindowedLlamaForCausalLM"],
    "model_type": "windowed_llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 6,
    "attn_logit_softcapping": 3.0,
}
HEADS, KV_HEADS, HEAD_DIM, EPS = 4, 2, 8, 1e-6
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LENGTHS = (1, 5, 6, 7, 33, 50)


PARALLEL = {
    **{name: value for name, value in CONFIG.items() if name not in ("sliding_window", "attn_logit_softcapping")},
    "architectures": ["ParallelLlamaForCausalLM"],
    "model_type": "parallel_llama",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random(tmp_path_factory.mktemp("windowed"), CONFIG)


def make_random(path: Path, config: dict[str, object]) -> Path:
    """Weights so large that greedy choices are clear."""
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    generator = torch.Generator().manual_seed(7)
    wanted = tensor_layout(load_config(path, plugins=PLUGINS)).wanted
    tensors = {
        name: torch.ones(tensor.shape)
        if name.endswith("norm.weight")
        else torch.randn(tensor.shape, generator=generator) * (0.2 if len(tensor.shape) == 2 else 1.0)
        for name, tensor in wanted.items()
        if not tensor.is_optional
    }
    save_file(tensors, path / "model.safetensors")
    return path


def prompt(length: int) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def reference_tokens(path: Path, token_ids: list[int], max_tokens: int, window: int) -> list[int]:
    """Greedy, each token from the whole sequence, without any cache."""
    weights = load_file(path / "model.safetensors")
    tokens = list(token_ids)
    for _ in range(max_tokens):
        tokens.append(int(last_logits(weights, torch.tensor(tokens), window).argmax()))
    return tokens[len(token_ids) :]


def last_logits(weights: dict[str, Tensor], token_ids: Tensor, window: int) -> Tensor:
    x = weights["model.embed_tokens.weight"][token_ids] * 2
    for index in range(CONFIG["num_hidden_layers"]):
        layer = {n.split(f"layers.{index}.")[1]: w for n, w in weights.items() if f"layers.{index}." in n}
        is_windowed = index % 2 == 1
        normed = _norm(x, layer["input_layernorm.weight"])
        x = x + _attention(layer, normed, window if is_windowed else 0, is_windowed)
        normed = _norm(x, layer["post_attention_layernorm.weight"])
        gated = F.silu(normed @ layer["mlp.gate_proj.weight"].T) * (normed @ layer["mlp.up_proj.weight"].T)
        x = x + gated @ layer["mlp.down_proj.weight"].T
    logits = _norm(x[-1], weights["model.norm.weight"]) @ weights["lm_head.weight"].T / 4
    return 5 * torch.tanh(logits / 5)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (weight + 0.5)


def _attention(layer: dict[str, Tensor], x: Tensor, window: int, is_capped: bool, stretch: float = 1.0) -> Tensor:
    def project(part: str, heads: int) -> Tensor:
        rows = x @ layer[f"self_attn.{part}_proj.weight"].T + layer[f"self_attn.{part}_proj.bias"]
        return rows.view(len(x), heads, HEAD_DIM).transpose(0, 1)

    q, k = _rotate(project("q", HEADS), stretch), _rotate(project("k", KV_HEADS), stretch)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 0) for t in (k, project("v", KV_HEADS)))
    scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
    if is_capped:
        scores = 3.0 * torch.tanh(scores / 3.0)
    indices = torch.arange(len(x))
    ago = indices[:, None] - indices[None, :]
    hidden = (ago < 0) | (ago >= window) if window else ago < 0
    scores = scores.masked_fill(hidden, float("-inf"))
    if is_capped:  # the sinks' weight brings no value
        sinks = layer["self_attn.sinks"][:, None, None].expand(-1, len(x), 1)
        scores = torch.cat((scores, sinks), -1)
    attended = scores.softmax(-1)[..., : len(x)] @ v
    return attended.transpose(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T + layer["self_attn.o_proj.bias"]


def _rotate(x: Tensor, stretch: float) -> Tensor:
    half = HEAD_DIM // 2
    turns = 10000.0 ** (-torch.arange(half).float() * 2 / HEAD_DIM)
    angles = torch.arange(x.shape[1]).float()[:, None] * turns / stretch
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_every_tensor_of_it_is_checked(checkpoint: Path) -> None:
    model = load_config(checkpoint, plugins=PLUGINS)
    check_checkpoint(checkpoint, model)
    assert [spec.window for spec in model.cache_specs] == [0, 6, 0, 6]


@pytest.mark.parametrize("split", [(1, 1), (2, 1), (1, 2)], ids=lambda s: f"tp{s[0]}pp{s[1]}")
def test_tokens_are_those_of_plain_torch(split: tuple[int, int], checkpoint: Path) -> None:
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", tp=split[0], pp=split[1], block_size=4, num_blocks=96,
        max_num_batched_tokens=20, max_num_seqs=4, plugins=PLUGINS,
    )  # fmt: skip
    expected = [reference_tokens(checkpoint, prompt(n), 12, window=6) for n in LENGTHS]
    assert expected != [reference_tokens(checkpoint, prompt(n), 12, window=0) for n in LENGTHS]
    with EngineGroup(*split) as group:
        for options in ({}, {"cuda_graphs": True}, {"batch_invariant": True}):
            found = group.run(replace(config, **options), [prompt(n) for n in LENGTHS], GREEDY)
            assert found.completions == expected, options
            for token_ids, logits in zip(map(prompt, LENGTHS), found.logits, strict=False):
                first = last_logits(load_file(checkpoint / "model.safetensors"), torch.tensor(token_ids), window=6)
                torch.testing.assert_close(logits[0], first[: logits.shape[1]], rtol=1e-4, atol=1e-4)


def test_it_is_served_disaggregated_by_two_ranks_each(checkpoint: Path, shared_kv_node) -> None:
    specs = [spec_for(checkpoint, role, shared_kv_node, tp=2) for role in ("prefill", "decode")]
    specs = [replace(spec, engine=replace(spec.engine, plugins=PLUGINS)) for spec in specs]
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(worker(spec)) for spec in specs)
        for length in LENGTHS:
            tokens, prefilled, decoded = disaggregate(prefill, decode, prompt(length), max_tokens=12)
            assert tokens == reference_tokens(checkpoint, prompt(length), 12, window=6)
            assert prefilled.num_computed_prompt_tokens == length
            assert decoded.num_computed_prompt_tokens == 0


def test_layers_of_another_form_are_one_file_too(tmp_path: Path) -> None:
    path = make_random(tmp_path, PARALLEL)
    weights = load_file(path / "model.safetensors")
    expected = []
    for length in LENGTHS:
        tokens = prompt(length)
        for _ in range(12):
            tokens.append(int(parallel_logits(weights, torch.tensor(tokens)).argmax()))
        expected.append(tokens[length:])
    config = EngineConfig(
        str(path), "float32", "cpu", tp=2, block_size=4, num_blocks=96, max_num_seqs=4, plugins=PLUGINS
    )  # fmt: skip
    with EngineGroup(2, 1) as group:
        for with_graphs in (False, True):
            found = group.run(replace(config, cuda_graphs=with_graphs), [prompt(n) for n in LENGTHS], GREEDY)
            assert found.completions == expected


def parallel_logits(weights: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    x = weights["model.embed_tokens.weight"][token_ids]
    for index in range(CONFIG["num_hidden_layers"]):
        layer = {n.split(f"layers.{index}.")[1]: w for n, w in weights.items() if f"layers.{index}." in n}
        normed = F.rms_norm(x, x.shape[-1:], layer["norm.weight"], EPS)
        gated = F.silu(normed @ layer["mlp.gate_proj.weight"].T) * (normed @ layer["mlp.up_proj.weight"].T)
        x = x + _attention(layer, normed, 0, is_capped=False, stretch=2.0) + gated @ layer["mlp.down_proj.weight"].T
    return F.rms_norm(x[-1], x.shape[-1:], weights["model.norm.weight"], EPS) @ weights["lm_head.weight"].T
