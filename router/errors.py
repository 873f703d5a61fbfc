"""Everything that the router refuses or fails, by name. Each edge (gRPC, HTTP, process exit) maps these once.

RouterError
 +- InvalidRequest          the client's fault; `param` names the field
 |   +- UnknownModel        the model is not served here
 |   +- PromptTooLarge      more bytes than the router looks at
 |   +- ContextLengthExceeded   more tokens than the model's context has
 |   +- UnsupportedEncoding a body that is compressed in a way the router does not know
 |   +- UnknownRoute        no such path, or not by this method
 |   +- UnknownStream       no such stream to resume
 |   +- AdaptersOff         this cluster loads no adapters while it runs
 |   +- AdapterRefused      the directory holds no adapter that this model can be served with
 |   +- PathForbidden       the directory is not below the one that adapters are loaded from
 |   +- AdapterExists       the name of the adapter is taken
 |   +- AdapterConfigured   the adapter is one of the configuration, which stays
 +- Overloaded              admission is full; `retry_after_s` says when to come back
 +- StepFailed              computing it raised on one worker, then on another
 +- Unavailable             no worker can serve this now
 |   +- NoWorker            no suitable worker is up, and none came in time
 |   +- WorkersLost         placed anew as often as allowed, and lost each time
 |   +- Stopping            this router is going down
 |   +- JournalAway         no router may take a stream over now
 |   +- AdapterAway         which adapters are served cannot be known now, or the one is being loaded
 |   +- AdapterFailed       workers could not load it
 +- DeadlineExceeded        the time of the request is over
 +- Cancelled               the client went away
 +- Superseded              another router carries the stream now
StartupError                the process cannot start: exit code 2
 +- ConfigError             an address in the spec that is none; the message names the key
 +- PortInUse               another process listens there
 +- ModelFilesError         the model directory lacks what a router needs
"""

from __future__ import annotations


class RouterError(Exception):
    """A request ends with this instead of a completion. The message is one line."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(RouterError):
    """A field of the request is wrong; sending it again will not help."""

    code = "invalid_request"


class UnknownModel(InvalidRequest):
    """The named model is not served here."""

    code = "model_not_found"


class PromptTooLarge(InvalidRequest):
    """The prompt has more bytes than the router is willing to encode."""

    code = "prompt_too_large"


class ContextLengthExceeded(InvalidRequest):
    """The prompt has so many tokens that the model's context leaves no space for output."""

    code = "context_length_exceeded"  # OpenAI's name: clients shorten their chats when they see it


class UnsupportedEncoding(InvalidRequest):
    """The Content-Encoding of the body is none that this router undoes."""

    code = "unsupported_encoding"


class UnknownRoute(InvalidRequest):
    """Nothing is served at this path, or not by this method."""

    code = "unknown_route"


class UnknownStream(InvalidRequest):
    """No journal knows the stream, or it ended too long ago."""

    code = "stream_not_found"


class AdaptersOff(InvalidRequest):
    """Loading adapters at run time is switched off."""

    code = "adapters_off"


class AdapterRefused(InvalidRequest):
    """The files are missing, damaged, or of an adapter that this model or this cluster cannot serve."""

    code = "adapter_refused"


class PathForbidden(InvalidRequest):
    """The path leads out of the directory that adapters are loaded from."""

    code = "path_forbidden"


class AdapterExists(InvalidRequest):
    """Something else has the adapter's name, or is getting it."""

    code = "adapter_exists"


class AdapterConfigured(InvalidRequest):
    """The adapter is one of adapters.modules: it is served as long as the configuration has it."""

    code = "adapter_configured"


class Overloaded(RouterError):
    """Too much is in flight; `retry_after_s` is set."""

    code = "overloaded"


class StepFailed(RouterError):
    """Computing the request raised on one worker and then on another."""

    code = "step_failed"


class Unavailable(RouterError):
    """Nobody can serve this request now."""

    code = "unavailable"


class NoWorker(Unavailable):
    """No suitable worker is up, and none came back in time."""

    code = "no_worker"


class WorkersLost(Unavailable):
    """The stream lost its workers more often than it may be placed anew."""

    code = "workers_lost"


class Stopping(Unavailable):
    """This router is going down."""

    code = "stopping"


def stopping() -> Stopping:
    """For whatever comes, or still runs, when the router goes down: the next one is up, or will be soon."""
    return Stopping("this router is going down", retry_after_s=1.0)


class JournalAway(Unavailable):
    """The stream journal does not answer, so no stream may be taken over."""

    code = "journal_away"


class AdapterAway(Unavailable):
    """The adapter is being loaded for longer than a request waits, or the registry of adapters does not answer."""

    code = "adapter_away"


class AdapterFailed(Unavailable):
    """One worker and then another could not load the adapter of a request."""

    code = "adapter_failed"


class DeadlineExceeded(RouterError):
    """The time that the client or the router set is over."""

    code = "deadline_exceeded"


class Cancelled(RouterError):
    """The client cancelled or went away."""

    code = "cancelled"


class Superseded(RouterError):
    """The stream was resumed elsewhere; this end of it is over."""

    code = "superseded"


def mark_counted(error: BaseException) -> None:
    """Say of an error that the request which it ended is in the metrics."""
    setattr(error, _COUNTED, True)


def is_counted(error: BaseException) -> bool:
    """Whether that was said."""
    return getattr(error, _COUNTED, False)


_COUNTED = "_switchyard_is_counted"


class StartupError(Exception):
    """The process cannot start; the message is one line for stderr."""


class ConfigError(StartupError):
    """A value of the configuration is wrong; the message starts with its path."""


class PortInUse(StartupError):
    """The configured port is taken."""


class ModelFilesError(StartupError):
    """The model directory lacks what the router needs of it."""
