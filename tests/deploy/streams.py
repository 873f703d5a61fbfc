"""`python -m tests.deploy.streams TARGET STREAMS TOKENS`: streams of the fake engine, one after the other in each of
STREAMS threads, until standard input ends. Each is checked token by token; prints one JSON line of what it saw.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from switchyard_client import Finished, GenerationClient, GenerationRequest, SamplingParams, Tokens

from workers.runtime.fake.model import fake_completion

VOCAB_SIZE = 4096


@dataclass
class Seen:
    """By all streams together."""

    num_streams: int = 0
    num_replaced: int = 0
    wrong: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


def main(target: str, num_streams: int, num_tokens: int) -> None:
    seen, lock, is_over = Seen(), threading.Lock(), threading.Event()

    def go_on(number: int) -> None:
        client = GenerationClient(target, resume_within_s=60.0)
        while not is_over.is_set():
            number += num_streams
            try:
                _one(client, number, num_tokens, seen, lock)
            except Exception as error:
                with lock:
                    seen.wrong.append(f"stream {number}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(num_streams) as threads:
        for number in range(num_streams):
            threads.submit(go_on, number)
        sys.stdin.read()
        is_over.set()
    print(json.dumps(asdict(seen)))


def _one(client: GenerationClient, number: int, num_tokens: int, seen: Seen, lock: threading.Lock) -> None:
    prompt = [(number * 1009 + i * 31 + 7) % VOCAB_SIZE for i in range(48)]
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, seed=1)
    ids: list[int] = []
    last_s, gap_s, num_replaced = time.monotonic(), 0.0, 0
    for event in client.generate(GenerationRequest(tuple(prompt), sampling)):
        if isinstance(event, Tokens):
            if event.first_position != len(ids):
                raise AssertionError(f"position {event.first_position} after {len(ids)} tokens")
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - last_s) if ids else gap_s, now_s
            ids += event.ids
        elif isinstance(event, Finished):
            num_replaced = event.stats.num_replacements
    right = fake_completion(prompt, num_tokens, VOCAB_SIZE, 0.0, 1)
    with lock:
        seen.num_streams += 1
        seen.num_replaced += bool(num_replaced)
        seen.longest_gap_s = max(seen.longest_gap_s, gap_s)
        if ids != right:
            seen.wrong.append(f"stream {number}: {len(ids)} tokens, not the right ones")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
