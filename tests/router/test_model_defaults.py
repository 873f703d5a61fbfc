"""What a model's files say of ends and sampling, and how it reaches the workers."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from switchyard.v1 import generation_pb2

from kvstore.control.file_journal import FileJournal
from router.app import Router
from router.config import RouterSpec
from router.errors import ModelFilesError
from router.fleet.messages import generation_request, journal_record
from router.model_files import ModelFiles, SamplingDefaults
from router.sampling import SamplingParams, check_sampling, sampling_message, sampling_params
from router.service.defaults import settled
from tests.fake_model import write_fake_model
from tests.router.api.asking import PROMPT
from tests.router.chat_templates import QWEN3
from tests.router.conftest import DEMO, MODEL, running_cluster
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, FakeWorker
from tests.workers.sampling import mask_top_k_top_p
from workers.model.registry import load_config

GENERATION = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 9, "do_sample": False}
SETTLED = (pytest.approx(0.6), pytest.approx(0.95), 20)


def write_model(directory: Path, **files: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    sizes = {"max_position_embeddings": CONTEXT_TOKENS, "vocab_size": VOCAB_SIZE}
    (directory / "config.json").write_text(json.dumps({**sizes, **files.pop("config", {})}))  # type: ignore[dict-item]
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": None}, (5,)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 8]}, (5, 7, 8)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6, 7)),
        ({"eos_token_id": None}, {}, ()),
        ({}, {"eos_token_id": 0}, (0,)),
    ],
)
def test_end_tokens_of_both_files_unite(tmp_path: Path, config: Any, generation: Any, ids: tuple[int, ...]) -> None:
    directory = write_model(tmp_path / "router", config=config, generation_config=generation)
    assert ModelFiles.load(directory, "m").eos_token_ids == ids
    write_fake_model(tmp_path / "worker")
    path = tmp_path / "worker" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None, **config}))
    (path.parent / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(path.parent).eos_token_ids == ids


def test_sampling_defaults_are_read_and_can_be_turned_off(tmp_path: Path) -> None:
    directory = write_model(tmp_path, generation_config=GENERATION)
    assert ModelFiles.load(directory, "m").sampling_defaults == SamplingDefaults(0.6, 0.95, 20, 9)
    assert ModelFiles.load(directory, "m", "none").sampling_defaults == SamplingDefaults()
    write_model(tmp_path, generation_config={"temperature": None, "top_k": -1})
    assert ModelFiles.load(directory, "m").sampling_defaults == SamplingDefaults(top_k=0)
    shaped = {"min_p": 0.05, "typical_p": 0.9, "repetition_penalty": 1.05}
    write_model(tmp_path, generation_config=shaped)
    defaults = ModelFiles.load(directory, "m").sampling_defaults
    assert defaults == SamplingDefaults(**shaped)
    found = settled(SamplingParams(min_p=0.0), defaults, (), 1, 9)
    assert (found.min_p, found.typical_p, found.repetition_penalty) == (0.0, 0.9, 1.05)
    wrong = [("temperature", -1), ("top_p", 0), ("top_k", 2.5), ("max_new_tokens", 0), ("top_p", "x")]
    wrong += [("min_p", 2), ("typical_p", 0), ("repetition_penalty", 0)]
    wrong += [("top_k", float("inf")), ("max_new_tokens", float("nan"))]
    for field, value in wrong:
        write_model(tmp_path, generation_config={field: value})
        with pytest.raises(ModelFilesError, match=rf"generation_config\.json: {field} must be"):
            ModelFiles.load(directory, "m")
        ModelFiles.load(directory, "m", "none")
    with pytest.raises(ValueError, match="generation_config: must be one of auto, none, not 'vllm'"):
        RouterSpec("r", str(tmp_path), "m", "memory://", generation_config="vllm")


@pytest.mark.parametrize("model", [{"generation_config": "auto"}, {"generation_config": "none"}])
async def test_a_request_that_leaves_it_open_gets_the_models_sampling(tmp_path: Path, model: dict[str, str]) -> None:
    is_auto = model["generation_config"] == "auto"
    directory = write_model(
        tmp_path,
        config={"eos_token_id": 1},
        generation_config=GENERATION,
        tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"},
    )
    worker = FakeWorker("mixed-0", "mixed")
    journal = FileJournal(tmp_path / "streams", time.time)
    async with running_cluster(
        directory, worker, journal=journal, generation_config=model["generation_config"]
    ) as cluster:
        async with httpx.AsyncClient(base_url=cluster.http_url, timeout=20) as client:
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "def f(x):"}]}
            limited = {**chat, "max_tokens": 5, "max_completion_tokens": 4}
            mine = {"temperature": 0.25, "top_p": 0.5, "top_k": -1, "ignore_eos": True}
            if not is_auto:
                chat["max_tokens"] = 3
            for path, body in (
                ("chat/completions", chat),
                ("chat/completions", {**limited, **mine}),
                ("completions", {"model": MODEL, "prompt": "def"}),
            ):
                assert (await client.post(f"/v1/{path}", json=body)).status_code == 200
        stub = cluster.stub()
        message = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT))
        message.sampling.max_tokens = 3
        answer = [one async for one in stub.Generate(message)]
        # What another router would go on with, whatever its own model directory says.
        entry = await asyncio.to_thread(journal.look_up, answer[0].stream_id)
        assert entry is not None
        kept = journal_record(entry.header)[0].sampling
        assert (kept.temperature, kept.top_p, kept.top_k) == (SETTLED if is_auto else (1.0, 1.0, 0))
        assert kept.stop_token_ids == (0,)
        message.sampling.top_k = 0
        message.sampling.temperature = 0
        assert [one async for one in stub.Generate(message)]
    received = [submit.sampling for submit in worker.submits]
    defaults = SETTLED if is_auto else (1.0, 1.0, 0)
    sent = [(one.temperature, one.top_p, one.top_k) for one in received]
    assert sent == [defaults, (0.25, 0.5, 0), defaults, defaults, (0, defaults[1], 0)]
    assert [one.max_tokens for one in received] == [9 if is_auto else 3, 4, 16, 3, 3]
    # The tokenizer's eos_token is id 0 here, which config.json does not name.
    assert [list(one.stop_token_ids) for one in received] == [[0], [], [0], [0], [0]]


async def test_the_templates_end_is_a_stop_token(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    directory = write_model(tmp_path, config={"vocab_size": VOCAB_SIZE + 3}, tokenizer_config={"chat_template": QWEN3})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<|im_end|>")])  # added and not special, as some models have it
    tokenizer.add_tokens([AddedToken("\n\n")])
    tokenizer.save(str(directory / "tokenizer.json"))
    router = Router(RouterSpec("router-0", str(directory), MODEL, "memory://", grpc_port=0, http_port=0))
    assert router._generation.preparation.end_token_ids == (tokenizer.token_to_id("<|im_end|>"),)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n\n\n{% endfor %}")
    router = Router(RouterSpec("router-0", str(directory), MODEL, "memory://", grpc_port=0, http_port=0))
    assert router._generation.preparation.end_token_ids == ()  # an answer may have empty lines in it
    (tmp_path / "chat_template.jinja").unlink()
    write_model(tmp_path, config={"vocab_size": VOCAB_SIZE})  # the id lies outside of the model: it cannot be chosen
    router = Router(RouterSpec("router-0", str(directory), MODEL, "memory://", grpc_port=0, http_port=0))
    assert router._generation.preparation.end_token_ids == ()


def test_an_absent_field_is_not_a_zero_on_the_wire() -> None:
    assert sampling_params(sampling_message(SamplingParams())) == SamplingParams()
    zero = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)
    assert sampling_params(sampling_message(zero)) == zero
    assert generation_request(generation_pb2.GenerateRequest(text="x"), None, b"").sampling == SamplingParams()


async def test_grpc_calls_have_request_ids_and_refusals_are_counted(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        stub = cluster.stub()
        message = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT))
        message.sampling.max_tokens = 2
        call = stub.Generate(message, metadata=(("x-request-id", "mine"),))
        assert ("x-request-id", "mine") in [tuple(pair) for pair in await call.initial_metadata()]
        assert [one async for one in call]
        refused = stub.Tokenize(generation_pb2.TokenizeRequest(model="nobody", text="x"))
        assert len(dict(iter(await refused.initial_metadata()))["x-request-id"]) == 32
        with pytest.raises(grpc.aio.AioRpcError):
            await refused
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            raw = channel.unary_stream("/switchyard.v1.GenerationService/Generate")
            with pytest.raises(grpc.aio.AioRpcError, match="does not parse"):
                await raw(b"\xff\xff\xff").read()
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await channel.unary_unary("/switchyard.v1.GenerationService/Nothing")(b"")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Resume(generation_pb2.ResumeRequest(stream_id="nothing")).read()
        async with httpx.AsyncClient(base_url=cluster.http_url) as client:
            text = (await client.get("/metrics")).text
    for outcome in ("length", "model_not_found", "invalid_request", "stream_not_found", "unknown_route"):
        assert f'switchyard_requests_total{{outcome="{outcome}"}} 1.0\n' in text, outcome


@pytest.mark.parametrize("top_p", [1e-300, 5e-46, 1e-40])
def test_a_top_p_that_is_smaller_than_the_wire_can_say_keeps_the_best_candidate(top_p: float) -> None:
    for asked, default in ((top_p, None), (None, top_p)):
        settled_one = settled(
            SamplingParams(top_p=asked), SamplingDefaults(top_p=default), (), seed=1, num_tokens_left=9
        )
        carried = sampling_params(sampling_message(settled_one)).top_p
        assert carried is not None
        check_sampling(sampling_params(sampling_message(settled_one)), VOCAB_SIZE)
        logits = torch.randn(50, generator=torch.Generator().manual_seed(3)).double()
        assert mask_top_k_top_p(logits, 0, carried).isfinite().sum() == 1
