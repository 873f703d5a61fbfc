"""What is made of the errors that end a replica's start, whatever text they travel in."""

from __future__ import annotations

import traceback

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from deploy.actors.start_failure import ReplicaFailed, StartFailure, failure_of, find_failure
from deploy.errors import ConfigError, StartError
from workers.errors import ModelError


def task_error(error: Exception) -> RayTaskError:
    """What Ray makes of an error in another process."""
    try:
        raise error
    except type(error):
        text = f"ray::RankActor.connect()\n{traceback.format_exc()}"
    return RayTaskError("connect", text, error, proctitle="rank", pid=1, ip="::1")


def in_other_process(error: Exception) -> Exception:
    """As ray.get raises it."""
    raised: Exception = task_error(error).as_instanceof_cause()
    return raised


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (in_other_process(ModelError("model/config.json: no")), StartFailure("model/config.json: no", True)),
        (in_other_process(StartError("KV node: not ready")), StartFailure("KV node: not ready", True)),
        (StartError("KV node: not ready"), StartFailure("KV node: not ready", True)),
        (in_other_process(RuntimeError("gloo:\nclosed")), StartFailure("RuntimeError: gloo:", False)),
        (in_other_process(OSError(5, "broken")), StartFailure("OSError: [Errno 5] broken", False)),
        (
            ActorDiedError(task_error(ValueError("in a constructor"))),
            StartFailure("ValueError: in a constructor", False),
        ),
        (ActorDiedError(task_error(ConfigError("arena_dir: no"))), StartFailure("arena_dir: no", False)),
        (
            ActorDiedError(),
            StartFailure(f"ray.exceptions.ActorDiedError: {ActorDiedError.BASE_ERROR_MSG}", False),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_an_error_means(error: Exception, expected: StartFailure) -> None:
    assert failure_of(error) == expected


def test_a_record_is_found_in_the_text_that_it_travels_in() -> None:
    first, second = StartFailure("a 'quoted' \"path\"\u00e9: {no}", True), StartFailure("later", False)
    texts = ["".join(traceback.format_exception(ReplicaFailed(failure))) for failure in (first, second)]
    assert find_failure(f"Retrying 2 more times. Error:\n{texts[0]}\nSee the logs.") == first
    assert find_failure("\n".join(texts)) == second


@pytest.mark.parametrize("text", ["", "The deployment failed", str(ReplicaFailed(StartFailure("cut", True)))[:-4]])
def test_other_texts_have_no_record(text: str) -> None:
    assert find_failure(text) is None
