"""The thread that owns an engine: feeds it commands, steps it, and passes on what comes out.

Also asks the directory which blocks of a new request are in the tiers, watches it for requests that wait for theirs,
and announces blocks that were published. Knows nothing of gRPC or of which router asked.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from kvstore.control.directory import Directory, DirectoryUnavailable
from workers.engine.adapters.ref import AdapterRef
from workers.engine.engine import Clock, Engine, StepEvents
from workers.engine.load import LoadSnapshot, snapshot
from workers.engine.prefetch import QueuePrefetch
from workers.engine.request import Request, RequestEnd
from workers.errors import InvalidRequest

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05  # how long an idle engine sleeps before it looks at deadlines again
_RANKS_WAIT_S = 0.001  # and before it asks the other ranks again for the end of a transfer
_WATCH_S = 0.005  # how often the directory is asked while blocks are awaited
_MAX_WATCHED = 64  # blocks of a request at a time: more do not come between two looks
_MAX_ANNOUNCEMENTS = 4096  # steps
_MAX_NAMES_ASKED = 4096  # blocks in one look-up, unless one request has more


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Continue:
    """The prefill side is through."""

    request_id: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Credit:
    """More tokens may be sent."""

    request_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KVAvailable:
    """Blocks of a prompt were announced."""

    request_id: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class TransfersEnded:
    """Blocks have come from the tiers or gone to them: an idle engine has something to do."""


@dataclass(frozen=True, slots=True)
class FollowBlocks:
    """Start block events with a list of the blocks that are held, or stop them."""

    is_on: bool


@dataclass(frozen=True, slots=True)
class PinAdapters:
    """These stay loaded while nobody uses them, in place of those that the owner pinned before."""

    owner: str
    refs: Sequence[AdapterRef]


Command = Submit | Cancel | Continue | Credit | KVAvailable | TransfersEnded | FollowBlocks | PinAdapters


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the engine did not take."""

    request: Request
    error: str


@dataclass(frozen=True, slots=True)
class LoopEvents:
    """Passed to the listener, on the engine's thread."""

    step: StepEvents = field(default_factory=StepEvents)
    refused: Sequence[Refused] = ()
    held_blocks: Sequence[bytes] | None = None  # all their names; the answer to FollowBlocks(True)
    block_changes: Mapping[bytes, bool] | None = None  # in this step: for each name whether it is held now


class EngineLoop:
    """Runs an engine in a thread of its own.

    locations: where what this worker publishes is, as the directory names locations ("host:NODE_ID", "redis").
    reaches: whether it can pull a block from one of these locations.
    on_failure: called once, with the error, when the engine itself fails; nothing runs after it.
    prefetch: takes the queue after each step.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Directory | None,
        locations: Callable[[], Sequence[str]],
        reaches: Callable[[frozenset[str]], bool],
        on_events: Callable[[LoopEvents], None],
        on_failure: Callable[[BaseException], None],
        clock: Clock,
        prefetch: QueuePrefetch | None = None,
    ) -> None:
        self._engine = engine
        self._prefetch = prefetch
        self._directory = directory
        self._locations = locations
        self._reaches = reaches
        self._on_events = on_events
        self._on_failure = on_failure
        self._clock = clock
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._pulls: list[tuple[str, int, list[bytes]]] = []  # (request, blocks it has, names it lacks)
        self._pulls_changed = threading.Event()
        self._stopped = threading.Event()
        self._announcements: queue.Queue[list[bytes] | None] = queue.Queue(_MAX_ANNOUNCEMENTS)
        self._lookups: queue.SimpleQueue[tuple[str, int, list[bytes]] | None] = queue.SimpleQueue()  # as in _pulls
        self._step_began_s: float | None = None
        self.load = LoadSnapshot()
        self._threads = [
            threading.Thread(target=self._run, name="engine", daemon=True),
            threading.Thread(target=self._watch, name="kv-watch", daemon=True),
            threading.Thread(target=self._announce, name="kv-announce", daemon=True),
            threading.Thread(target=self._look_up, name="kv-look-up", daemon=True),
        ]

    def start(self) -> None:
        """Start stepping."""
        self.load = snapshot(self._engine)
        for thread in self._threads:
            thread.start()

    def post(self, command: Command) -> None:
        """Hand the engine a command; from any thread."""
        self._inbox.put(command)

    def check(self, request: Request) -> None:
        """As Engine.check; from any thread."""
        self._engine.check(request)

    def announce(self, block_names: list[bytes]) -> None:
        """Blocks were published; from any thread. Dropped while the directory is far behind: it is only a hint."""
        with contextlib.suppress(queue.Full):
            self._announcements.put_nowait(block_names)

    def stop(self) -> None:
        """Finish the step in progress and end."""
        self._stopped.set()
        self._pulls_changed.set()
        with contextlib.suppress(queue.Full):  # then its thread ends after the last announcement
            self._announcements.put_nowait(None)
        self._lookups.put(None)
        self._inbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    @property
    def step_age_s(self) -> float:
        """How long the step in progress has taken so far; 0 between steps. A hung collective shows here."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def close(self) -> None:
        """After stop: let the other ranks of the worker go."""
        self._engine.close()

    # ---------------------------------------------------------------------------------------------- the engine's thread
    def _run(self) -> None:
        try:
            wait_s = _IDLE_WAIT_S
            while not self._stopped.is_set():
                refused: list[Refused] = []
                ended: list[RequestEnd] = []
                for command in self._drain(wait_s):
                    self._apply(command, refused, ended)
                ended += self._engine.expire()
                if refused or ended:
                    self._on_events(LoopEvents(StepEvents(ended=ended), refused))
                self._step_began_s = self._clock()
                events = self._engine.step()
                self._step_began_s = None
                wait_s = 0.0 if events is not None else _RANKS_WAIT_S if self._engine.awaits_ranks else _IDLE_WAIT_S
                self._note_pulls()
                changes = self._engine.scheduler.pool.take_changes()
                if events is not None and events.published_names:
                    self.announce(events.published_names)
                self.load = snapshot(self._engine)
                if events is not None or changes:  # a plan of nothing may have evicted blocks for a pull
                    self._on_events(LoopEvents(events or StepEvents(), block_changes=changes))
        except BaseException as error:
            self._on_failure(error)

    def _drain(self, wait_s: float) -> list[Command]:
        commands: list[Command] = []
        with contextlib.suppress(queue.Empty):
            if wait_s:
                first = self._inbox.get(timeout=wait_s)
                if first is not None:
                    commands.append(first)
            while True:
                command = self._inbox.get_nowait()
                if command is not None:
                    commands.append(command)
        return commands

    def _apply(self, command: Command, refused: list[Refused], ended: list[RequestEnd]) -> None:
        end: RequestEnd | None = None
        match command:
            case Submit(request):
                try:
                    request.arrival_time_s = self._clock()
                    self._engine.submit(request)
                    self._ask_for_prefix(request)
                except InvalidRequest as error:
                    refused.append(Refused(request, str(error)))
            case Cancel(request_id):
                end = self._engine.cancel(request_id)
            case Continue(request_id, token_ids):
                end = self._engine.continue_request(request_id, token_ids)
            case Credit(request_id, num_tokens):
                self._engine.credit(request_id, num_tokens)
            case KVAvailable(request_id, num_blocks):
                self._engine.scheduler.kv_available(request_id, num_blocks)
            case TransfersEnded():
                pass  # the step that follows asks which
            case PinAdapters(owner, refs):
                self._engine.pin_adapters(owner, refs)
            case FollowBlocks(is_on):
                held = self._engine.scheduler.pool.record_changes(is_on)
                if is_on:
                    self._on_events(LoopEvents(held_blocks=held))
        if end is not None:
            ended.append(end)

    def _ask_for_prefix(self, request: Request) -> None:
        scheduler = self._engine.scheduler
        if self._directory is not None and scheduler.wants_lookup(request):
            request.awaits_lookup = True
            num_held = scheduler.pool.num_matched(request.block_names)
            self._lookups.put((request.request_id, num_held, request.block_names[num_held:]))

    def _note_pulls(self) -> None:
        requests = self._engine.scheduler.requests
        self._pulls = [
            (request_id, requests[request_id].num_ready_blocks, names)
            for request_id, names in self._engine.scheduler.pending_pulls()
        ]
        if self._pulls:
            self._pulls_changed.set()
        if self._prefetch is not None:
            self._prefetch.note(self._engine.scheduler)

    # ------------------------------------------------------------------------------------------ the directory's threads
    def _announce(self) -> None:
        """Tell the directory what was published, off the engine's thread: a slow directory must not hold up tokens.

        Only a hint: without it decode workers still find the blocks when they get Continue.
        """
        while (names := self._announcements.get()) is not None:
            if self._directory is not None:
                with _directory_may_fail("given block locations"):
                    for location in self._locations():
                        self._directory.publish(names, location)
            if self._stopped.is_set() and self._announcements.empty():
                return  # the queue was full when the loop stopped

    def _look_up(self) -> None:
        """Answer each look-up, if only with "nothing": its request is held back until then.

        What has queued up meanwhile is one call, so that many new requests do not wait for each other. A directory that
        is away answers at once, one that hangs is found out once.
        """
        is_over = False
        while not is_over and (first := self._lookups.get()) is not None:
            asked = [first]
            with contextlib.suppress(queue.Empty):
                while not is_over and sum(len(names) for _, _, names in asked) < _MAX_NAMES_ASKED:
                    if (entry := self._lookups.get_nowait()) is None:
                        is_over = True
                    else:
                        asked.append(entry)
            located = [0] * len(asked)
            with _directory_may_fail("asked for prefixes"):
                located = self._num_located([names for _, _, names in asked])
            for (request_id, num_held, _), num_located in zip(asked, located, strict=True):
                self.post(KVAvailable(request_id, num_held + num_located if num_located else 0))

    def _watch(self) -> None:
        if self._directory is None:
            return
        announced: dict[str, int] = {}
        while not self._stopped.is_set():
            self._pulls_changed.wait()
            self._pulls_changed.clear()  # before the look at what is wanted, so that no change is missed
            pulls = self._pulls
            announced = {request_id: announced[request_id] for request_id, _, _ in pulls if request_id in announced}
            if not pulls:
                continue
            self._pulls_changed.set()  # look again after a pause, until nothing is wanted
            with _directory_may_fail("asked for blocks"):
                located = self._num_located([names[:_MAX_WATCHED] for _, _, names in pulls])
                for (request_id, num_ready, _), num_located in zip(pulls, located, strict=True):
                    available = num_ready + num_located
                    if available > max(num_ready, announced.get(request_id, 0)):
                        announced[request_id] = available
                        self.post(KVAvailable(request_id, available))
            self._stopped.wait(_WATCH_S)

    def _num_located(self, asked: Sequence[Sequence[bytes]]) -> list[int]:
        """How many names of each list, from its first on, are where this worker can pull from. One call."""
        flat = [name for names in asked for name in names]
        if not flat or self._directory is None:
            return [0] * len(asked)
        is_there = map(self._reaches, self._directory.locate(flat))
        counts = []
        for names in asked:
            found = list(islice(is_there, len(names)))
            counts.append(found.index(False) if False in found else len(found))
        return counts


@contextlib.contextmanager
def _directory_may_fail(what: str) -> Iterator[None]:
    """Its threads outlive whatever one question to it raises: requests would wait for them in vain."""
    try:
        yield
    except DirectoryUnavailable:
        pass
    except Exception:
        log.exception("the directory was not %s", what)
