"""The table of the schemes of the paged cache: its losses are the model's, its bytes those of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.kv.needle import DEPTHS, needles, num_found
from bench.kv.schemes import SchemeOptions, bytes_of_stream, markdown, measure, measure_all, scheme_config, segments_of
from bench.run import main
from deploy.config import DEMO_MODEL, ROOT
from workers.model.registry import load_config

SCHEMES = ("auto", "int8", "fp8", "kivi4", "kivi2/32/0", "kivi2")
OPTIONS = SchemeOptions(
    str(DEMO_MODEL), ROOT / "workers" / "config.py", SCHEMES, segment_tokens=150, context_tokens=1000
)


def test_the_exact_caches_loss_is_that_of_the_model() -> None:
    segments = segments_of(OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    ids = torch.tensor(segments)
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert measure("auto", OPTIONS, segments).loss == pytest.approx(expected, abs=1e-4)


def test_every_scheme_has_a_line() -> None:
    figures = measure_all(OPTIONS)
    assert [f.scheme for f in figures] == list(SCHEMES)
    by_name = {f.scheme: f for f in figures}
    assert by_name["int8"].loss == pytest.approx(by_name["auto"].loss, abs=0.01)
    assert by_name["fp8"].loss == pytest.approx(by_name["auto"].loss, abs=0.05)
    assert by_name["kivi2"].loss < by_name["kivi2/32/0"].loss + 0.05
    assert by_name["kivi2"].bytes_per_token < by_name["kivi4"].bytes_per_token < by_name["int8"].bytes_per_token
    assert markdown(figures).count("\n") == 2 + len(figures)


def test_bytes_are_those_of_the_blocks_that_a_stream_holds() -> None:
    model = load_config(DEMO_MODEL)
    spec = model.cache_specs[0]
    rows = 32 * 32 * model.num_hidden_layers * spec.num_kv_heads * 2  # of 1,000 tokens
    for scheme, row_bytes in (("auto", 2 * spec.head_dim), ("int8", spec.head_dim + 4), ("fp8", spec.head_dim)):
        assert bytes_of_stream(scheme_config(scheme, OPTIONS), model, 1000) == rows * row_bytes


def test_a_scheme_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["kv_schemes", "--kv-schemes", "int3"])
    assert "--kv-schemes int3: kv_cache_dtype: must be one of" in capsys.readouterr().err


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(ValueError, match=r"short\.txt has \d+ tokens, not 300"):
        segments_of(SchemeOptions(str(DEMO_MODEL), tmp_path / "short.txt", (), segment_tokens=150))


def test_needles_are_asked_of_each_scheme_alike() -> None:
    """The demo model finds few; what is asked must not depend on who was asked before."""
    options = SchemeOptions(str(DEMO_MODEL), ROOT / "workers" / "config.py", (), segment_tokens=120)
    wanted = list(needles(options, 1))
    before = [list(needle.token_ids) for needle in wanted]
    assert [len(ids) for ids in before] == [120] * len(DEPTHS)
    counts = [num_found(scheme, options, wanted) for scheme in ("auto", "auto", "kivi2")]
    assert counts[0] == counts[1]
    assert [needle.token_ids for needle in wanted] == before
