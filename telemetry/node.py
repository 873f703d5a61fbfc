"""What each KV node counts: its arena, and the disk tier behind it. Fields are those of `GetStatsResponse`."""

from __future__ import annotations

from telemetry.metric import Metric, counter, gauge

LABELS = ("node",)
_PREFIX = "switchyard_node_"


def _count(name: str, unit: str, meaning: str, field: str, *more_labels: str) -> Metric:
    return counter(f"{_PREFIX}{name}_total", unit, meaning, (*LABELS, *more_labels), field)


def _state(name: str, unit: str, meaning: str, field: str) -> Metric:
    return gauge(f"{_PREFIX}{name}", unit, meaning, LABELS, field)


ARENA = (
    _state("sealed_slots", "slots", "Slots of the arena that hold a fragment.", "num_sealed"),
    _count("promoted_fragments", "fragments", "Fragments brought from the disk into slots.", "num_promoted"),
    _count("late_promotions", "", "Look-ups that did not wait for the disk any longer.", "num_promotions_late"),
    _count(
        "rejected_fragments",
        "fragments",
        "Fragments in slots that failed their verification on their way to the disk or to a peer.",
        "rejected",
        "reason",
    ),
)

DISK = (
    _state("disk_up", "", "1 while the folder is held and the disk did what was asked last.", "is_up"),
    _state("disk_fragments", "fragments", "Fragments on disk.", "num_fragments"),
    _state("disk_used_bytes", "bytes", "Size of the disk tier's files.", "used_bytes"),
    _count("disk_written_fragments", "fragments", "Fragments written.", "num_written"),
    _count("disk_read_fragments", "fragments", "Fragments read and verified.", "num_read"),
    _count("disk_refused_fragments", "fragments", "Fragments not taken because the disk was full.", "num_refused"),
    _count("disk_evicted_segments", "segments", "Segments removed to free space.", "num_segments_evicted"),
    _count(
        "disk_rejected_fragments",
        "fragments",
        "Fragments on disk that failed their verification.",
        "rejected",
        "reason",
    ),
)
"""Where there is a disk tier. Fields are those of `DiskStats`."""

METRICS = (*ARENA, *DISK)
"""On Ray's metrics port."""
