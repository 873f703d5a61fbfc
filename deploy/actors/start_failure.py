"""Why a worker did not come up, from its replica to the command that waits for it.

Serve passes on only the text of a replica's error, inside a text of its own. So the replica raises an error whose
message is a record, which is found in whatever text it comes back in. Ray's classes say what failed, never its wording.
"""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import asdict, dataclass

from ray.exceptions import RayActorError, RayTaskError

from deploy.errors import StartError, one_line
from workers.errors import ModelError

_MARK = "switchyard-start-failure "
_PERMANENT = (ModelError, StartError)
_OUR_NAMES = re.compile(r"^(workers|deploy)\.errors\.\w+: ")  # our messages stand for themselves


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Of one replica."""

    problem: str
    """One line."""
    is_permanent: bool
    """Trying again would not help."""


class ReplicaFailed(Exception):
    """A replica did not come up; the message is the record of a StartFailure."""

    def __init__(self, failure: StartFailure) -> None:
        super().__init__(_MARK + json.dumps(asdict(failure)))


def failure_of(error: BaseException) -> StartFailure:
    """What an error means that the start of a replica, or of one of its ranks, ended with."""
    if isinstance(error, RayTaskError):
        error = error.cause  # what was raised in the other process; a chain of calls has one cause
    if isinstance(error, RayActorError) and error.actor_init_failed:
        problem = one_line(error)  # what the constructor raised is a text here: a traceback, which ends with its error
    else:
        problem = traceback.format_exception_only(error)[0].splitlines()[0].strip()
    return StartFailure(_OUR_NAMES.sub("", problem), isinstance(error, _PERMANENT))


def find_failure(text: str) -> StartFailure | None:
    """The record in a text, the last of several; None when there is none, as when Ray lost the replica's process."""
    *_, found = text.split(_MARK)
    if found == text:
        return None
    try:
        return StartFailure(**json.JSONDecoder().raw_decode(found)[0])
    except (ValueError, TypeError):  # Ray cut the text
        return None
