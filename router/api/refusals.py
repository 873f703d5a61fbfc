"""Refusals that name fields as the client knows them. Knows nothing of HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping

from router.errors import InvalidRequest, mark_counted
from router.events import Event

_WHOLE_NAMES = ("prompt", "grammar")  # of others, the name is a part of the client's


@contextlib.contextmanager
def renamed_refusals(renamed: Mapping[str, str]) -> Iterator[None]:
    """Refusals out of the block name the fields by these names."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is None or error.param not in renamed:
            raise
        param = renamed[error.param]
        message = error.message.removeprefix(f"{error.param}: ") if error.param in _WHOLE_NAMES else error.message
        renaming = type(error)(f"{param}: {message}", param=param)
        mark_counted(renaming)
        raise renaming from None


async def refusing(stream: AsyncGenerator[Event, None], renamed: Mapping[str, str]) -> AsyncGenerator[Event, None]:
    """The events of a stream, whose refusals name the fields that the client knows."""
    async with contextlib.aclosing(stream) as events:
        with renamed_refusals(renamed):
            async for event in events:
                yield event
