"""A real `switchyard serve` with adapters: loaded while it runs, answered as peft answers, unloaded."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.serving import LOOPBACK, Serving, Surroundings
from tests.peft_adapters import load_adapted, load_base, make_adapter
from tests.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = list(range(20, 60))
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the model and one of another model."""
    root = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_model, root / "first", seed=1)
    make_adapter(tiny_model, root / "second", seed=2, r=8, target_modules=["q_proj", "down_proj"], use_rslora=True)
    make_adapter(tiny_model, root / "broken", seed=3)
    config = json.loads((root / "broken" / "adapter_config.json").read_text())
    (root / "broken" / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    return root


@pytest.fixture(scope="module")
def serving(tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = Path(tempfile.mkdtemp(prefix="sya-", dir="/tmp"))  # a short path: Ray makes sockets far below it
    settings = ["engine.runner=torch", "model.dtype=float32", "endpoints.routers=1"]
    flags = ["--enable-lora", "--lora-modules", f"second={adapters / 'second'}", "--lora-root", str(adapters)]
    command = Surroundings(folder, tiny_model).command(*flags, "--max-loras", "2", settings=settings)
    running = Serving(command, tmp_path_factory.mktemp("cwd"))
    yield running
    running.close()
    shutil.rmtree(folder, ignore_errors=True)


def ask(serving: Serving, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{serving.router['http']}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with LOOPBACK.open(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def complete(serving: Serving, model: str, ids: list[int] = IDS) -> list[int]:
    """Token ids of a greedy completion."""
    body = {"model": model, "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    status, text = ask(serving, "/v1/completions", {**body, "return_token_ids": True})
    assert status == 200, text
    (choice,) = json.loads(text)["choices"]
    return list(choice["token_ids"])


@torch.no_grad()
def greedy(model: Any, ids: list[int] = IDS) -> list[int]:
    """As transformers and peft have it."""
    known = list(ids)
    for _ in range(NUM_TOKENS):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]


def test_an_adapter_is_loaded_used_and_unloaded_while_the_cluster_runs(
    serving: Serving, tiny_model: Path, adapters: Path
) -> None:
    base = complete(serving, "tiny")
    assert base == greedy(load_base(tiny_model))
    assert complete(serving, "second") == greedy(load_adapted(tiny_model, adapters / "second"))
    assert ask(serving, "/v1/completions", {"model": "first", "prompt": IDS})[0] == 404
    status, text = ask(serving, "/v1/load_lora_adapter", {"lora_name": "first", "lora_path": "first"})
    assert (status, text) == (200, "Success: LoRA adapter 'first' added successfully.")
    adapted = greedy(load_adapted(tiny_model, adapters / "first"))
    assert adapted != base
    for _ in range(2):  # the second time from the blocks of the first
        assert complete(serving, "first") == adapted
        assert complete(serving, "tiny") == base
    cards = {card["id"]: card for card in json.loads(ask(serving, "/v1/models")[1])["data"]}
    assert {name: card["parent"] for name, card in cards.items()} == {"tiny": None, "first": "tiny", "second": "tiny"}

    def resident() -> bool:
        lines = [line for line in ask(serving, "/metrics")[1].splitlines() if "resident_adapters{" in line]
        return sum(float(line.split()[-1]) for line in lines if 'memory="device"' in line) == 4  # two on each worker

    wait_until(resident, "both workers say which adapters they hold")
    assert ask(serving, "/v1/unload_lora_adapter", {"lora_name": "first"})[0] == 200
    assert ask(serving, "/v1/completions", {"model": "first", "prompt": IDS})[0] == 404
    assert complete(serving, "tiny") == base


def test_one_name_for_other_bytes_finds_none_of_the_old_blocks(
    serving: Serving, tiny_model: Path, adapters: Path
) -> None:
    assert ask(serving, "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": "first"})[0] == 200
    assert complete(serving, "one") == greedy(load_adapted(tiny_model, adapters / "first"))
    body = {"lora_name": "one", "lora_path": "second", "load_inplace": True}
    assert ask(serving, "/v1/load_lora_adapter", body)[0] == 200
    assert complete(serving, "one") == greedy(load_adapted(tiny_model, adapters / "second"))
    assert ask(serving, "/v1/unload_lora_adapter", {"lora_name": "one"})[0] == 200


def test_a_broken_adapter_is_refused_and_harms_nobody(serving: Serving, tiny_model: Path) -> None:
    status, text = ask(serving, "/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": "broken"})
    assert status == 400
    assert "lora_A.weight" in json.loads(text)["error"]["message"]
    assert complete(serving, "tiny") == greedy(load_base(tiny_model))
