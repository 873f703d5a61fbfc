"""What SIGTERM, SIGINT and SIGHUP do to a command that has started a cluster.

The first one raises KeyboardInterrupt in the main thread, for an orderly end. A second SIGTERM or Ctrl-C, not just
after the first, ends at once. Knows nothing of what is ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType

from deploy.processes.front import SIGNALS, Asked, is_ignored

_NUDGE = signal.SIGURG  # ignored by default, and used by no other code
_NUDGE_S = 0.1
# Much less than in deploy.processes.front, whose second signal is never one of two that mean one: a busy interpreter
# may note the first one late. A group's signal that reaches us directly as well comes within a moment of the front's.
_SAME_S = 0.1


class Interrupts:
    """Takes the signals from the start, until restore(). For the main thread."""

    def __init__(self, end_at_once: Callable[[], bool]) -> None:
        """end_at_once: leaves nothing behind; false when the orderly end has to go on. Called in another thread: the
        main one may hang where no signal's handler runs."""
        self.is_stopping = False
        """Whether the orderly end has begun: it is not interrupted."""
        self._end_at_once = end_at_once
        self._asked = Asked(_SAME_S)
        self._was_raised = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS if not is_ignored(number)}
        self._received, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._nudge_before = signal.signal(_NUDGE, lambda *_: None)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        self.install()

    @property
    def was_asked(self) -> bool:
        """Whether there was a signal."""
        return self._was_raised or self._asked.was_asked

    def install(self) -> None:
        """Make the signals ours; again where a library may have taken them."""
        for number in self._before:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a signal: some library may have swallowed the first one."""
        self.install()
        if self.was_asked and not self.is_stopping:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.signal(_NUDGE, self._nudge_before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not (self.is_stopping or self._was_raised):
            self._was_raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """The kernel's handler writes each signal's number, whatever Python's handlers do.

        Python's own runs when the main thread comes back from what it waits for. A signal that came just before the
        wait does not end it: another one does.
        """
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        with contextlib.closing(os.fdopen(self._received, "rb", buffering=0)) as received:
            while True:
                is_pending = self._asked.was_asked and not (self._was_raised or self.is_stopping)
                if not select.select([received], [], [], _NUDGE_S if is_pending else None)[0]:
                    signal.pthread_kill(main_thread, _NUDGE)
                    continue
                numbers = received.read(64)
                if not numbers:
                    return
                for number in numbers:
                    if number in self._before:
                        self._note(number)

    def _note(self, number: int) -> None:
        is_first = not self._asked.was_asked
        if self._asked.is_new(number) and not is_first and self._end_at_once():
            os._exit(1)
