"""What is wrong with a draft model, or a head, is said before anything starts, in one line that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deploy import config
from deploy.draft_model import check_draft
from deploy.errors import ConfigError
from deploy.overrides import ServeFlags, load_with_flags
from deploy.preflight import find_model
from tests.workers.speculation.tiny_eagle import HIDDEN, VOCAB, make_head
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


def checked(target: Path, head: Path | str, *overrides: str) -> str:
    keys = ["speculative.method=eagle3", f"speculative.model={head}", f"model.path={target}"]
    loaded = config.load(None, [*keys, *overrides])
    return check_draft(loaded, find_model(loaded))


def refusal(target: Path, head: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        checked(target, head, *overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"layer": "layers.0.", "root": "model.", "architectures": ["Eagle3LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"]},
        {"has_embedding": True, "draft_vocab_size": None},
        {LAYER_IDS: None, "eagle_config": {LAYER_IDS: [0, 1, 2], "use_aux_hidden_state": True}},
        {LAYER_IDS: None},
    ],
    ids=["published", "vllm", "old", "whole vocabulary", "nested", "default layers"],
)
def test_published_layouts_are_taken(target: Path, tmp_path: Path, made: dict[str, object]) -> None:
    head = make_head(tmp_path / "head", **made)
    assert checked(target, head) == str(head)


WRONG: list[tuple[dict[str, object], str]] = [
    ({"vocab_size": 98}, "config.json: vocab_size=98, and the served model has 97"),
    ({"target_hidden_size": 64}, "config.json: target_hidden_size=64, and the served model's hidden_size is 32"),
    ({"hidden_size": 64}, "config.json: hidden_size=64, and the served model's hidden_size is 32"),
    ({"architectures": ["EagleLlamaForCausalLM"]}, "architecture EagleLlamaForCausalLM is no EAGLE-3 head"),
    ({"architectures": None}, "architecture (none named) is no EAGLE-3 head"),
    ({"num_hidden_layers": 2}, "num_hidden_layers=2: heads of one layer are supported"),
    ({"rotates": "backwards"}, "rotates: unknown key"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=true is not supported"),
    ({LAYER_IDS: [1, 2, 4]}, f"{LAYER_IDS} must be layers of the served model, which has 3, not [1, 2, 4]"),
    ({"eagle_config": {LAYER_IDS: [0, 1, 2], "use_aux_hidden_state": False}}, "use_aux_hidden_state=false is not"),
    ({LAYER_IDS: [1, 2]}, "fc.weight is [32, 96], config.json says [32, 64]"),
    ({"draft_vocab_size": 97, "tensors": {"lm_head.weight": torch.zeros(70, HIDDEN)}}, "lm_head.weight is [70, 32]"),
    ({"tensors": {"midlayer.hidden_norm.weight": None}}, "no tensor midlayer.hidden_norm.weight"),
    ({"tensors": {"midlayer.self_attn.q_proj.weight": torch.zeros(32, 32)}}, "q_proj.weight is [32, 32]"),
    ({"tensors": {"enorm.weight": torch.ones(HIDDEN)}}, "enorm.weight: nothing uses this tensor"),
    ({"tensors": {"d2t": None}}, "no tensor d2t"),
    ({"tensors": {"d2t": torch.full((70,), 28)}}, "d2t[69] leads to token 97 of 97"),
    ({"tensors": {"d2t": torch.arange(0, -70, -1) - 1}}, "d2t[0] leads to token -1 of 97"),
    ({"tensors": {"d2t": torch.arange(0, -70, -1)}}, "d2t leads to the same token twice"),
    ({"tensors": {"d2t": torch.zeros(70)}}, "d2t is F32"),
    ({"tensors": {"t2d": torch.zeros(VOCAB, dtype=torch.bool)}}, "t2d["),
    ({"tensors": {"t2d": torch.zeros(90, dtype=torch.bool)}}, "t2d is [90]"),
]


@pytest.mark.parametrize(("made", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_head_that_does_not_fit(target: Path, tmp_path: Path, made: dict[str, object], said: str) -> None:
    head = make_head(tmp_path / "head", **made)
    found = refusal(target, head)
    assert found.startswith(f"speculative.model: {head}")
    assert said in found


def test_a_narrow_head_needs_an_embedding_of_its_own(tmp_path: Path) -> None:
    target = make_checkpoint("gqa", tmp_path)
    raw = json.loads((target / "config.json").read_text())
    head = make_head(tmp_path / "head", hidden_size=HIDDEN, target_hidden_size=raw["hidden_size"])
    assert checked(target, head)
    wide = make_head(
        tmp_path / "wide", hidden_size=48, target_hidden_size=HIDDEN, num_attention_heads=4, head_dim=8,
        tensors={name: torch.zeros(shape) for name, shape in _wide_shapes().items()},
    )  # fmt: skip
    assert "no tensor embed_tokens.weight, and the served model's has 32 columns, not 48" in refusal(target, wide)


def _wide_shapes() -> dict[str, tuple[int, ...]]:
    layer, wide = "midlayer.", 48
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    return {
        **{f"{layer}{name}.weight": (wide,) for name in norms}, "norm.weight": (wide,),
        f"{layer}self_attn.q_proj.weight": (32, 2 * wide), f"{layer}self_attn.k_proj.weight": (16, 2 * wide),
        f"{layer}self_attn.v_proj.weight": (16, 2 * wide), f"{layer}self_attn.o_proj.weight": (wide, 32),
        f"{layer}mlp.gate_proj.weight": (40, wide), f"{layer}mlp.up_proj.weight": (40, wide),
        f"{layer}mlp.down_proj.weight": (wide, 40), "fc.weight": (wide, 96), "lm_head.weight": (70, wide),
    }  # fmt: skip


def test_where_there_is_no_head(target: Path, tmp_path: Path) -> None:
    assert refusal(target, "''") == (
        "speculative.model: method=eagle3 needs the directory of a head that was trained for the served model"
    )
    assert "architecture LlamaForCausalLM is no EAGLE-3 head" in refusal(target, target)
    assert "no such model directory" in refusal(target, tmp_path / "nowhere")
    pickled = make_head(tmp_path / "pickled")
    shutil.move(pickled / "model.safetensors", pickled / "pytorch_model.bin")
    assert "pytorch_model.bin: a pickle, which is never read; convert it to model.safetensors" in refusal(
        target, pickled
    )


def test_what_a_head_needs_of_an_engine(target: Path, tmp_path: Path) -> None:
    head = make_head(tmp_path / "head")
    assert "speculative.method: eagle3 needs pp=1, not 2" in refusal(target, head, "pools.decode.pp=2")
    found = refusal(target, head, "engine.runner=fake")
    assert "speculative.method: eagle3 needs the model's hidden states" in found


def test_heads_of_deepseek_are_not_served_yet() -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(None, ["speculative.method=mtp"])
    assert str(refused.value).endswith(
        "speculative.method: mtp drafts by heads of DeepSeek-V3 checkpoints, a family that is not served yet"
    )


# ---- smaller models


def draft_refusal(target: Path, draft: Path | str, *overrides: str) -> str:
    named = [f"speculative.model={draft}"] if draft else []
    keys = ["speculative.method=draft_model", f"model.path={target}", *named, *overrides]
    loaded = config.load(None, keys)
    with pytest.raises(ConfigError) as refused:
        check_draft(loaded, find_model(loaded))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_draft_has_the_tokens_of_the_served_model(target: Path, tmp_path: Path) -> None:
    draft = make_checkpoint("tied", tmp_path)
    for path in (target, draft):
        write_tokenizer(path / "tokenizer.json")
    keys = ["speculative.method=draft_model", f"speculative.model={draft}", f"model.path={target}"]
    loaded = config.load(None, keys)
    assert check_draft(loaded, find_model(loaded)) == str(draft)
    text = (draft / "tokenizer.json").read_text()
    (draft / "tokenizer.json").write_text(text + " ")  # other bytes, the same tokens
    assert check_draft(loaded, find_model(loaded)) == str(draft)
    (draft / "tokenizer.json").write_text(text.replace('"A"', '"AA"'))
    assert draft_refusal(target, draft) == f"speculative.model: {draft}: its tokenizer is not that of the served model"
    (draft / "tokenizer.json").write_text("{")
    assert draft_refusal(target, draft).startswith(f"speculative.model: {draft / 'tokenizer.json'}: ")
    made = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**made, "vocab_size": 98}))
    assert draft_refusal(target, draft).startswith("speculative.model: ")


def test_a_draft_must_be_named_and_fit_the_context(target: Path) -> None:
    missing = "speculative.model: method=draft_model needs a smaller model with the tokenizer of the served one"
    assert draft_refusal(target, "") == missing
    wanted = ["speculative.num_speculative_tokens=8", "model.max_model_len=8"]
    found = draft_refusal(target, target, *wanted)
    assert found == "speculative.num_speculative_tokens: 8 do not fit into a context of 8"
    assert "no such model directory" in draft_refusal(target, "/nowhere")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"method": "suffix", "method": "ngram"}', "--speculative-config: method is given twice"),
        ('{"num_speculative_tokens": 3}', "--speculative-config: method: missing"),
        ("[]", "--speculative-config: must be a JSON object"),
        ("{", "--speculative-config: not JSON: "),
        ('{"method": "guess"}', "speculative.method: must be one of none, ngram, "),
        ('{"method": "ngram", "prompt_lookup_min": 6}', "speculative.prompt_lookup_min: must not be above "),
        ('{"method": "ngram", "model": "x"}', "speculative.model: method=ngram has no draft model"),
        ('{"method": "ngram", "num_speculative_tokens": 65}', "speculative.num_speculative_tokens: "),
        *(
            (
                f'{{"method": "draft_model", "draft_tensor_parallel_size": {size}}}',
                f"speculative.draft_tensor_parallel_size: must be 1, since a draft runs on rank 0 alone, not {size}",
            )
            for size in (0, 2)
        ),
        (
            '{"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 4, 2], [3, 9, 1]]}',
            "speculative.num_speculative_tokens_per_batch_size: [3, 9, 1] must be a range of sizes after 4",
        ),
    ],
)
def test_what_is_wrong_with_the_flag_is_said_in_one_line(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_with_flags(None, ServeFlags(speculative_config=given), [])
    assert str(refused.value).startswith(message)


def test_the_flag_sets_the_branch() -> None:
    given = (
        '{"method": "suffix", "num_speculative_tokens_per_batch_size": [[1, 4, 2]], "draft_tensor_parallel_size": 1}'
    )
    made = load_with_flags(None, ServeFlags(speculative_config=given), ["speculative.num_speculative_tokens=3"])
    assert (made.speculative.method, made.speculative.num_speculative_tokens) == ("suffix", 3)
    assert [made.speculative.most_tokens_at(n) for n in (1, 4, 5)] == [2, 2, 3]
