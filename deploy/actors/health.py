"""Whether a worker gets on with its work, from its reports. Pure: knows neither Ray nor a clock."""

from __future__ import annotations

from deploy.actors.metrics import Report


class Progress:
    """Of one worker. The caller passes the time."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._since_s = now_s
        self._num_steps: object = None
        self._step_age_s = 0.0

    def observe(self, report: Report, now_s: float) -> None:
        """Take note of a report. Prompt tokens wait for the engine only; a stream may wait for its client."""
        idle = not report.get("num_queued_tokens")
        if idle or report.get("num_steps") != self._num_steps:
            self._since_s = now_s
        self._num_steps = report.get("num_steps")
        step_age_s = report.get("step_age_s", 0.0)
        self._step_age_s = float(step_age_s) if isinstance(step_age_s, int | float) else 0.0

    def problem(self, now_s: float) -> str:
        """Why the worker is not healthy, or ""."""
        if self._step_age_s > self._timeout_s:  # a collective that hangs holds up streams that queue nothing
            return f"one step has taken {self._step_age_s:.0f} s"
        stalled_s = now_s - self._since_s
        return f"no progress for {stalled_s:.0f} s" if stalled_s > self._timeout_s else ""
