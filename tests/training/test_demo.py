"""The models that are committed: what they are, what they were trained on, and that their cards say the truth."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer

from bench.speculation import drafters
from training import acceptance, corpus, eagle, train
from training.draft import DRAFT
from workers.config import SpeculativeOptions
from workers.model.heads.eagle3_config import read_eagle3
from workers.model.registry import load_config

MODELS = train.MODELS
TESTS_OF_HELD_OUT = {
    "test_cgi.py", "test_copyreg.py", "test_enum.py", "test_future.py", "test_hmac.py", "test_logging.py",
    "test_pathlib.py", "test_pydoc.py", "test_smtpd.py", "test_sunau.py", "test_threading_local.py",
    "test_traceback.py", "test_xdrlib.py",
}  # fmt: skip
PLANS = {"demo": (train.DEMO, 6e6, 12e6), "demo-draft": (DRAFT.base, 1e6, 1.5e6)}


@pytest.fixture(scope="module")
def documents() -> corpus.Corpus:
    return corpus.read()


def test_nothing_that_is_held_out_is_trained_on(documents: corpus.Corpus) -> None:
    trained = set(documents.trained())
    assert len(documents.held_out) >= len(corpus.HELD_OUT_MODULES)
    assert not trained.intersection(documents.held_out)
    assert len(documents.sources) > 500
    assert len(documents.tests) > 500


def test_the_tests_of_held_out_modules_are_not_trained_on(documents: corpus.Corpus) -> None:
    trained = set(documents.tests)
    named = [path for path, relative in corpus._files() if relative.name in TESTS_OF_HELD_OUT]
    assert len(named) >= 8  # another Python has a few less, or names them otherwise
    for path in named:
        assert path.read_text(encoding="utf-8", errors="replace") not in trained


@pytest.mark.parametrize("name", PLANS)
def test_the_directory_is_what_others_can_load(name: str) -> None:
    plan, least, most = PLANS[name]
    directory = MODELS / name
    present = {path.name for path in directory.iterdir()}
    assert {
        "README.md", "config.json", "generation_config.json", "loss_curve.png", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    } <= present  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    if name == "demo":
        assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert least <= sum(p.numel() for p in train.load(plan).parameters()) <= most
    assert (directory / "tokenizer.json").read_bytes() == (MODELS / "demo" / "tokenizer.json").read_bytes()


def test_both_together_are_small() -> None:
    files = [path for name in PLANS for path in (MODELS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 30e6


def test_the_draft_says_what_the_demo_says(documents: corpus.Corpus) -> None:
    """What speculative decoding lives on, on a few streams; `python -m training.acceptance` has more."""
    tok = Tokenizer.from_file(str(MODELS / "demo" / "tokenizer.json"))
    prompts = acceptance.prompts_of(tok, documents.held_out, 12, 128)
    target, draft = train.load(train.DEMO), train.load(DRAFT.base)
    for temperature, least in ((0.0, 0.6), (0.7, 0.45), (1.0, 0.38)):
        said = acceptance.streams(target, prompts, 96, temperature)
        assert acceptance.acceptance("draft", draft, said).share > least


def test_the_head_says_what_the_demo_says() -> None:
    """As it is served: `python -m bench.speculation.drafters --methods eagle3 --fixed --lookup 0` has more."""
    options = SpeculativeOptions(enable_adaptive_verification=False, num_speculative_tokens=2, draft_model_lookup_min=0)
    bench = drafters.Bench("demo", False, options, compile=False)
    make, prompts = bench.engine("eagle3"), drafters.Prompts("demo", bench.directory)
    for temperature, least in ((0.0, 0.6), (0.7, 0.5)):
        assert bench.run(make(), prompts.take(8), temperature, 8).accepted[0] > least


def test_the_head_is_small() -> None:
    head = read_eagle3(MODELS / eagle.NAME, load_config(MODELS / "demo"))
    assert head.draft_vocab_size == eagle.EAGLE.shape.draft_vocab_size
    assert (MODELS / eagle.NAME / "model.safetensors").stat().st_size < 3e6


def test_the_draft_has_one_layer_and_costs_little() -> None:
    """A layer costs more than its width: of the demo's multiplications the draft makes a fifth."""
    assert DRAFT.base.shape.num_hidden_layers == 1
    sizes = [sum(p.numel() for p in train.load(plan).parameters()) for plan in (train.DEMO, DRAFT.base)]
    assert sizes[1] < 0.21 * sizes[0]
    assert (MODELS / "demo-draft" / "model.safetensors").stat().st_size < 3e6


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_card_gives_the_bits_per_byte_that_are_measured(documents: corpus.Corpus, name: str) -> None:
    tok = Tokenizer.from_file(str(MODELS / "demo" / "tokenizer.json"))
    said = re.search(r"\*\*held-out bits per byte\*\* \| \*\*([\d.]+)\*\*", (MODELS / name / "README.md").read_text())
    assert said is not None
    measured = train.bits_per_byte(train.load(PLANS[name][0]), tok, documents.held_out)
    assert measured == pytest.approx(float(said[1]), abs=0.002)
