"""The queueing formulas against closed forms and against a simulated queue."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.scaling.queueing import ServiceTime, erlang_c, mean_wait_s, normal_quantile, wait_quantile_s

EXPONENTIAL, CONSTANT = ServiceTime(1.0, 1.0), ServiceTime(1.0, 0.0)


def test_four_servers_at_a_load_of_3_2() -> None:
    """The published figures: C(4, 3.2) = 0.5964, mean wait 0.746 service times."""
    assert erlang_c(4, 3.2) == pytest.approx(0.5964, abs=5e-5)
    assert mean_wait_s(4, 3.2, EXPONENTIAL) == pytest.approx(0.746, abs=5e-4)


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 0.95])
def test_one_server_is_m_m_1(load: float) -> None:
    """C = rho, W = rho / (1 - rho), and the tail of the wait is rho * exp(-(1 - rho) t)."""
    assert erlang_c(1, load) == pytest.approx(load)
    assert mean_wait_s(1, load, EXPONENTIAL) == pytest.approx(load / (1 - load))
    p99 = wait_quantile_s(1, load, EXPONENTIAL, 0.99)
    assert load * math.exp(-(1 - load) * p99) == pytest.approx(0.01)


def test_constant_service_waits_half_as_long() -> None:
    """M/D/1 at 0.8: mean wait 2.0 service times (Pollaczek and Khinchine)."""
    assert mean_wait_s(1, 0.8, CONSTANT) == pytest.approx(2.0)


def test_two_servers_are_m_m_2() -> None:
    """C(2, a) = a^2 / (2 + a)."""
    for load in (0.3, 1.0, 1.7):
        assert erlang_c(2, load) == pytest.approx(load**2 / (2 + load))


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_erlang_c_is_its_sum(num_servers: int, utilisation: float) -> None:
    """The recursion gives what the textbook's sum of powers and factorials does."""
    load = utilisation * num_servers
    last = load**num_servers / math.factorial(num_servers) / (1 - utilisation)
    rest = sum(load**k / math.factorial(k) for k in range(num_servers))
    assert erlang_c(num_servers, load) == pytest.approx(last / (rest + last), rel=1e-9)


def test_too_much_load_waits_for_ever() -> None:
    assert erlang_c(2, 2.0) == 1.0
    assert mean_wait_s(2, 2.0, EXPONENTIAL) == math.inf
    assert wait_quantile_s(2, 3.0, EXPONENTIAL, 0.5) == math.inf


def test_a_quantile_that_does_not_wait_is_zero() -> None:
    assert wait_quantile_s(8, 1.0, EXPONENTIAL, 0.95) == 0.0


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(0.01, 20), st.floats(0, 4), st.floats(0.5, 0.999))
def test_more_servers_never_wait_longer(num_servers: int, arrivals: float, cv2: float, quantile: float) -> None:
    service = ServiceTime(0.3, cv2)
    waits = [wait_quantile_s(n, arrivals, service, quantile) for n in (num_servers, num_servers + 1)]
    assert waits[1] <= waits[0]


@pytest.mark.parametrize(("mean_s", "cv2"), [(1.0, 0.0), (0.2, 1.0), (3.0, 2.0)])
def test_service_quantiles_are_lognormal(mean_s: float, cv2: float) -> None:
    """Mean and variance of a lognormal law, read back from its quantiles."""
    service = ServiceTime(mean_s, cv2)
    median = service.quantile_s(0.5)
    sigma = math.log(service.quantile_s(0.975) / median) / normal_quantile(0.975)
    assert median * math.exp(sigma**2 / 2) == pytest.approx(mean_s)
    assert math.expm1(sigma**2) == pytest.approx(cv2, abs=1e-9)


@pytest.mark.parametrize(("num_servers", "utilisation", "cv2"), [(1, 0.8, 1.0), (4, 0.85, 0.0), (8, 0.85, 1.5)])
def test_p99_of_a_simulated_queue(num_servers: int, utilisation: float, cv2: float) -> None:
    """Within 35 % on 60,000 customers; longer runs came within 16 % (see the module)."""
    rng, service = random.Random(7), ServiceTime(1.0, cv2)
    sigma2 = math.log1p(cv2)
    free, waits, now = [0.0] * num_servers, [], 0.0
    for _ in range(60_000):
        now += rng.expovariate(utilisation * num_servers)
        start = max(now, heapq.heappop(free))
        waits.append(start - now)
        heapq.heappush(free, start + math.exp(rng.gauss(-sigma2 / 2, math.sqrt(sigma2))))
    measured = sorted(waits)[int(0.99 * len(waits))]
    assert wait_quantile_s(num_servers, utilisation * num_servers, service, 0.99) == pytest.approx(measured, rel=0.35)
