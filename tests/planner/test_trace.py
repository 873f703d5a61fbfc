"""Traces in the public formats, synthetic ones, and what is said of bad ones."""

import pytest

from bench.loadgen import Percentiles, RequestResult, prompt_ids, summarize
from planner.trace import TraceError, TraceRequest, load_trace, synthetic_trace


def test_azure_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("t_s,in_tokens,out_tokens\n0.5,3180,8\n0.0,4808,10\n")
    assert load_trace(path) == [TraceRequest(0.0, 4808, 10), TraceRequest(0.5, 3180, 8)]


def test_mooncake_jsonl(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"timestamp": 1500, "input_length": 7, "output_length": 3, "hash_ids": [4, 5]}\n')
    assert load_trace(path) == [TraceRequest(1.5, 7, 3, 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "request 1: .*none of the columns t_s"),
        ("a.csv", "t_s,in_tokens,out_tokens\n0,1,1\n0,one,1\n", "request 2"),
        ("a.jsonl", '{"timestamp": 0}\n', "request 1: 'input_length'"),
        ("a.jsonl", "{\n", "request 1"),
    ],
)
def test_bad_traces_name_the_file_and_the_request(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=rf"{name}: {message}"):
        load_trace(path)


def test_missing_trace(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        load_trace(tmp_path / "none.csv")


def test_synthetic():
    assert synthetic_trace("requests=3,prompt=5,output=2,rate=2") == [TraceRequest(t, 5, 2) for t in (0.0, 0.5, 1.0)]
    for bad in ("speed=3", "prompt", "prompt=0", "prompt=x", "rate=-1"):
        with pytest.raises(TraceError, match="--synthetic"):
            synthetic_trace(bad)


def test_prompts_of_one_prefix_begin_alike():
    import random

    rng = random.Random(0)
    a, b, c = (prompt_ids(TraceRequest(0, 10, 1, prefix), 100, rng) for prefix in (3, 3, 4))
    assert a[:5] == b[:5] != c[:5]
    assert a[5:] != b[5:]
    assert all(0 < t < 100 for t in (*a, *b, *c))


def test_summary_counts_failures_apart():
    good = RequestResult(0.5, 0.01, 10, 4)
    report = summarize([good, RequestResult(error="UNAVAILABLE: no worker")], duration_s=2.0)
    assert (report.num_requests, report.num_failed) == (2, 1)
    assert report.output_tokens_per_s == 2.0
    assert report.ttft == Percentiles(0.5, 0.5, 0.5)
    assert any("UNAVAILABLE" in line for line in report.lines())
