"""The roles of workers: by name in the directory and in configurations, by number in messages."""

from __future__ import annotations

from switchyard.v1 import worker_pb2

WIRE_ROLES = {
    "mixed": worker_pb2.WORKER_ROLE_MIXED,
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
}
ROLE_NAMES = {number: name for name, number in WIRE_ROLES.items()}
