"""What every journal does, asked of a file and of a real Redis; and what the file alone must bear."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.connect import open_journal
from kvstore.control.file_journal import FileJournal
from kvstore.control.journal import Change, JournalEntry, JournalUnavailable, StreamJournal, Verdict
from kvstore.control.redis_journal import PREFIX, RedisJournal
from tests.processes import RedisServer, free_port, python_environment

HEADER = b"\x00a header\xff"


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.redis)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/journal.sqlite"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def journal(url: str) -> Iterator[StreamJournal]:
    made = open_journal(url, "")
    yield made
    made.close()


@pytest.fixture
def stream_id(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{time.monotonic_ns()}"


def change(stream_id: str, position: int, *ids: int, epoch: int = 1, ending: str = "", is_new: bool = False) -> Change:
    return Change(stream_id, epoch, position, ids, HEADER if is_new else None, ending)


def test_what_was_committed_is_found_by_who_claims_it(journal: StreamJournal, url: str, stream_id: str) -> None:
    assert journal.commit([change(stream_id, 0, 5, 2**32 - 1, is_new=True)]) == [Verdict.COMMITTED]
    assert journal.commit([change(stream_id, 2, 7), change(stream_id, 3, ending="stop")]) == [Verdict.COMMITTED] * 2
    other = open_journal(url, "")
    assert other.claim(stream_id) == JournalEntry(2, HEADER, (5, 2**32 - 1, 7), "stop")
    other.close()


def test_a_look_takes_nothing(journal: StreamJournal, stream_id: str) -> None:
    journal.commit([change(stream_id, 0, 1, is_new=True)])
    assert journal.look_up(stream_id) == JournalEntry(1, HEADER, (1,), "")
    assert journal.commit([change(stream_id, 1, 2)]) == [Verdict.COMMITTED]
    assert journal.look_up(stream_id) == JournalEntry(1, HEADER, (1, 2), "")
    assert journal.look_up(f"not {stream_id}") is None


def test_an_unknown_stream_is_none(journal: StreamJournal, stream_id: str) -> None:
    assert journal.claim(stream_id) is None
    assert journal.commit([change(stream_id, 0, 1)]) == [Verdict.MISSING]


def test_the_owner_before_commits_nothing_more(journal: StreamJournal, stream_id: str) -> None:
    journal.commit([change(stream_id, 0, 1, is_new=True)])
    assert journal.claim(stream_id) is not None
    late = [change(stream_id, 1, 9), change(stream_id, 0, 9, is_new=True), change(stream_id, 1, 2, epoch=2)]
    assert journal.commit(late) == [Verdict.SUPERSEDED, Verdict.SUPERSEDED, Verdict.COMMITTED]
    entry = journal.claim(stream_id)
    assert entry is not None
    assert (entry.epoch, entry.token_ids) == (3, (1, 2))


@pytest.mark.parametrize("position", [0, 2])
def test_a_gap_or_a_doubled_token_is_not_committed(journal: StreamJournal, stream_id: str, position: int) -> None:
    journal.commit([change(stream_id, 0, 1, is_new=True)])
    assert journal.commit([change(stream_id, position, 9)]) == [Verdict.MISSING]
    entry = journal.claim(stream_id)
    assert entry is not None
    assert entry.token_ids == (1,)


def test_opening_again_under_the_same_epoch_starts_anew(journal: StreamJournal, stream_id: str) -> None:
    journal.commit([change(stream_id, 0, 1, 2, is_new=True)])
    assert journal.commit([change(stream_id, 0, 1, 2, 3, is_new=True)]) == [Verdict.COMMITTED]
    entry = journal.claim(stream_id)
    assert entry is not None
    assert entry.token_ids == (1, 2, 3)


def test_a_stream_in_a_file_is_forgotten_in_time(tmp_path: Path) -> None:
    now_s = 1000.0
    journal = FileJournal(tmp_path / "journal", lambda: now_s, ttl_s=10.0, max_streams=3)
    for name in "abcde":
        journal.commit([change(name, 0, 1, is_new=True)])
        now_s += 6.0  # a sweep is due each time
    assert [journal.claim(name) is not None for name in "abcde"] == [False, False, False, False, True]
    journal.close()


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """As by a cleaner of /tmp: what was written went to a file without a name, and no other router found it."""
    path = tmp_path / "run" / "journal"
    journals = [FileJournal(path, time.time) for _ in range(2)]
    assert journals[0].commit([change("s", 0, 1, is_new=True)]) == [Verdict.COMMITTED]
    for file in path.parent.iterdir():
        file.unlink()
    assert journals[0].commit([change("s", 1, 2)]) == [Verdict.MISSING]
    assert journals[0].commit([change("s", 0, 1, 2, is_new=True)]) == [Verdict.COMMITTED]
    assert journals[1].claim("s") == JournalEntry(2, HEADER, (1, 2), "")
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    for _ in range(2):
        with pytest.raises(JournalUnavailable):
            journals[0].commit([change("s", 0, 1, 2, is_new=True)])
    assert not path.parent.exists()
    path.parent.mkdir()
    assert journals[0].commit([change("s", 0, 1, 2, is_new=True)]) == [Verdict.COMMITTED]
    for journal in journals:
        journal.close()
    path.unlink()
    with pytest.raises(JournalUnavailable):
        journals[0].look_up("s")
    assert not path.exists()


def test_a_full_file_journal_forgets_the_oldest(tmp_path: Path) -> None:
    now_s = 1000.0
    journal = FileJournal(tmp_path / "journal", lambda: now_s, ttl_s=1e6, max_streams=2)
    for name in "abcd":
        journal.commit([change(name, 0, 1, is_new=True)])
        now_s += 6.0
    assert [journal.claim(name) is not None for name in "abcd"] == [False, False, True, True]
    journal.close()


@pytest.mark.redis
def test_a_stream_in_redis_has_a_time_to_live(redis_server: RedisServer, stream_id: str) -> None:
    journal = RedisJournal(redis_server.url, ttl_s=0.05)
    journal.commit([change(stream_id, 0, 1, is_new=True)])
    time.sleep(0.1)
    assert journal.claim(stream_id) is None
    with redis_server.client() as client:
        assert client.keys(PREFIX + b"{" + stream_id.encode() + b"*") == []
    journal.close()


def test_a_file_outlives_the_process_that_is_killed_right_after_a_commit(tmp_path: Path) -> None:
    script = """
import sys
from kvstore.connect import open_journal
from kvstore.control.journal import Change
journal = open_journal(sys.argv[1], "")
journal.commit([Change("s", 1, 0, (1, 2, 3), b"header")])
print("committed", flush=True)
sys.stdin.read()
"""
    url = f"file://{tmp_path}/journal"
    command = [sys.executable, "-c", script, url]
    with subprocess.Popen(
        command, env=python_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "committed\n"
        child.send_signal(signal.SIGKILL)
    journal = open_journal(url, "")
    assert journal.claim("s") == JournalEntry(2, b"header", (1, 2, 3), "")
    journal.close()


def test_routers_that_start_together_open_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as routers:
        for attempt in range(50):
            path = tmp_path / f"journal-{attempt}.sqlite"
            for journal in routers.map(lambda _, path=path: FileJournal(path, time.time), range(4)):
                journal.close()


def test_a_journal_that_is_away_says_so(tmp_path: Path) -> None:
    (tmp_path / "not-a-database").write_bytes(b"x" * 4096)
    with pytest.raises(JournalUnavailable):
        open_journal(f"file://{tmp_path}/not-a-database", "")
    away = open_journal(f"redis://127.0.0.1:{free_port()}/0", "")
    with pytest.raises(JournalUnavailable):
        away.commit([change("s", 0, 1, is_new=True)])
    with pytest.raises(JournalUnavailable):
        away.claim("s")
    away.close()


@pytest.mark.parametrize("url", ["", "memory://", "file://relative/path"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^journal: "):
        open_journal(url, "")
