"""What a router keeps of adapters: in the books of its fleet, in the names of blocks, in its metrics."""

from __future__ import annotations

from router.fleet.fleet import Fleet, LoadReport, extend_names, name_blocks
from router.metrics import Metrics
from router.placement.policy import AdapterNeed, Placement, Role, RouteRequest
from router.placement.residency import HeldAdapters, by_rendezvous
from router.service.generation import Account
from telemetry.router import MAX_ADAPTER_LABELS
from tests.router.fleet.test_fleet import fleet_of, info

DIGEST, OTHER = b"a" * 32, b"b" * 32


def taking_adapters(*worker_ids: str) -> Fleet:
    fleet = fleet_of(*map(info, worker_ids))
    for worker_id in worker_ids:
        fleet.report(worker_id, LoadReport(0, 100, 0, HeldAdapters(num_slots=4)))
    return fleet


def pick(fleet: Fleet, request_id: str, digest: bytes = DIGEST, num_tokens: int = 16) -> str:
    need = AdapterNeed(digest, is_loadable=True)
    found = fleet.pick(RouteRequest(request_id, num_tokens, num_output_tokens=8, adapter=need), {}, now_s=0.0)
    assert isinstance(found, Placement)
    fleet.check()
    return found.decode_id


def test_a_burst_for_an_adapter_that_nobody_holds_is_read_in_one_place() -> None:
    fleet = taking_adapters("w0", "w1", "w2", "w3")
    first = by_rendezvous(DIGEST, ["w0", "w1", "w2", "w3"])[0]
    assert {pick(fleet, f"r{i}") for i in range(4)} == {first}
    views = {view.worker_id: view.adapter_ms for view in fleet.views({}, DIGEST)}
    assert views == {worker_id: 0.0 if worker_id == first else 100.0 for worker_id in views}
    assert {view.adapter_ms for view in fleet.views({}, OTHER)} == {100.0}
    for i in range(4):
        fleet.release(f"r{i}")
        fleet.check()
    assert {view.adapter_ms for view in fleet.views({}, DIGEST)} == {100.0}  # it never said that it holds it


def test_a_flood_makes_homes_until_all_share_it() -> None:
    fleet = taking_adapters("w0", "w1", "w2", "w3")
    taken = [pick(fleet, f"r{i}", num_tokens=64) for i in range(100)]
    assert set(taken) == {"w0", "w1", "w2", "w3"}
    assert fleet.homes(DIGEST) == ["w0", "w1", "w2", "w3"]
    assert len(fleet.homes(OTHER)) == 1


def test_a_worker_that_is_gone_takes_its_books_along() -> None:
    fleet = taking_adapters("w0", "w1")
    home = pick(fleet, "r")
    fleet.remove(home)
    fleet.release("r")
    fleet.check()
    assert pick(fleet, "s") != home


def test_names_of_blocks_are_extended_under_the_same_adapter() -> None:
    fleet = fleet_of(info("w", Role.MIXED))
    ids = list(range(50))
    for known in (10, 20, 40):
        begun = name_blocks(fleet.layouts, ids[:known], b"salt", DIGEST)
        assert extend_names(begun, ids, b"salt", DIGEST) == name_blocks(fleet.layouts, ids, b"salt", DIGEST)
    assert name_blocks(fleet.layouts, ids, b"salt", DIGEST) != name_blocks(fleet.layouts, ids, b"salt")


def test_names_that_clients_choose_do_not_make_series_without_end() -> None:
    metrics = Metrics()
    for i in range(MAX_ADAPTER_LABELS + 50):
        for _ in range(2):
            metrics.ended(Account("stop", model=f"adapter-{i}", is_adapter=True))
    lines = [line for line in metrics.text().decode().splitlines() if "adapter_requests_total{" in line]
    assert len(lines) == MAX_ADAPTER_LABELS + 1
    assert 'switchyard_adapter_requests_total{adapter="other"} 100.0' in lines
    assert 'switchyard_adapter_requests_total{adapter="adapter-0"} 2.0' in lines
