"""The client's only error, and how a failed call becomes one."""

from __future__ import annotations

import grpc


class GenerationError(Exception):
    """The router refused or failed a call, or no router could be reached."""

    def __init__(self, status: str, message: str, retry_after_s: float | None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status  # name of the gRPC status, such as "INVALID_ARGUMENT"
        self.message = message
        self.retry_after_s = retry_after_s  # seconds after which a retry may succeed; None when unknown


def error_of(error: grpc.RpcError) -> GenerationError:
    """What a failed call says."""
    retry_after = trailers(error).get("retry-after-s")
    return GenerationError(error.code().name, error.details() or "", float(retry_after) if retry_after else None)


def trailers(error: grpc.RpcError) -> dict[str, str]:
    """The metadata that came with a failure."""
    # aio's Metadata looks like a mapping but iterates over pairs: dict() would stumble.
    return {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416
