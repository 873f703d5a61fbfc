"""Who is let in."""

from __future__ import annotations

import pytest

from router.service.admission import Admission


def test_the_limit_counts_what_is_in_flight() -> None:
    admission = Admission(max_inflight_requests=2, max_prompt_bytes=100)
    assert admission.admit(1) is None
    assert admission.admit(1) is None
    refusal = admission.admit(1)
    assert refusal is not None
    assert refusal.reason == "inflight_requests"
    admission.leave(1.0)
    assert admission.admit(1) is None


def test_the_time_to_return_follows_how_long_requests_take() -> None:
    admission = Admission(max_inflight_requests=10, max_prompt_bytes=100)
    for _ in range(100):
        assert admission.admit(1) is None
        admission.leave(20.0)
    for _ in range(10):
        assert admission.admit(1) is None
    refusal = admission.admit(1)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(2.0, rel=0.01)


def test_a_large_prompt_is_refused_for_good() -> None:
    admission = Admission(max_inflight_requests=1, max_prompt_bytes=100)
    refusal = admission.admit(101)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("prompt_bytes", None)
    assert admission.num_inflight == 0
    assert admission.admit(100) is None


def test_nobody_comes_in_while_the_router_stops() -> None:
    admission = Admission(max_inflight_requests=1, max_prompt_bytes=100)
    admission.is_stopping = True
    refusal = admission.admit(1)
    assert refusal is not None
    assert refusal.reason == "stopping"
