"""What clients see that cannot resume: curl and the openai package get one unbroken stream through a worker's death."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator

import openai
import pytest

from router.service.text import TextCodec
from tests.cluster.deaths import NUM_TOKENS, Once, busy, check, prompt
from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO, MODEL_NAME, expected
from tests.fake_shape import Shape
from tests.forked import Prefork

pytestmark = [pytest.mark.cluster]

KILL_AT = (1, 20, 50)


@pytest.fixture(scope="module")
def cluster(prefork: Prefork) -> Iterator[FakeCluster]:
    with FakeCluster(prefork, Shape(step_s=0.01)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(DEMO / "tokenizer.json")


def body(number: int) -> dict[str, object]:
    """Of a completion that streams; chunks carry their token ids besides."""
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"model": MODEL_NAME, "prompt": prompt(number), "stream": True, "return_token_ids": True, **sampling}


def killer(cluster: FakeCluster, position: int) -> Callable[[int], None]:
    """Kills the busy decode worker when so many tokens have come, and starts it again."""
    killed: list[str] = []

    def look(num_tokens: int) -> None:
        if num_tokens >= position and not killed:
            killed.append(busy(cluster, "decode"))
            cluster.restart(killed[0])

    return look


@pytest.mark.parametrize("position", KILL_AT)
def test_curl_sees_one_stream(cluster: FakeCluster, codec: TextCodec, position: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    look = killer(cluster, position)
    command = ["curl", "-sSN", "--noproxy", "*", f"{cluster.http_urls[0]}/v1/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body(position))]
    ids: list[int] = []
    text, lines = "", []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                ids += choice.get("token_ids", ())
                text += choice["text"]
                look(len(ids))
    assert process.returncode == 0
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert ids == expected(prompt(position), NUM_TOKENS)
    assert text == codec.decode(ids)
    cluster.wait_complete()


@pytest.mark.parametrize("position", KILL_AT)
def test_the_openai_client_sees_one_stream(cluster: FakeCluster, codec: TextCodec, position: int) -> None:
    look = killer(cluster, position)
    number = 100 + position
    options = body(number)
    extra = {name: options.pop(name) for name in ("ignore_eos", "return_token_ids")}
    ids: list[int] = []
    text, reason = "", None
    with openai.OpenAI(base_url=f"{cluster.http_urls[0]}/v1", api_key="none", max_retries=0) as client:
        for chunk in client.completions.create(**options, extra_body=extra):
            (choice,) = chunk.choices
            ids += (choice.model_extra or {}).get("token_ids") or ()
            text += choice.text
            reason = choice.finish_reason or reason
            look(len(ids))
    assert reason == "length"
    assert ids == expected(prompt(number), NUM_TOKENS)
    assert text == codec.decode(ids)
    cluster.wait_complete()


@pytest.mark.parametrize("position", KILL_AT)
def test_the_python_client_sees_one_stream_through_its_routers_death(
    cluster: FakeCluster, codec: TextCodec, position: int
) -> None:
    number = 200 + position
    answer = cluster.ask(cluster.client(), prompt(number), NUM_TOKENS, Once(position, lambda: cluster.kill("router-0")))
    check(answer, number)
    assert answer.text == codec.decode(answer.ids)
    cluster.start_router("router-0")
    cluster.wait_complete()
